"""Computing on the CPU (see backend.py): whole at once, with nothing to prepare."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from services.gpu_agent.arena.arena import Arena
from services.gpu_agent.arena.weight_range import WeightRange
from services.gpu_agent.engine.backend import OutsideArena, StepLimits
from services.gpu_agent.engine.host_runner import HostRunner
from services.gpu_agent.engine.kv_spec import KvSpec
from services.gpu_agent.engine.kv_tensors import KvTensors
from services.gpu_agent.engine.model import BoundModel, build_model
from services.gpu_agent.weights.layout import ImageLayout

_MAX_BATCH = 8
_TOKEN_BUDGET = 512


class HostProgram:
    """See Program."""

    def __init__(self, model: BoundModel, arena: Arena, max_batch: int) -> None:
        self.model = model
        budget = max(_TOKEN_BUDGET, max_batch)
        self.limits = StepLimits(max_batch, budget, budget, max_batch)
        spec = model.kv_spec
        slots = spec.slots_per_page(arena.page_bytes)
        self._kv = KvTensors(arena.kv_view(spec.dtype), arena.page_bytes, slots, spec)

    @property
    def clear_page(self) -> Callable[[int], None]:
        """Unused rows of a block are masked but still multiplied, and what another owner left could be NaN."""
        return self._kv.clear

    def prepare(self) -> bool:
        """See Program."""
        return False

    def runner(self, eos_ids: frozenset[int]) -> HostRunner:
        """See Program."""
        return HostRunner(self.model, self._kv, eos_ids)


class HostBackend:
    """See Backend."""

    outside = OutsideArena()

    def __init__(self, arena: Arena, max_batch: int | None = None) -> None:
        """max_batch: sequences of a model that does not say."""
        self._arena = arena
        self._max_batch = max_batch or _MAX_BATCH

    def check(self, config: Any, dtype: torch.dtype, kv: KvSpec, max_batch: int | None, context_tokens: int) -> None:
        """See Backend: the CPU takes whatever the engine takes."""

    def program(
        self, config: Any, layout: ImageLayout, weights: WeightRange, max_batch: int | None, context_tokens: int
    ) -> HostProgram:
        """See Backend."""
        return HostProgram(build_model(config, layout, weights), self._arena, max_batch or self._max_batch)
