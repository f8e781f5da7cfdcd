"""An operator's question: how soon would my traffic be answered on so many GPUs, and how many would my target need?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from simulator.results import Results
from simulator.spec import ClusterSpec, ImpossibleError, ModelSpec

GPUS_PER_NODE = 8
MOST_GPUS = 512
TARGET_PERCENTILE = 95

Run = Callable[[ClusterSpec], Results]


@dataclass(frozen=True)
class Trial:
    """What so many GPUs gave."""

    gpus: int
    results: Results | None  # None: it cannot be simulated
    impossible: str = ""  # why
    missed: tuple[tuple[str, float], ...] = ()  # models above their target, with their p95 in seconds, worst first

    @property
    def met(self) -> bool:
        """Whether every model keeps its target."""
        return self.results is not None and not self.missed


@dataclass(frozen=True)
class WhatIf:
    """The answer."""

    results: Results  # on the GPUs asked about
    tried: tuple[Trial, ...]  # that on the GPUs asked about first
    target_s: float | None = None
    needed: int | None = None  # fewest GPUs of those tried that keep all targets
    remarks: tuple[str, ...] = ()


def cluster_of(gpus: int) -> ClusterSpec:
    """One node of up to eight GPUs, or whole nodes of eight. Raises ImpossibleError for other counts."""
    if gpus < 1:
        raise ImpossibleError(f"--gpus {gpus}: there must be at least one GPU")
    if gpus > MOST_GPUS:
        raise ImpossibleError(f"--gpus {gpus}: at most {MOST_GPUS} are simulated")
    if gpus <= GPUS_PER_NODE:
        return ClusterSpec(nodes=1, gpus_per_node=gpus)
    if gpus % GPUS_PER_NODE:
        below = gpus // GPUS_PER_NODE * GPUS_PER_NODE
        raise ImpossibleError(
            f"--gpus {gpus}: above {GPUS_PER_NODE} there are whole nodes of {GPUS_PER_NODE}: {below} or {below + 8}"
        )
    return ClusterSpec(nodes=gpus // GPUS_PER_NODE, gpus_per_node=GPUS_PER_NODE)


def with_target(models: Sequence[ModelSpec], target_s: float | None) -> tuple[ModelSpec, ...]:
    """The models; those without a target of their own get this one."""
    if target_s is None:
        return tuple(models)
    return tuple(model if model.ttft_s else replace(model, ttft_s=target_s) for model in models)


def what_if(
    run: Run, models: Sequence[ModelSpec], gpus: int, *, target_s: float | None = None, remarks: Sequence[str] = ()
) -> WhatIf:
    """Simulates on `gpus`; with a target, looks for the fewest GPUs that keep it, as if more were never worse.

    From `gpus` on it doubles or halves until the answer lies between two counts, then goes on in the middle: at most
    about ten runs. Raises ImpossibleError where `gpus` cannot be simulated.
    """
    asked = run(cluster_of(gpus))
    tried = {gpus: Trial(gpus, asked, missed=_missed(asked, models))}

    def met(count: int) -> bool:
        if count not in tried:
            tried[count] = _trial(run, models, count)
        return tried[count].met

    needed = None if target_s is None else fewest(met, gpus, 4 * max(gpus, GPUS_PER_NODE))
    return WhatIf(asked, tuple(tried.values()), target_s, needed, tuple(remarks))


def fewest(met: Callable[[int], bool], start: int, most: int) -> int | None:
    """The least count of GPUs for which `met` holds, as if it then held for all above: up to eight, then multiples of
    eight, `most` at most. None where it does not hold for that."""
    sizes = [*range(1, GPUS_PER_NODE + 1), *range(2 * GPUS_PER_NODE, min(most, MOST_GPUS) + 1, GPUS_PER_NODE)]
    at = sizes.index(start)
    low, high = -1, len(sizes)  # not met at `low`, met at `high`, as far as is known
    while high - low > 1:
        if met(sizes[at]):
            high = at
        else:
            low = at
        if high == len(sizes):  # nothing was enough so far
            at = min(2 * (low + 1), len(sizes) - 1)
        elif low == -1:  # everything was enough so far
            at = high // 2
        else:
            at = (low + high) // 2
    return sizes[high] if high < len(sizes) else None


def _trial(run: Run, models: Sequence[ModelSpec], gpus: int) -> Trial:
    try:
        results = run(cluster_of(gpus))
    except ImpossibleError as error:
        return Trial(gpus, None, impossible=str(error))
    return Trial(gpus, results, missed=_missed(results, models))


def _missed(results: Results, models: Sequence[ModelSpec]) -> tuple[tuple[str, float], ...]:
    asked_for = {results.models[at] for at in set(results.model.tolist())}
    times = {model: results.ttft(TARGET_PERCENTILE, model.name) for model in models if model.name in asked_for}
    missed = [(model.name, p95) for model, p95 in times.items() if model.ttft_s and p95 > model.ttft_s]
    return tuple(sorted(missed, key=lambda entry: -entry[1]))
