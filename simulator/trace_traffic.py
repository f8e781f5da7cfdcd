"""A trace of any format as the traffic of an operator's models."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TypeVar

import numpy as np

from simulator.arrivals import POISSON, Floats, Integers, counts_of, in_window
from simulator.spec import ModelSpec
from simulator.workloads import TYPICAL_PREFILL_TOKENS_PER_S, TYPICAL_TOKEN_S, Traffic, traffic_from, traffic_of
from warmserve.traces import Format, Request, TraceError, Window, detect, read_requests, read_windows
from warmserve.traces.fields import TYPICAL_OUTPUT_TOKENS, TYPICAL_PROMPT_TOKENS
from warmserve.traces.file import OnProgress

_ASSUMED = (
    f"the trace tells no lengths: each request has {TYPICAL_PROMPT_TOKENS} tokens and gets {TYPICAL_OUTPUT_TOKENS}, "
    "the medians of Azure's conversations"
)
_NAMED = 5  # models that a message tells
_Item = TypeVar("_Item", Request, Window)


@dataclass(frozen=True)
class TraceTraffic:
    """What was read. The first request is at 0 s, or the first window."""

    traffic: Traffic
    remarks: tuple[str, ...]  # what was assumed or changed, in words


def read_traffic(
    trace: Path, models: Sequence[ModelSpec], *, model: str | None, seed: int, on_progress: OnProgress | None = None
) -> TraceTraffic:
    """The traffic of `models` in a trace of any format that warmserve.traces reads.

    `model`: whose all of it is, whatever the trace says; needed where it names none and there are several. Of windows,
    requests are drawn with Poisson arrivals and, where the trace does not tell, lengths of a typical conversation; a
    ServeGen trace's clients count as models of their own (m-large/3) where `models` are so named. Raises TraceError
    where the trace cannot be read or names models that there are none of.
    """
    names = [spec.name for spec in models]
    whose = _whose(names, model)
    remarks: list[str] = []
    seen: set[str] = set()
    format_ = detect(trace)
    if format_.has_windows:
        by_client = model is None and format_ is Format.servegen and any("/" in name for name in names)
        whose = None if by_client else whose
        windows = list(_owned(read_windows(trace, by_client=by_client, on_progress=on_progress), whose, seen))
        if by_client and not seen.isdisjoint(names) and (others := seen.difference(names)):
            windows = [window for window in windows if window.model in names]
            remarks.append(f"{len(others)} clients of the trace are not in the models file and left out")
        _refuse_unknown(trace, Counter(window.model for window in windows), names)
        traffic = _drawn(windows, models, np.random.default_rng(seed))
        remarks.append("the trace holds windows: requests were drawn from their rates, with Poisson arrivals")
        if all(window.prompt_tokens_per_s is None for window in windows):
            remarks.append(_ASSUMED)
    else:
        traffic = traffic_from(_owned(read_requests(trace, on_progress=on_progress), whose, seen), names)
        _refuse_unknown(trace, Counter({traffic.models[at]: n for at, n in enumerate(_counts(traffic))}), names)
        if format_ is Format.access_log or (format_ is Format.jsonl and _mostly_typical(traffic)):
            remarks.append(_ASSUMED)
    if model is None and whose is not None and (further := sorted(seen - {"", whose})):
        told = ", ".join(further[:_NAMED]) + (f" and {len(further) - _NAMED} more" if len(further) > _NAMED else "")
        remarks.append(f"all requests count for {whose}, the only model, those for {told} as well")
    if not len(traffic):
        raise TraceError(f"{trace}: there are no requests in it")
    return _fitted(traffic, models, remarks)


def _whose(names: Sequence[str], model: str | None) -> str | None:
    if model is not None and model not in names:
        raise TraceError(f"--model {model}: there is no such model{_nearest(model, names)}")
    return names[0] if model is None and len(names) == 1 else model


def _owned(found: Iterable[_Item], whose: str | None, seen: set[str]) -> Iterator[_Item]:
    """Requests or windows as those of the model `whose`, if that is said; `seen` gets the trace's own models."""
    for item in found:
        seen.add(item.model)
        yield item if whose is None else replace(item, model=whose)


def _mostly_typical(traffic: Traffic) -> bool:
    """Whether so many requests have the lengths that are assumed that most of the trace's tell none."""
    typical = (traffic.prompt_tokens == TYPICAL_PROMPT_TOKENS) & (traffic.output_tokens == TYPICAL_OUTPUT_TOKENS)
    return bool(typical.mean() > 0.5) if len(typical) else False


def _refuse_unknown(trace: Path, requests: Counter[str], names: Sequence[str]) -> None:
    unknown = [(name, count) for name, count in requests.most_common() if count and name not in names]
    if not unknown:
        return
    if unknown[0][0] == "":
        raise TraceError(
            f"{trace} does not tell which model a request is for, and there are {len(names)} models: name one with "
            f"--model ({', '.join(names)})"
        )
    told = ", ".join(f"{name!r}{_nearest(name, names)}" for name, _ in unknown[:_NAMED])
    more = f" and {len(unknown) - _NAMED} more" if len(unknown) > _NAMED else ""
    raise TraceError(f"{trace} has requests for models that the models file does not have: {told}{more}")


def _nearest(name: str, names: Sequence[str]) -> str:
    near = get_close_matches(name, names, n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else f" (there are {', '.join(names)})"


def _counts(traffic: Traffic) -> list[int]:
    return [int(count) for count in np.bincount(traffic.model, minlength=len(traffic.models))]


def _drawn(windows: Iterable[Window], models: Sequence[ModelSpec], random: np.random.Generator) -> Traffic:
    """Requests as windows count them. Where only load is told, the rate is load / a typical request's time."""
    by_model: dict[str, list[Window]] = defaultdict(list)
    for window in windows:
        by_model[window.model].append(window)
    parts: list[tuple[Floats, Integers, Integers]] = []
    for spec in models:
        times, prompts, outputs = [], [], []
        for window in by_model[spec.name]:
            rate, prompt, output = _rate_and_lengths(window)
            count = int(counts_of(np.array([rate]), window.window_s, random)[0])
            times.append(window.start_s + in_window(count, window.window_s, POISSON, random))
            prompts.append(np.full(count, prompt))
            outputs.append(np.full(count, output))
        nothing = [np.empty(0)]
        order = np.argsort(np.concatenate(times or nothing), kind="stable")
        columns = [np.concatenate(column or nothing)[order] for column in (times, prompts, outputs)]
        parts.append((columns[0], columns[1].astype(np.int64), columns[2].astype(np.int64)))
    return traffic_of(models, parts)


def _rate_and_lengths(window: Window) -> tuple[float, int, int]:
    rate = window.request_rate
    if rate is None and window.mean_load is not None:
        usual = TYPICAL_PROMPT_TOKENS / TYPICAL_PREFILL_TOKENS_PER_S + TYPICAL_OUTPUT_TOKENS * TYPICAL_TOKEN_S
        rate = window.mean_load / usual
    if not rate:
        return 0.0, 1, 1

    def length(per_s: float | None, typical: int) -> int:
        return typical if per_s is None else max(1, round(per_s / rate))

    prompt = length(window.prompt_tokens_per_s, TYPICAL_PROMPT_TOKENS)
    return rate, prompt, length(window.output_tokens_per_s, TYPICAL_OUTPUT_TOKENS)


def _fitted(traffic: Traffic, models: Sequence[ModelSpec], remarks: list[str]) -> TraceTraffic:
    """From zero, with lengths that the models' contexts hold: what is longer would be refused by a router."""
    context = np.array([spec.context_tokens for spec in models])[traffic.model]
    output = np.clip(traffic.output_tokens, 1, context // 2)
    prompt = np.clip(traffic.prompt_tokens, 1, context - output)
    cut = int(((traffic.prompt_tokens > prompt) | (traffic.output_tokens > output)).sum())
    if cut:
        remarks.append(f"{cut:,} of {len(traffic):,} requests were longer than their model's context, and cut to it")
    begin = float(traffic.times_s[0])
    fitted = replace(traffic, times_s=traffic.times_s - begin, prompt_tokens=prompt, output_tokens=output)
    return TraceTraffic(fitted, tuple(remarks))
