"""Computing on a GPU (see ../backend.py)."""

from __future__ import annotations

from typing import Any

import torch

from services.gpu_agent.arena.arena import Arena
from services.gpu_agent.arena.weight_range import WeightRange
from services.gpu_agent.engine.backend import OutsideArena, StepLimits
from services.gpu_agent.engine.cuda.limits import step_limits
from services.gpu_agent.engine.cuda.model import CudaModel
from services.gpu_agent.engine.cuda.runner import CudaRunner
from services.gpu_agent.engine.cuda.workspace import MAX_HEAD_DIM, Workspace
from services.gpu_agent.engine.kv_spec import KvSpec
from services.gpu_agent.engine.model import BoundModel, UnsupportedArchitecture, build_model, has_experts
from services.gpu_agent.weights.layout import ImageLayout

_MAX_BATCH = 64


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
        return self.cuda.capture_next()

    def runner(self, eos_ids: frozenset[int]) -> CudaRunner:
        """See Program."""
        return CudaRunner(self.cuda, eos_ids)


class CudaBackend:
    """See Backend."""

    def __init__(self, arena: Arena, device: torch.device, workspace_bytes: int, max_batch: int | None = None) -> None:
        """workspace_bytes: what torch may take in all; most of it is set aside for activations at once.

        max_batch: most sequences of any model. torch.OutOfMemoryError where workspace_bytes is too little, or the
        device has not as much.
        """
        self._arena = arena
        self._max_batch = max_batch or _MAX_BATCH
        self.workspace = Workspace(device, self._max_batch, workspace_bytes)

    def check(self, config: Any, dtype: torch.dtype, kv: KvSpec, max_batch: int | None, context_tokens: int) -> None:
        """See Backend."""
        if kv.head_dim > MAX_HEAD_DIM:
            raise UnsupportedArchitecture(
                f"its heads have {kv.head_dim} elements; attention on a GPU takes {MAX_HEAD_DIM} at most"
            )
        if has_experts(config) and dtype is not torch.bfloat16:
            # torch's grouped products wait for the CPU in every other type, which no graph can hold.
            raise UnsupportedArchitecture(
                f"mixtures of experts are computed in bfloat16 on a GPU, not in {dtype}; deploy it with dtype bf16"
            )
        batch = max_batch or self._max_batch
        if batch > self._max_batch:
            raise ValueError(
                f"max_batch is {batch}, but this agent runs at most {self._max_batch} sequences of a model at once; "
                "ask for less, or start agents with a larger max_batch"
            )
        self._limits(config, dtype, max_batch)
        text = config.get_text_config()
        blocks = kv.blocks_for(context_tokens)
        self.workspace.check(text.vocab_size, batch, blocks, text.num_attention_heads, kv.kv_heads)

    def program(
        self, config: Any, layout: ImageLayout, weights: WeightRange, max_batch: int | None, context_tokens: int
    ) -> CudaProgram:
        """See Backend."""
        torch.cuda.set_device(self.workspace.device)
        bound = build_model(config, layout, weights)
        self.check(config, layout.dtype, bound.kv_spec, max_batch, context_tokens)
        limits = self._limits(config, layout.dtype, max_batch)
        model = CudaModel(
            bound,
            layout,
            weights,
            self._arena,
            self.workspace,
            max_batch=limits.max_batch,
            max_tokens=limits.prefill_budget,
        )
        return CudaProgram(model, limits)

    def _limits(self, config: Any, dtype: torch.dtype, max_batch: int | None) -> StepLimits:
        return step_limits(config, dtype, self.workspace.activation_bytes, max_batch or self._max_batch)

    @property
    def outside(self) -> OutsideArena:
        """See Backend."""
        workspace = self.workspace
        return OutsideArena(workspace.bound_bytes, workspace.reserved_bytes, workspace.grown_bytes)
