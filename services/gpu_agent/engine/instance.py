"""An active model: its sequences, its KV cache, and one step over them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from services.gpu_agent.engine.attention import PagedStep, Span
from services.gpu_agent.engine.kv import KvCache
from services.gpu_agent.engine.model import BoundModel
from services.gpu_agent.engine.sampling import sample
from services.gpu_agent.engine.sampling_batch import Row, prepare
from services.gpu_agent.engine.scheduler import Chunk, Scheduler
from services.gpu_agent.engine.sequence import FinishReason, Sequence, SequenceOutput

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class InstanceStats:
    """What an instance has now, and what it has done since it was made."""

    running: int
    waiting: int
    kv_pages: int
    kv_blocks: int
    steps: int
    computed_tokens: int
    generated_tokens: int
    preemptions: int


class Instance:
    """Used by the engine's thread alone, but for `stats`, which any thread may read."""

    def __init__(
        self,
        instance_id: str,
        model_name: str,
        model: BoundModel,
        kv: KvCache,
        *,
        eos_ids: Iterable[int],
        context_tokens: int,
        max_batch: int = 32,
        token_budget: int = 512,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """context_tokens bounds prompt plus answer; token_budget bounds the tokens of one step.

        Each running sequence gets a token in each step, so the budget is never less than max_batch.
        """
        self.id = instance_id
        self.model_name = model_name
        self.stalled = False
        """The last step computed nothing although there is work: KV pages that others hold are waited for."""
        self._model = model
        self._kv = kv
        self._eos_ids = frozenset(eos_ids)
        self._context_tokens = context_tokens
        self._clock = clock
        self._scheduler = Scheduler(kv, kv.spec.blocks_for, max_batch, max(token_budget, max_batch))
        self._sequences: dict[tuple[str, int], Sequence] = {}
        self._ended: list[SequenceOutput] = []  # between steps; told by the next one
        self._steps = 0
        self._computed_tokens = 0
        self._generated_tokens = 0

    @property
    def has_work(self) -> bool:
        """Whether a step would do or tell anything."""
        return bool(self._sequences or self._ended)

    @property
    def next_deadline(self) -> float | None:
        """The earliest deadline of its sequences, in Unix seconds."""
        return min((s.deadline for s in self._sequences.values() if s.deadline is not None), default=None)

    @property
    def stats(self) -> InstanceStats:
        """Counts for metrics."""
        return InstanceStats(
            running=self._scheduler.num_running,
            waiting=self._scheduler.num_waiting,
            kv_pages=self._kv.pages_in_use,
            kv_blocks=self._kv.blocks_in_use,
            steps=self._steps,
            computed_tokens=self._computed_tokens,
            generated_tokens=self._generated_tokens,
            preemptions=self._scheduler.preemptions,
        )

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence. One that cannot be run ends at once, with the reason, in the next step's outputs.

        A sequence that is here already (delivery is at least once) is left as it is.
        """
        key = (sequence.request_id, sequence.attempt)
        if key in self._sequences:
            _log.warning("request %s, attempt %d, was delivered twice to instance %s", *key, self.id)
            return
        refusal = self._refusal(sequence)
        if refusal:
            self._ended.append(_end(sequence, FinishReason.ERROR, error=refusal))
        elif reason := self._finish_reason(sequence):
            # Resumed behind its last token: nothing is left to generate.
            self._ended.append(_end(sequence, reason))
        else:
            self._sequences[key] = sequence
            self._scheduler.add(sequence)

    def cancel(self, request_id: str) -> None:
        """Ends all attempts of a request that are here; nothing where there is none."""
        for sequence in [s for s in self._sequences.values() if s.request_id == request_id]:
            self._drop(sequence)
            self._ended.append(_end(sequence, FinishReason.CANCELLED))

    def step(self) -> list[SequenceOutput]:
        """Computes one step. Whatever it raises (NonFiniteLogits among others), the instance must then be closed."""
        self._expire()
        schedule = self._scheduler.schedule()
        for sequence, reason in schedule.impossible:
            del self._sequences[sequence.request_id, sequence.attempt]
            self._ended.append(_end(sequence, FinishReason.ERROR, error=reason))
        self.stalled = not schedule.chunks and not self._ended
        outputs, self._ended = self._ended, []
        if schedule.chunks:
            outputs += self._compute(schedule.chunks)
        return outputs

    def close(self, error: str) -> list[SequenceOutput]:
        """Ends every sequence with FinishReason.ERROR and gives all KV pages back."""
        outputs = self._ended + [_end(s, FinishReason.ERROR, error=error) for s in self._sequences.values()]
        self._ended = []
        self._sequences.clear()
        self._kv.close()
        return outputs

    def _compute(self, chunks: list[Chunk]) -> list[SequenceOutput]:
        token_ids: list[int] = []
        spans = []
        last_rows = []
        complete = []
        for chunk in chunks:
            sequence, start = chunk.sequence, chunk.sequence.computed_tokens
            token_ids += sequence.token_ids[start : start + chunk.length]
            spans.append(Span(sequence.blocks, start, chunk.length))
            if chunk.length == sequence.pending_tokens:
                last_rows.append(len(token_ids) - 1)
                complete.append(sequence)
        step = PagedStep(self._kv.tensors, self._kv.spec.block_tokens, spans)
        logits = self._model.compute(step, token_ids, last_rows)
        batch = prepare([Row(s.sampling, s.num_generated) for s in complete], logits.shape[-1], self._eos_ids)
        tokens = [choice.token for choice in sample(logits, batch).choices()]
        for chunk in chunks:
            chunk.sequence.computed_tokens += chunk.length
        self._steps += 1
        self._computed_tokens += len(token_ids)
        self._generated_tokens += len(tokens)
        return [self._append(sequence, token) for sequence, token in zip(complete, tokens, strict=True)]

    def _append(self, sequence: Sequence, token: int) -> SequenceOutput:
        offset = sequence.num_generated
        sequence.token_ids.append(token)
        sequence.num_generated += 1
        reason = self._finish_reason(sequence)
        if reason:
            self._drop(sequence)
        return SequenceOutput(sequence.request_id, sequence.attempt, [token], offset, reason)

    def _finish_reason(self, sequence: Sequence) -> FinishReason | None:
        """Why the sequence has ended, if it has."""
        if not sequence.sampling.ignore_eos and sequence.num_generated and sequence.token_ids[-1] in self._eos_ids:
            return FinishReason.STOP
        if sequence.num_generated >= sequence.sampling.max_tokens or len(sequence.token_ids) >= self._context_tokens:
            return FinishReason.LENGTH
        return None

    def _refusal(self, sequence: Sequence) -> str:
        """Why a sequence cannot be run; empty where it can."""
        prompt = len(sequence.token_ids) - sequence.num_generated
        if prompt < 1:
            return "the prompt is empty"
        if prompt >= self._context_tokens:
            return f"the prompt has {prompt} tokens; the context holds {self._context_tokens} with the answer"
        if not all(0 <= token < self._model.vocab_size for token in sequence.token_ids):
            return f"token ids must be at least 0 and below {self._model.vocab_size}"
        return ""

    def _expire(self) -> None:
        deadline = self.next_deadline
        now = self._clock()
        if deadline is None or now < deadline:
            return
        for sequence in list(self._sequences.values()):
            if sequence.deadline is not None and sequence.deadline <= now:
                self._drop(sequence)
                self._ended.append(_end(sequence, FinishReason.DEADLINE))

    def _drop(self, sequence: Sequence) -> None:
        self._scheduler.remove(sequence)
        del self._sequences[sequence.request_id, sequence.attempt]


def _end(sequence: Sequence, reason: FinishReason, error: str = "") -> SequenceOutput:
    return SequenceOutput(sequence.request_id, sequence.attempt, [], sequence.num_generated, reason, error)
