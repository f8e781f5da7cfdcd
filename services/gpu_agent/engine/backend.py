"""What the agent needs of a device to compute on it. Two there are: host.py, and cuda/backend.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from services.gpu_agent.arena.weight_range import WeightRange
from services.gpu_agent.engine.kv_spec import KvSpec
from services.gpu_agent.engine.model import BoundModel
from services.gpu_agent.engine.step import Runner
from services.gpu_agent.weights.layout import ImageLayout


@dataclass(frozen=True)
class StepLimits:
    """How large the steps of a model may be."""

    max_batch: int
    """Sequences."""
    token_budget: int
    """Tokens, those of prompts and of decoding together."""
    prefill_budget: int
    """Tokens where nobody waits for the step's end to get a token."""
    max_prefills: int
    """Sequences with more than one token."""


@dataclass(frozen=True)
class OutsideArena:
    """Device memory that is not in the arena, in bytes; all 0 where there is no device."""

    bound: int = 0
    """Most that there can be."""
    held: int = 0
    grown: int = 0
    """Taken since the last graph was captured: by something that allocates while serving, which nothing should."""


class Program(Protocol):
    """A model ready to compute. It outlives its instances, and the eviction and reload of its weights."""

    @property
    def model(self) -> BoundModel:
        """The model."""
        ...

    @property
    def limits(self) -> StepLimits:
        """What its runner takes."""
        ...

    @property
    def clear_page(self) -> Callable[[int], None] | None:
        """To be called with each page that becomes KV, where its old content would matter."""
        ...

    def prepare(self) -> bool:
        """Does one more piece of what makes its steps fast, within some 100 ms; False where nothing was left to do.

        For the engine's thread alone, while all weights are resident. What was done is never done again.
        """
        ...

    def runner(self, eos_ids: frozenset[int]) -> Runner:
        """Computes steps, for one instance at a time."""
        ...


class Backend(Protocol):
    """The agent's device."""

    def check(self, config: Any, dtype: torch.dtype, kv: KvSpec, max_batch: int | None, context_tokens: int) -> None:
        """Refuses what this device cannot serve although the engine could; needs no memory.

        Raises UnsupportedArchitecture, and ValueError where the limits asked for do not fit the device's buffers.
        """
        ...

    def program(
        self, config: Any, layout: ImageLayout, weights: WeightRange, max_batch: int | None, context_tokens: int
    ) -> Program:
        """Builds a model over `weights`, which need not be resident. To be called in a thread; takes a second or so.

        max_batch None: the agent's own. Raises what check raises.
        """
        ...

    @property
    def outside(self) -> OutsideArena:
        """What it has taken outside the arena. Any thread may ask."""
        ...
