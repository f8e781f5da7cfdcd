"""Runs an instance's steps on a GPU: while one computes, the next is prepared and launched."""

from __future__ import annotations

from collections.abc import Sequence as Many
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch

from services.gpu_agent.engine.arrival import AllThere, Behind
from services.gpu_agent.engine.cuda.attention import TILE
from services.gpu_agent.engine.cuda.fused import store_tokens
from services.gpu_agent.engine.cuda.launches import Launches, mark
from services.gpu_agent.engine.cuda.model import CudaModel
from services.gpu_agent.engine.cuda.pack import StepShape, pack
from services.gpu_agent.engine.sampling import Sampled, sample
from services.gpu_agent.engine.sampling_batch import Row, SamplingBatch, prepare
from services.gpu_agent.engine.step import Part, Pending, StepResult


@dataclass(frozen=True)
class _Launched:
    """A step on the stream (see Pending)."""

    sampled: Sampled | None
    began: torch.cuda.Event
    ended: torch.cuda.Event

    def result(self) -> StepResult:
        self.ended.synchronize()
        choices = self.sampled.choices() if self.sampled is not None else []
        return StepResult(choices, self.began.elapsed_time(self.ended) / 1e3)


class CudaRunner:
    """A Runner (see step.py) on a GPU. Used by the engine's thread alone."""

    depth = 2

    def __init__(self, model: CudaModel, eos_ids: frozenset[int]) -> None:
        self._model = model
        self._eos_ids = eos_ids
        self._launches = Launches(model.workspace)

    def launch(self, parts: Many[Part], rows: Many[Row]) -> Pending:
        """See Runner. Where it raises, the device has ended what was begun: no page is touched any more."""
        model = self._model
        shape = model.ladder.fitting(parts)
        # By itself only as one launch: what torch sets up for its attention on first use takes longer than that spares.
        whole = model.ladder.whole_for(parts)
        captured = whole if whole is not None and model.captured(whole) else shape
        at_once = partial(self._begin_at_once, captured, parts, rows)
        if model.model.weights.complete:
            return at_once()
        behind = partial(self._begin, shape, parts, rows, behind=True)
        return Behind(behind, model.gates, model.model.weights, at_once if model.captured(captured) else None)

    def _begin_at_once(self, shape: StepShape, parts: Many[Part], rows: Many[Row]) -> _Launched:
        model = self._model
        with model.turns if model.captured(shape) else nullcontext():
            return self._begin(shape, parts, rows, behind=False)

    @torch.inference_mode()
    def _begin(self, shape: StepShape, parts: Many[Part], rows: Many[Row], behind: bool) -> _Launched:
        try:
            return self._launch(shape, parts, rows, behind)
        except AllThere:  # the stream goes on with the whole step
            raise
        except BaseException:  # whatever it is, it is only delayed here
            self._model.workspace.stream.synchronize()
            raise

    def _launch(self, shape: StepShape, parts: Many[Part], rows: Many[Row], behind: bool) -> _Launched:
        model, workspace = self._model, self._model.workspace
        facts = workspace.buffer()
        plain = all(row.is_plain for row in rows)
        used = pack(parts, rows if plain else (), shape, model.model.kv_spec.block_tokens, TILE, facts.array)
        graph = None if behind else model.captured(shape)
        if graph is not None:
            began = self._launches.begin(graph, facts, used)
        with torch.cuda.device(workspace.device), torch.cuda.stream(workspace.stream):
            on_device = torch.empty_like(workspace.facts[:used]) if behind else workspace.facts
            if graph is None:
                began = mark(workspace.stream)
                on_device[:used].copy_(facts.tensor[:used], non_blocking=True)
                facts.copied.record()
            # While others are waited for anyway: the device, or the last weights.
            prepared = None if plain else self._prepare(rows)
            if graph is None:
                model.run(shape, on_device)
            sampled = None
            if prepared is not None:
                logits = workspace.in_float32(model.logits(shape)[: len(rows)])
                chosen = sample(logits, prepared)
                store_tokens(chosen.tokens, on_device[shape.sections["row_slots"]], model.last_tokens)
                sampled = chosen.to_host()
            elif rows:
                chosen = Sampled(workspace.outcome(shape.rows), None, {}).to_host()
                sampled = replace(chosen, outcome=chosen.outcome[:, : len(rows)])
            ended = mark(workspace.stream)
        return _Launched(sampled, began, ended)

    def _prepare(self, rows: Many[Row]) -> SamplingBatch:
        model = self._model
        vocabulary, device = model.model.vocab_size, model.workspace.device
        return prepare(rows, vocabulary, self._eos_ids, device, model.last_tokens)
