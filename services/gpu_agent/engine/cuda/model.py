"""One model's steps on a GPU: the forward pass over fixed buffers, captured as CUDA graphs for a ladder of shapes."""

from __future__ import annotations

import gc
import logging
import time
from contextlib import suppress
from typing import Any

import torch

from services.gpu_agent.arena.arena import Arena
from services.gpu_agent.arena.weight_range import WeightRange
from services.gpu_agent.engine.arrival import with_norms_behind
from services.gpu_agent.engine.attention import attending
from services.gpu_agent.engine.cuda import fused
from services.gpu_agent.engine.cuda.attention import (
    TILE,
    PagedKv,
    StepTensors,
    attend,
    attend_whole,
    spare_pieces,
    takes_whole,
)
from services.gpu_agent.engine.cuda.attention import Workspace as Partials
from services.gpu_agent.engine.cuda.draw import draw
from services.gpu_agent.engine.cuda.pack import Ladder, StepShape, pack
from services.gpu_agent.engine.cuda.rehearsal import rehearse_choice
from services.gpu_agent.engine.cuda.rewrite import rewrite, write_logits
from services.gpu_agent.engine.cuda.rotary import PendingRope
from services.gpu_agent.engine.cuda.workspace import Workspace
from services.gpu_agent.engine.model import BoundModel
from services.gpu_agent.weights.layout import ImageLayout

_log = logging.getLogger(__name__)

# Of so many tokens, cuBLASLt's products of 1B and 8B Llamas take 3 to 5 % less than cuBLAS's; of 32 or fewer as much,
# of 1,024 11 % more (1B) or 3 % less (8B).
_CUBLASLT_TOKENS = range(33, 129)


class CudaModel:
    """A bound model that can be run and captured. Used by the engine's thread alone.

    It outlives instances, evictions and reloads: weights, KV pages and buffers keep their addresses, so what was
    captured once stays valid. The weights must be resident while it runs or captures.
    """

    def __init__(
        self,
        model: BoundModel,
        layout: ImageLayout,
        weights: WeightRange,
        arena: Arena,
        workspace: Workspace,
        *,
        max_batch: int,
        max_tokens: int,
    ) -> None:
        self.model = model
        self.workspace = workspace
        self.turns = arena.turns
        """Taken to launch a captured step. Others take too long: one behind a copy would keep it from being made."""
        spec = model.kv_spec
        whole = takes_whole(model.attention, spec.dtype, max_tokens, workspace.device)
        self.ladder = Ladder(max_batch, max_tokens, TILE, spare_pieces(spec.kv_heads), whole)
        self.captures = 0
        """Graphs captured, ever: as many as the ladder has shapes, however often the model is evicted."""
        self.last_tokens = torch.zeros(max_batch, dtype=torch.int32, device=workspace.device)
        rewritten = rewrite(model.module, layout, weights)
        self.rewritten = dict(rewritten.parts)
        self.gates = with_norms_behind(model.gates)
        """What may be computed when (see arrival.Behind), as the rewritten layers compute."""
        self._rewritten = rewritten
        write_logits(model.module.get_output_embeddings(), self._logits)
        pages = arena.kv_view(spec.dtype)
        self._kv = PagedKv(pages, spec, arena.page_bytes // spec.dtype.itemsize, spec.slots_per_page(arena.page_bytes))
        self._graphs: dict[StepShape, torch.cuda.CUDAGraph] = {}

    def captured(self, shape: StepShape) -> torch.cuda.CUDAGraph | None:
        """The step as one launch, if it was captured: like `run` with the workspace's facts."""
        return self._graphs.get(shape)

    @torch.inference_mode()
    def run(self, shape: StepShape, facts: torch.Tensor) -> None:
        """Computes a step on the current stream, the workspace's, kernel by kernel, from facts packed for `shape`.

        It leaves its logits, and what rows of which it has settings choose from them: see `logits`, Workspace.outcome
        and pack. Where other steps may run between two layers of it (see arrival.Behind), `facts` must not be the
        workspace's, which they overwrite.
        """
        torch.backends.cuda.preferred_blas_library("cublaslt" if shape.tokens in _CUBLASLT_TOKENS else "cublas")
        at = shape.sections
        step = StepTensors(
            slots=facts[at["slots"]],
            blocks=facts[at["blocks"]],
            pieces=facts[at["pieces"]].view(-1, 5),
            tiles=facts[at["tiles"]].view(-1, 4),
        )
        ids = fused.resolve_ids(facts[at["ids"]], self.last_tokens)
        # Without prompts each token is a sequence's last, and all logits are wanted.
        rows: Any = 0 if shape.decodes and not shape.tiles else facts[at["rows"]]
        into = self.logits(shape)
        try:
            with attending(_Attention(self._kv, step, self.workspace.partials, self._rewritten.rope)):
                output = self.model.module(
                    input_ids=ids[None], position_ids=facts[at["positions"]][None], use_cache=False, logits_to_keep=rows
                )
        except BaseException:  # also where the pass is dropped for the whole step (see arrival.Behind)
            self._rewritten.unfinished()
            raise
        if output.logits.data_ptr() != into.data_ptr():
            into.copy_(output.logits[0])
        settings = facts[at["settings"]].view(torch.float64).view(-1, 5)
        draw(into, settings, self.workspace.outcome(shape.rows), facts[at["row_slots"]], self.last_tokens)

    def logits(self, shape: StepShape) -> torch.Tensor:
        """(shape.rows, vocabulary): what the last step left."""
        return self._logits(shape.rows)

    def _logits(self, rows: int) -> torch.Tensor:
        return self.workspace.logits(rows, self.model.vocab_size, self.model.kv_spec.dtype)

    @torch.inference_mode()
    def capture_next(self) -> bool:
        """Captures one more shape; False where none was left."""
        shape = next((shape for shape in self.ladder.shapes if shape not in self._graphs), None)
        if shape is None:
            return False
        began = time.monotonic()
        with self.workspace.growing(), torch.cuda.stream(self.workspace.stream):
            if not self._graphs:
                rehearse_choice(self.workspace.logits(1, self.model.vocab_size, torch.float32), self.last_tokens)
            # A step of padding: whatever is compiled or set up on first use must be before the capture.
            padding = torch.zeros(shape.sections["blocks"].start, dtype=torch.int32)
            pack((), (), shape, self.model.kv_spec.block_tokens, TILE, padding.numpy())
            self.workspace.facts[: len(padding)].copy_(padding)
            self.run(shape, self.workspace.facts)
            self.workspace.stream.synchronize()
            graph = self._captured(shape)
        self._graphs[shape] = graph
        self.captures += 1
        _log.debug("captured %s in %.0f ms", shape, (time.monotonic() - began) * 1e3)
        return True

    def _captured(self, shape: StepShape) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        gc.disable()  # what a collection frees might wait on this stream, which would become a part of the graph
        try:
            graph.capture_begin(pool=self.workspace.pool, capture_error_mode="thread_local")
            try:
                self.run(shape, self.workspace.facts)
            except BaseException:
                with suppress(RuntimeError):  # it says that the capture has failed, but not why
                    graph.capture_end()
                raise
            graph.capture_end()
        finally:
            gc.enable()
        return graph


class _Attention:
    """The attention of one forward pass (see `Attend`): keys and values into their blocks, then attention over them."""

    def __init__(self, kv: PagedKv, step: StepTensors, partials: Partials, rope: PendingRope) -> None:
        self._kv = kv
        self._step = step
        self._partials = partials
        self._rope = rope

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float | None,
        sliding_window: int | None,
        extra: dict[str, Any],
    ) -> torch.Tensor:
        kv, step = self._kv, self._step
        layer: int = module.layer_idx  # type: ignore[assignment]  # modules' attributes are untyped
        whole = not len(step.pieces) and not len(step.tiles)
        scaling = scaling if scaling is not None else query.shape[-1] ** -0.5
        rope = self._rope.take(query, key)
        by_token = query[0].transpose(0, 1)
        fused.rotate_and_store(
            kv,
            layer,
            step.slots,
            by_token,
            key[0].transpose(0, 1),
            value[0].transpose(0, 1),
            (rope[0][0], rope[1][0]) if rope is not None else None,
            keys_too=whole,
        )
        if whole:
            return attend_whole(query, key, value, scaling).transpose(1, 2)
        out = torch.empty(by_token.shape, dtype=query.dtype, device=query.device)
        attend(
            kv,
            layer,
            step,
            by_token,
            out,
            self._partials,
            scaling=scaling,
            window=sliding_window,
            softcap=extra.get("softcap"),
            sinks=extra.get("s_aux"),
        )
        return out[None]
