"""Computing on a GPU (see ../backend.py)."""

from __future__ import annotations

from typing import Any

import torch

from services.gpu_agent.arena.arena import Arena, WeightRange
from services.gpu_agent.engine.backend import StepLimits
from services.gpu_agent.engine.cuda.model import CudaModel
from services.gpu_agent.engine.cuda.pack import MAX_PREFILLS
from services.gpu_agent.engine.cuda.runner import CudaRunner
from services.gpu_agent.engine.cuda.workspace import Workspace
from services.gpu_agent.engine.model import BoundModel, build_model
from services.gpu_agent.weights.layout import ImageLayout

_MAX_BATCH = 64
_TOKEN_BUDGET = 2048


class CudaProgram:
    """See Program."""

    clear_page = None  # the kernels read nothing that no step has written

    def __init__(self, model: CudaModel, limits: StepLimits) -> None:
        self.cuda = model
        self.limits = limits

    @property
    def model(self) -> BoundModel:
        """See Program."""
        return self.cuda.model

    def prepare(self) -> bool:
        """Captures one more graph."""
        more = self.cuda.capture_next()
        if not more:
            self.cuda.workspace.settle()
        return more

    def runner(self, eos_ids: frozenset[int]) -> CudaRunner:
        """See Program."""
        return CudaRunner(self.cuda, eos_ids)


class CudaBackend:
    """See Backend."""

    def __init__(self, arena: Arena, device: torch.device, workspace_bytes: int) -> None:
        """workspace_bytes: what torch may take in all; most of it is set aside for activations at once.

        torch.OutOfMemoryError where it is too little, or the device has not as much.
        """
        self._arena = arena
        self.workspace = Workspace(device, _MAX_BATCH, workspace_bytes)

    def program(
        self, config: Any, layout: ImageLayout, weights: WeightRange, max_batch: int | None, context_tokens: int
    ) -> CudaProgram:
        """See Backend."""
        torch.cuda.set_device(self.workspace.device)
        bound = build_model(config, layout, weights)
        limits = StepLimits(min(max_batch or _MAX_BATCH, _MAX_BATCH), _TOKEN_BUDGET, MAX_PREFILLS)
        self.workspace.check(bound.vocab_size, limits.max_batch, bound.kv_spec.blocks_for(context_tokens))
        model = CudaModel(
            bound,
            layout,
            weights,
            self._arena,
            self.workspace,
            max_batch=limits.max_batch,
            max_tokens=limits.token_budget,
        )
        return CudaProgram(model, limits)

    @property
    def grown_bytes(self) -> int:
        """See Backend."""
        return self.workspace.grown_bytes
