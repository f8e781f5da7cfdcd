"""Runs an instance's steps on the CPU."""

from __future__ import annotations

import time
from collections.abc import Sequence as Many
from dataclasses import dataclass

import torch

from services.gpu_agent.engine.arrival import Behind
from services.gpu_agent.engine.attention import PagedStep, Span
from services.gpu_agent.engine.kv_tensors import KvTensors
from services.gpu_agent.engine.model import BoundModel
from services.gpu_agent.engine.sampling import sample
from services.gpu_agent.engine.sampling_batch import Row, prepare
from services.gpu_agent.engine.step import Part, Pending, StepResult


@dataclass(frozen=True)
class _Done:
    """A step that was computed when it was launched (see Pending)."""

    outcome: StepResult

    def result(self) -> StepResult:
        return self.outcome


class HostRunner:
    """A Runner (see step.py) without a device of its own: launching a step computes it, if the weights are there."""

    depth = 1

    def __init__(self, model: BoundModel, kv: KvTensors, eos_ids: frozenset[int]) -> None:
        self._model = model
        self._kv = kv
        self._eos_ids = eos_ids

    def launch(self, parts: Many[Part], rows: Many[Row]) -> Pending:
        """See Runner. Raises what the computation fails with."""
        if self._model.weights.complete:
            return self._compute(parts, rows)
        return Behind(lambda: self._compute(parts, rows), self._model.gates, self._model.weights)

    @torch.inference_mode()
    def _compute(self, parts: Many[Part], rows: Many[Row]) -> _Done:
        began = time.monotonic()
        token_ids = [token for part in parts for token in part.token_ids]
        spans = [Span(part.blocks, part.start, part.length) for part in parts]
        last_rows = []
        row = 0
        for part in parts:
            row += part.length
            if part.samples:
                last_rows.append(row - 1)
        step = PagedStep(self._kv, self._model.kv_spec.block_tokens, spans)
        logits = self._model.compute(step, token_ids, last_rows)
        choices = sample(logits, prepare(rows, self._model.vocab_size, self._eos_ids)).choices()
        return _Done(StepResult(choices, time.monotonic() - began))
