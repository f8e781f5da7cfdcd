"""Continuous batching: which sequences compute how many tokens in the next step. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from services.gpu_agent.engine.sequence import Sequence


class BlockPool(Protocol):
    """Where KV blocks come from."""

    def try_alloc(self, count: int) -> list[int] | None:
        """`count` blocks, or None with nothing taken."""
        ...

    def free(self, blocks: Iterable[int]) -> None:
        """Takes blocks back."""
        ...

    def limit_blocks(self) -> int:
        """Blocks that could be had if nobody else held any."""
        ...


@dataclass(frozen=True)
class Chunk:
    """The next `length` tokens of a sequence, from its computed_tokens on."""

    sequence: Sequence
    length: int


@dataclass(frozen=True)
class Schedule:
    """What to compute in one step, oldest sequence first, and whom to fail."""

    chunks: list[Chunk]
    impossible: list[tuple[Sequence, str]]
    """Sequences that no amount of waiting would help, already dropped, with the reason in numbers."""


class Scheduler:
    """First come, first served.

    Every running sequence that decodes gets its token in every step. What is left of the step's token budget goes to
    prefills, in chunks. A sequence starts when there are blocks for all its tokens and one more, so that blocks run
    short only while sequences grow; then the newest one is preempted: it gives its blocks back, waits in front of all
    others, and is computed anew from its tokens.
    """

    def __init__(self, pool: BlockPool, blocks_for: Callable[[int], int], max_batch: int, token_budget: int) -> None:
        """`blocks_for(tokens)` is the number of blocks that hold so many tokens; token_budget is per step."""
        if max_batch < 1 or token_budget < max_batch:
            raise ValueError(f"need 1 <= max_batch <= token_budget, not {max_batch} and {token_budget}")
        self.preemptions = 0
        self._pool = pool
        self._blocks_for = blocks_for
        self._max_batch = max_batch
        self._token_budget = token_budget
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []  # oldest first

    @property
    def num_waiting(self) -> int:
        """Sequences that hold no blocks."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences that hold blocks."""
        return len(self._running)

    def add(self, sequence: Sequence) -> None:
        """Appends a sequence to the queue."""
        self._waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Drops a sequence and takes its blocks back. ValueError where it is not here."""
        if sequence.blocks:
            self._running.remove(sequence)
            self._release(sequence)
        else:
            self._waiting.remove(sequence)

    def schedule(self) -> Schedule:
        """Decides one step. The caller computes the chunks and then raises each sequence's computed_tokens."""
        self._grow()
        impossible = self._admit()
        budget = self._token_budget - sum(1 for s in self._running if s.pending_tokens == 1)
        chunks = []
        for sequence in self._running:
            if sequence.pending_tokens == 1:
                chunks.append(Chunk(sequence, 1))
            elif budget > 0:
                length = min(budget, sequence.pending_tokens)
                budget -= length
                chunks.append(Chunk(sequence, length))
        return Schedule(chunks, impossible)

    def _grow(self) -> None:
        """Sees to it that each running sequence has blocks for all its tokens, at the cost of the newest ones."""
        for sequence in list(self._running):
            while sequence.blocks and (missing := self._blocks_for(len(sequence.token_ids)) - len(sequence.blocks)) > 0:
                blocks = self._pool.try_alloc(missing)
                if blocks is None:
                    # The newest may be this sequence itself, which then has no blocks and is left alone.
                    self._preempt(self._running[-1])
                else:
                    sequence.blocks.extend(blocks)

    def _admit(self) -> list[tuple[Sequence, str]]:
        impossible = []
        prefilling = sum(s.pending_tokens for s in self._running)
        while self._waiting and len(self._running) < self._max_batch and prefilling < self._token_budget:
            sequence = self._waiting[0]
            tokens = len(sequence.token_ids) + 1
            needed, limit = self._blocks_for(tokens), self._pool.limit_blocks()
            if needed > limit:
                self._waiting.popleft()
                reason = f"{tokens} tokens need {needed} KV blocks, but all free and KV pages hold only {limit}"
                impossible.append((sequence, reason))
                continue
            blocks = self._pool.try_alloc(needed)
            if blocks is None:
                break
            self._waiting.popleft()
            sequence.blocks = blocks
            self._running.append(sequence)
            prefilling += sequence.pending_tokens
        return impossible

    def _preempt(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._release(sequence)
        self._waiting.appendleft(sequence)
        self.preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        self._pool.free(sequence.blocks)
        sequence.blocks = []
        sequence.computed_tokens = 0
