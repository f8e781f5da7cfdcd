"""An active model: its sequences, its KV cache, and its steps, begun by `launch` and ended by `collect`."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from services.gpu_agent.engine.arrival import Behind
from services.gpu_agent.engine.grammar import GrammarError
from services.gpu_agent.engine.kv import KvCache
from services.gpu_agent.engine.pace import PaceMeter
from services.gpu_agent.engine.sampling import Choice
from services.gpu_agent.engine.sampling_batch import Row, TokenHistory
from services.gpu_agent.engine.scheduler import Chunk, Scheduler
from services.gpu_agent.engine.sequence import FinishReason, Sequence, SequenceOutput, TokenLogprob
from services.gpu_agent.engine.step import Part, Pending, Runner

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
    shared_tokens: int
    """Prompt tokens that were not computed, because their keys and values were there already."""
    preemptions: int
    device_seconds: float
    """How long the device worked on its steps."""


@dataclass(frozen=True)
class _Flight:
    """A step under way."""

    pending: Pending
    chunks: list[tuple[Sequence, list[int], int]]  # who, its blocks then, tokens computed by the end of the step
    sampling: list[Sequence]  # those that get a token
    decodes: int  # of those, the ones for which nothing else is computed


class Instance:
    """Used by the engine's thread alone, but for `stats`, which any thread may read, and `meter.news`."""

    def __init__(
        self,
        instance_id: str,
        model_name: str,
        runner: Runner,
        kv: KvCache,
        *,
        vocab_size: int,
        eos_ids: Iterable[int],
        context_tokens: int,
        max_batch: int = 32,
        token_budget: int = 512,
        max_prefills: int | None = None,
        prefill_budget: int | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """context_tokens bounds prompt plus answer; for token_budget and prefill_budget see Scheduler.

        Each running sequence gets a token in each step, so the budget is never less than max_batch.
        """
        self.id = instance_id
        self.model_name = model_name
        self.device_seconds = 0.0
        """How long the device worked on its steps."""
        self.meter = PaceMeter(max_batch)
        """How long its sequences wait for their next tokens."""
        self._since: float | None = None  # when its last step ended, later by what others had since; None: it was idle
        self._expected = 0.0
        self._runner = runner
        self._kv = kv
        self._vocab_size = vocab_size
        self._eos_ids = frozenset(eos_ids)
        self._context_tokens = context_tokens
        self._clock = clock
        self._max_batch = max_batch
        self._scheduler = Scheduler(
            kv, kv.spec.block_tokens, max_batch, max(token_budget, max_batch), max_prefills, prefill_budget
        )
        self._sequences: dict[tuple[str, int], Sequence] = {}
        self._ended: list[SequenceOutput] = []  # between steps; told by the next `news`
        self._flights: deque[_Flight] = deque()
        self._steps = 0
        self._computed_tokens = 0
        self._generated_tokens = 0
        self._promise()

    @property
    def has_work(self) -> bool:
        """Whether there is anything to compute, to wait for or to tell."""
        return bool(self._sequences or self._ended or self._flights)

    @property
    def in_flight(self) -> int:
        """Steps under way."""
        return len(self._flights)

    @property
    def depth(self) -> int:
        """How many steps may be under way at once: one where the next cannot be prepared without its result."""
        return 1 if self._scheduler.needs_last_token or self.is_behind else self._runner.depth

    @property
    def is_behind(self) -> bool:
        """Whether a step under way waits for weights; then `advance` goes on with it."""
        return bool(self._flights) and _is_behind(self._flights[-1].pending)

    @property
    def runner_depth(self) -> int:
        """How many steps the device should have queued, of whichever instances, so that it never waits."""
        return self._runner.depth

    def step(self) -> list[SequenceOutput]:
        """Computes one step and returns the news: for those who need not overlap anything, and have all weights."""
        if self.launch() or self._flights:
            self.collect()
        return self.news()

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
            shared_tokens=self._scheduler.shared_tokens,
            preemptions=self._scheduler.preemptions,
            device_seconds=self.device_seconds,
        )

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence. One that cannot be run ends at once, with the reason, in the next `news`.

        A sequence that is here already (delivery is at least once) is left as it is.
        """
        key = (sequence.request_id, sequence.attempt)
        if key in self._sequences:
            _log.warning("request %s, attempt %d, was delivered twice to instance %s", *key, self.id)
            return
        try:
            self._admit(sequence)
        except ValueError as error:
            self._ended.append(_end(sequence, FinishReason.ERROR, error=str(error)))
            return
        if reason := self._finish_reason(sequence):
            # Resumed behind its last token: nothing is left to generate.
            self._ended.append(_end(sequence, reason))
            return
        self._sequences[key] = sequence
        self._scheduler.add(sequence)

    def cancel(self, request_id: str) -> None:
        """Ends all attempts of a request that are here; nothing where there is none."""
        for sequence in [s for s in self._sequences.values() if s.request_id == request_id]:
            self._drop(sequence)
            self._ended.append(_end(sequence, FinishReason.CANCELLED))

    def expect(self, sequences: float) -> None:
        """Says how many sequences the forecast has run at once, for which prewarming is to leave pages."""
        self._expected = sequences
        self._promise()

    def launch(self, others_wait: bool = False) -> bool:
        """Begins a step; False where there is nothing to compute now. For what it raises, see collect.

        others_wait: whether other instances have work for the device too.
        """
        self._expire()
        schedule = self._scheduler.schedule(others_wait)
        self._promise()
        for sequence, reason in schedule.impossible:
            del self._sequences[sequence.request_id, sequence.attempt]
            self._ended.append(_end(sequence, FinishReason.TOO_LARGE, error=reason))
        if not schedule.chunks:
            return False
        sampling = [chunk.sequence for chunk in schedule.chunks if chunk.length == chunk.sequence.pending_tokens]
        decodes = sum(1 for s in sampling if s.pending_tokens == 1 and (s.num_generated or s.in_flight))
        rows = [_row(s) for s in sampling]
        parts = [_part(chunk) for chunk in schedule.chunks]
        chunks = []
        for chunk in schedule.chunks:
            chunk.sequence.computed_tokens += chunk.length
            chunks.append((chunk.sequence, chunk.sequence.blocks, chunk.sequence.computed_tokens))
        for sequence in sampling:
            sequence.in_flight += 1
        self._steps += 1
        self._computed_tokens += sum(chunk.length for chunk in schedule.chunks)
        self._kv.launched()
        self._flights.append(_Flight(self._runner.launch(parts, rows), chunks, sampling, decodes))
        self._scheduler.launched(schedule)  # beside the device, for whom nobody need wait
        return True

    def advance(self) -> bool:
        """Goes on with a step that waits for weights, as far as they are there; True once it waits for none."""
        pending = self._flights[-1].pending
        return not isinstance(pending, Behind) or pending.advance()

    def collect(self) -> None:
        """Waits for the oldest step under way; what it chose is in the next `news`.

        Whatever it raises (NonFiniteLogits among others), the instance must then be closed.
        """
        flight = self._flights[0]
        result = flight.pending.result()
        self._flights.popleft()
        self.device_seconds += result.seconds
        self._measure(flight, result.seconds)
        # Blocks that chosen tokens fill, which are known only now; before any sequence ends and gives its blocks back.
        for sequence, blocks, computed in flight.chunks:
            if blocks is sequence.blocks:  # else it has ended or was preempted
                self._scheduler.remember(sequence, computed)
        for sequence, choice in zip(flight.sampling, result.choices, strict=True):
            sequence.in_flight -= 1
            if self._sequences.get((sequence.request_id, sequence.attempt)) is sequence:
                self._ended.append(self._append(sequence, choice))
        self._kv.settled(self._steps - len(self._flights))
        self._promise()
        if not self._sequences:
            self._since = None

    def gave_way(self, seconds: float) -> None:
        """Another instance had the device for so long."""
        if self._since is not None:
            self._since += seconds

    def news(self) -> list[SequenceOutput]:
        """What has happened since the last call, in order."""
        news, self._ended = self._ended, []
        return news

    def close(self, error: str) -> list[SequenceOutput]:
        """Ends every sequence with FinishReason.ERROR and gives all KV pages back. Waits for steps under way."""
        outputs = self.news() + [_end(s, FinishReason.ERROR, error=error) for s in self._sequences.values()]
        self._sequences.clear()
        while self._flights:
            pending = self._flights.popleft().pending
            if isinstance(pending, Behind) and not pending.launched:
                pending.abandon()
                continue
            try:
                pending.result()
            except Exception as failure:  # that step's, or the one's that the instance is closed for, whatever it was
                _log.warning("a step of %s that was under way failed too: %s", self.id, failure)
        self._kv.close()
        return outputs

    def _measure(self, flight: _Flight, seconds: float) -> None:
        now, since = time.monotonic(), self._since
        self._since = now
        self.meter.add(
            flight.decodes,
            seconds,
            None if since is None else max(seconds, now - since),
            prompts=flight.decodes < len(flight.chunks),
            begun=len(flight.sampling) - flight.decodes,
        )

    def _promise(self) -> None:
        self._kv.expect(self._scheduler.num_running, self._max_batch, self._expected)

    def _append(self, sequence: Sequence, choice: Choice) -> SequenceOutput:
        offset, token = sequence.num_generated, choice.token
        if sequence.matcher is not None:
            try:
                sequence.matcher.accept(token)
            except GrammarError as error:  # such as a grammar without a way out: that request's fault, nobody else's
                self._drop(sequence)
                return _end(sequence, FinishReason.ERROR, error=str(error))
        sequence.token_ids.append(token)
        sequence.num_generated += 1
        self._generated_tokens += 1
        if sequence.history is not None:
            sequence.history.append(token)
        reason = self._finish_reason(sequence)
        if reason:
            self._drop(sequence)
        said = choice.logprobs
        logprobs = [TokenLogprob(token, said.token, said.top)] if said is not None else []
        return SequenceOutput(sequence.request_id, sequence.attempt, [token], offset, reason, logprobs=logprobs)

    def _finish_reason(self, sequence: Sequence) -> FinishReason | None:
        """Why the sequence has ended, if it has."""
        sampling = sequence.sampling
        if sequence.num_generated:
            last = sequence.token_ids[-1]
            if last in sampling.stop_token_ids or (last in self._eos_ids and not sampling.ignore_eos):
                return FinishReason.STOP
        if sequence.matcher is not None and sequence.matcher.is_terminated:
            return FinishReason.STOP
        return FinishReason.LENGTH if len(sequence.token_ids) >= sequence.max_length else None

    def _admit(self, sequence: Sequence) -> None:
        """Prepares a sequence. ValueError where it cannot be run."""
        prompt = len(sequence.token_ids) - sequence.num_generated
        if prompt < 1:
            raise ValueError("the prompt is empty")
        if prompt >= self._context_tokens:
            raise ValueError(
                f"the prompt has {prompt} tokens; the context holds {self._context_tokens} with the answer"
            )
        if min(sequence.token_ids) < 0 or max(sequence.token_ids) >= self._vocab_size:
            raise ValueError(f"token ids must be at least 0 and below {self._vocab_size}")
        sampling = sequence.sampling
        sampling.check_vocabulary(self._vocab_size)
        sequence.max_length = min(prompt + sampling.max_tokens, self._context_tokens)
        if sampling.has_penalties:
            sequence.history = TokenHistory(sequence.token_ids[:prompt], sequence.token_ids[prompt:])
        if sampling.grammar is not None and sequence.matcher is None:
            raise ValueError("the request has a grammar that was not compiled")

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
        if not self._sequences and not self._flights:
            self._since = None


def _is_behind(pending: Pending) -> bool:
    return isinstance(pending, Behind) and not pending.launched


def _row(sequence: Sequence) -> Row:
    pending = sequence.slot if sequence.in_flight else None
    offset = sequence.num_generated + sequence.in_flight
    return Row(sequence.sampling, offset, sequence.history, sequence.matcher, pending)


def _part(chunk: Chunk) -> Part:
    sequence, start = chunk.sequence, chunk.sequence.computed_tokens
    end = start + chunk.length
    return Part(
        slot=sequence.slot,
        blocks=sequence.blocks,
        start=start,
        token_ids=sequence.token_ids[start:end],
        samples=end == sequence.num_tokens,
    )


def _end(sequence: Sequence, reason: FinishReason, error: str = "") -> SequenceOutput:
    return SequenceOutput(sequence.request_id, sequence.attempt, [], sequence.num_generated, reason, error)
