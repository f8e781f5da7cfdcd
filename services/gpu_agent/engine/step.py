"""What one step computes, and what computes it: the seam between an instance and its device."""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Protocol

from services.gpu_agent.engine.sampling import Choice
from services.gpu_agent.engine.sampling_batch import Row


@dataclass(frozen=True)
class Part:
    """One sequence's share of a step: its tokens at positions [start, start + length)."""

    slot: int
    """The sequence's place in the batch, kept from admission to preemption or end: 0 to max_batch - 1."""
    blocks: Many[int]
    """All its KV blocks, in order of position."""
    start: int
    token_ids: Many[int]
    """The tokens; empty where there is one that the slot's sequence chose in a step whose result is not known yet."""
    samples: bool
    """Whether a next token is chosen behind them."""

    @property
    def length(self) -> int:
        """Tokens computed."""
        return len(self.token_ids) or 1


@dataclass(frozen=True)
class StepResult:
    """What a step chose."""

    choices: list[Choice]
    """For the parts that sample, in their order."""
    seconds: float
    """How long the device worked on it."""


class Pending(Protocol):
    """A step under way."""

    def result(self) -> StepResult:
        """Waits for the step. Raises NonFiniteLogits, or what the device failed with."""
        ...


class Runner(Protocol):
    """A model on its device. Steps are computed in the order in which they are launched."""

    @property
    def depth(self) -> int:
        """How many steps may be under way at once: 1, or 2 where the next one is prepared while one computes."""
        ...

    def launch(self, parts: Many[Part], rows: Many[Row]) -> Pending:
        """Begins a step. `rows` says how to choose for each part that samples, in their order.

        In each layer the keys and values of all parts are stored before any part attends: blocks that one part fills
        may be among those of another behind it.

        Where not all weights are resident yet, what it returns is an arrival.Behind, and no step is begun after it
        before that one has ended.
        """
        ...
