"""Traffic to replay: made up or from a trace, scaled to the machine, and given to models in turns."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from warmserve.traces import Request


def generate(duration_s: float, rate_per_s: float, seed: int) -> list[Request]:
    """Traffic like that of a chat service: bursty arrivals (gamma gaps with a coefficient of variation of 2) and
    lognormal lengths (medians 930 tokens in, 130 out), `rate_per_s` on average, for `duration_s` seconds."""
    chance = random.Random(seed)
    shape = 1 / 2**2

    def requests() -> Iterator[Request]:
        at = 0.0
        while True:
            at += chance.gammavariate(shape, 1 / (rate_per_s * shape))
            if at >= duration_s:
                return
            yield Request(
                at, "", round(chance.lognormvariate(6.83, 0.8)) + 1, round(chance.lognormvariate(4.87, 0.9)) + 1
            )

    return list(requests())


@dataclass(frozen=True)
class Scale:
    """How to fit a trace to the machine at hand."""

    duration_s: float  # of the replay
    start_s: float = 0.0  # of the trace: what comes before is left out
    time: float = 1.0  # seconds of replay per second of trace
    tokens: float = 1.0  # tokens of replay per token of trace
    max_prompt_tokens: int = 1 << 30
    max_output_tokens: int = 1 << 30

    def apply(self, trace: Iterable[Request]) -> list[Request]:
        """The part of the trace that fills the duration, scaled. Lengths are at least 1."""
        return [
            replace(
                request,
                time_s=(request.time_s - self.start_s) * self.time,
                prompt_tokens=_within(request.prompt_tokens * self.tokens, self.max_prompt_tokens),
                output_tokens=_within(request.output_tokens * self.tokens, self.max_output_tokens),
            )
            for request in trace
            if 0 <= (request.time_s - self.start_s) * self.time < self.duration_s
        ]


def _within(tokens: float, most: int) -> int:
    return max(1, min(round(tokens), most))


@dataclass(frozen=True)
class Rotation:
    """Models that take turns: of each period of `period_s` seconds, each has an equal share, in order. The trace begins
    `offset_s` seconds into a period."""

    models: Sequence[str]
    period_s: float
    offset_s: float = 0.0

    def model_at(self, at_s: float) -> str:
        """Whose turn it is."""
        return self.models[int((at_s + self.offset_s) % self.period_s / self.period_s * len(self.models))]

    def apply(self, trace: Iterable[Request]) -> list[Request]:
        """The same requests, each with its model."""
        return [replace(request, model=self.model_at(request.time_s)) for request in trace]
