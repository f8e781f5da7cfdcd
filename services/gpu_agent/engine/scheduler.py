"""Continuous batching: which sequences compute how many tokens in the next step. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Protocol

from services.gpu_agent.engine.prefix import extend_digests
from services.gpu_agent.engine.sequence import Sequence


class BlockPool(Protocol):
    """Where KV blocks come from."""

    @property
    def knows_prefixes(self) -> bool:
        """Whether `share` could find anything."""
        ...

    def share(self, digests: Many[bytes]) -> list[int]:
        """The blocks of the longest prefix that is there already, held from now on."""
        ...

    def try_alloc(self, count: int) -> list[int] | None:
        """`count` blocks, or None with nothing taken."""
        ...

    def free(self, blocks: Many[int]) -> None:
        """Takes blocks back, in order of position."""
        ...

    def limit_blocks(self) -> int:
        """Blocks that could be had if nobody else needed any."""
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
    others, and is computed anew from its tokens, but for the prefix whose blocks are still there.

    Steps may be scheduled before the tokens of the one before are known (Sequence.in_flight).
    """

    def __init__(
        self,
        pool: BlockPool,
        block_tokens: int,
        max_batch: int,
        token_budget: int,
        max_prefills: int | None = None,
        prefill_budget: int | None = None,
    ) -> None:
        """token_budget bounds the tokens of a step, prefill_budget (by default the same) those of a step in which
        nobody decodes and so nobody waits for the next token; max_prefills bounds the chunks of more than one token.
        """
        if max_batch < 1 or token_budget < max_batch:
            raise ValueError(f"need 1 <= max_batch <= token_budget, not {max_batch} and {token_budget}")
        self.preemptions = 0
        self.shared_tokens = 0
        """Tokens that were not computed, because a sequence before had the same beginning."""
        self._pool = pool
        self._block_tokens = block_tokens
        self._token_budget = token_budget
        self._prefill_budget = prefill_budget or token_budget
        self._max_prefills = max_prefills or max_batch
        self._slots = list(range(max_batch))[::-1]
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

    @property
    def needs_history(self) -> bool:
        """Whether a running sequence's last token must be known before the next is prepared."""
        return any(sequence.sampling.needs_history for sequence in self._running)

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
        active = self._active()
        decoding = sum(1 for s in active if s.pending_tokens == 1)
        budget = self._token_budget - decoding if decoding else self._prefill_budget
        prefills = self._max_prefills
        chunks = []
        for sequence in active:
            if sequence.pending_tokens == 1:
                chunks.append(Chunk(sequence, 1))
            elif budget > 0 and prefills > 0:
                length = min(budget, sequence.pending_tokens)
                budget -= length
                prefills -= 1
                chunks.append(Chunk(sequence, length))
        return Schedule(chunks, impossible)

    def _active(self) -> list[Sequence]:
        """The running sequences but those that the steps under way bring to their length."""
        return [s for s in self._running if s.wants_more or not s.in_flight]

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self._block_tokens)

    def _grow(self) -> None:
        """Sees to it that each sequence that goes on has blocks for all its tokens, at the cost of the newest ones."""
        for sequence in self._active():
            while sequence.blocks and (missing := self._blocks_for(sequence.num_tokens) - len(sequence.blocks)) > 0:
                blocks = self._pool.try_alloc(missing)
                if blocks is None:
                    # The newest may be this sequence itself, which then has no blocks and is left alone.
                    self._preempt(self._running[-1])
                else:
                    sequence.blocks.extend(blocks)

    def _admit(self) -> list[tuple[Sequence, str]]:
        impossible = []
        prefilling = sum(s.pending_tokens for s in self._running if s.pending_tokens > 1)
        while self._waiting and self._slots and prefilling < self._prefill_budget:
            sequence = self._waiting[0]
            if sequence.in_flight:
                break  # preempted a moment ago; it cannot be computed anew before all its tokens are known
            tokens = len(sequence.token_ids) + 1
            needed, limit = self._blocks_for(tokens), self._pool.limit_blocks()
            if needed > limit:
                self._waiting.popleft()
                reason = (
                    f"{tokens} tokens need {needed} KV blocks, but with nothing else running there would be {limit}; "
                    "evict or drain another model, or shorten the prompt"
                )
                impossible.append((sequence, reason))
                continue
            shared = self._share(sequence)
            blocks = self._pool.try_alloc(needed - len(shared))
            if blocks is None:
                self._pool.free(shared)
                break
            self._waiting.popleft()
            sequence.slot = self._slots.pop()
            sequence.blocks = shared + blocks
            sequence.remembered = len(shared)
            sequence.computed_tokens = len(shared) * self._block_tokens
            self.shared_tokens += sequence.computed_tokens
            self._running.append(sequence)
            prefilling += sequence.pending_tokens
        return impossible

    def _share(self, sequence: Sequence) -> list[int]:
        if not self._pool.knows_prefixes:
            return []
        extend_digests(sequence.digests, sequence.token_ids, self._block_tokens)
        # At least the last token is computed, for it tells the next one.
        return self._pool.share(sequence.digests[: (len(sequence.token_ids) - 1) // self._block_tokens])

    def _preempt(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._release(sequence)
        self._waiting.appendleft(sequence)
        self.preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        self._pool.free(sequence.blocks)
        self._slots.append(sequence.slot)
        sequence.slot = -1
        sequence.blocks = []
        sequence.computed_tokens = 0
