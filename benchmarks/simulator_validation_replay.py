"""What a replay itself tells of the machine while it ran: how long steps took, and requests' and tokens' ways.

A host agent's instance begins a step when the one before has ended, and a router gets all tokens of a step at once. So
the time between two tokens of one answer is a step's: of those that decode, and of the prompts whose first tokens come
with it. Times to first tokens, which are to be foretold, are not looked at.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from launcher.replay import Outcome
from simulator.cost import CostModel
from simulator.spec import ModelSpec

_AT_ONCE_S = 1e-4  # tokens that come so soon one after another came in one message


@dataclass(frozen=True)
class Step:
    """One step of an instance, as the answers that got a token in it saw it."""

    model: str
    seconds: float
    decodes: int
    context: float  # tokens of all that decode
    prompts: tuple[int, ...] = ()  # tokens of each that was computed in it


def steps_of(outcomes: Iterable[Outcome]) -> list[Step]:
    """Steps in which answers went on. One that several answers saw comes as often."""
    by_model: defaultdict[str, list[Outcome]] = defaultdict(list)
    for one in outcomes:
        if not one.lost and one.tokens_s:
            by_model[one.model].append(one)
    return [step for model, own in by_model.items() for step in _steps(model, own)]


def _steps(model: str, outcomes: Sequence[Outcome]) -> Iterable[Step]:
    spans = [(one.at_s + one.tokens_s[0], one.at_s + one.tokens_s[-1], one.prompt_tokens) for one in outcomes]
    for one in outcomes:
        times = [one.at_s + token_s for token_s in one.tokens_s]
        for before, after in pairwise(times):
            if after - before <= _AT_ONCE_S:
                continue
            middle, half = (before + after) / 2, (after - before) / 2
            decoding = [prompt for first, last, prompt in spans if first < middle <= last]
            prompts = tuple(prompt for first, _, prompt in spans if middle < first <= after + half)
            yield Step(model, after - before, len(decoding), sum(decoding), prompts)


def times_slower(cost: CostModel, models: Mapping[str, ModelSpec], steps: Sequence[Step]) -> tuple[float, float]:
    """How much slower prompts and tokens were computed than by a cost model: the ratio of the sums.

    ValueError where there are no steps with prompts, or none without, or those with prompts took no longer.
    """
    took = computed = 0.0
    for step in steps:
        if not step.prompts:
            took += step.seconds / step.decodes
            computed += cost.steps(models[step.model]).decode(step.decodes, step.context) / step.decodes
    if not computed:
        raise ValueError("in no step did answers go on without a prompt beside them")
    tokens = took / computed
    took = computed = 0.0
    for step in steps:
        if step.prompts:
            of = cost.steps(models[step.model])
            own = sum(prompt * of.per_prompt_token + prompt**2 * of.per_prompt_square for prompt in step.prompts)
            took += (step.seconds - tokens * of.decode(step.decodes, step.context)) / step.decodes
            computed += (of.prefill_base + own) / step.decodes
    if not computed:
        raise ValueError("in no step was a prompt computed beside answers that went on")
    if took <= 0:
        raise ValueError("steps with prompts took no longer than those without: the machine is too busy to measure")
    return took / computed, tokens


def ways(outcomes: Iterable[Outcome]) -> tuple[float, float]:
    """Seconds to an instance that was active (the median: what an agent says of that may come late), and mean seconds
    beside the router, where a request and its token come by."""
    active = [one for one in outcomes if one.found_state == "active"]
    return (
        statistics.median(one.queue_s for one in active),
        statistics.mean(max(0.0, one.ttft_s - one.router_ttft_s) for one in active),
    )
