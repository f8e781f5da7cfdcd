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

    def remember(self, blocks: Many[int], digests: Many[bytes]) -> None:
        """Says what blocks that a sequence holds contain."""
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


class _Step:
    """A step being decided: its chunks, and how much more it takes."""

    def __init__(self, budget: int, prefills: int) -> None:
        self.chunks: list[Chunk] = []
        self._budget = budget
        self._prefills = prefills

    @property
    def has_room(self) -> bool:
        """Whether a sequence that does not decode would get any tokens."""
        return self._budget > 0 and self._prefills > 0

    def decode(self, sequence: Sequence) -> None:
        """Adds a sequence's one token, for which the budget was left out."""
        self.chunks.append(Chunk(sequence, 1))

    def prefill(self, sequence: Sequence) -> None:
        """Adds as many of a sequence's tokens as there is room for, at least one."""
        length = min(self._budget, sequence.pending_tokens)
        self._budget -= length
        self._prefills -= length > 1
        self.chunks.append(Chunk(sequence, length))


@dataclass(frozen=True)
class Schedule:
    """What to compute in one step, oldest sequence first, and whom to fail.

    A chunk may attend to blocks that chunks before it in the same step fill.
    """

    chunks: list[Chunk]
    impossible: list[tuple[Sequence, str]]
    """Sequences that no amount of waiting would help, already dropped, with the reason in numbers."""


class Scheduler:
    """First come, first served.

    Every running sequence that decodes gets its token in every step. What is left of the step's token budget goes to
    prefills, in chunks. A sequence starts when there are blocks for all its tokens and one more, so that blocks run
    short only while sequences grow; then the newest one is preempted: it gives its blocks back, waits in front of all
    others, and is computed anew from its tokens, but for the prefix whose blocks are still there. A prefix that one
    sequence computes in a step is there for those that start in the same step: a prompt that comes several times
    at once is computed once.

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
        """token_budget bounds the tokens of a step, prefill_budget (by default the same) those of a step for whose end
        nobody waits to get a next token; max_prefills bounds the chunks of more than one token.
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
    def needs_last_token(self) -> bool:
        """Whether a running sequence's last token must be known before the next is prepared."""
        return any(sequence.sampling.needs_last_token for sequence in self._running)

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

    def schedule(self, others_wait: bool = False) -> Schedule:
        """Decides one step. The caller computes the chunks and then raises each sequence's computed_tokens.

        others_wait: whether other instances share the device, whose next tokens come behind this step.
        """
        self._grow()
        active = self._active()
        decoding = sum(1 for s in active if s.pending_tokens == 1)
        budget = self._token_budget - decoding if decoding or others_wait else self._prefill_budget
        step = _Step(budget, self._max_prefills)
        for sequence in active:
            if sequence.pending_tokens == 1:
                step.decode(sequence)
            elif step.has_room:
                step.prefill(sequence)
        return Schedule(step.chunks, self._admit(step))

    def launched(self, schedule: Schedule) -> None:
        """The step was begun, and computed_tokens raised: prompts of later steps may share what it computes."""
        for chunk in schedule.chunks:
            sequence = chunk.sequence
            self.remember(sequence, min(sequence.computed_tokens, len(sequence.token_ids)))

    def remember(self, sequence: Sequence, computed: int) -> None:
        """Has full blocks among the first `computed` tokens, all known, found by later prompts that begin alike."""
        full = computed // self._block_tokens
        if full <= sequence.remembered:
            return  # most steps fill no block, and must not look at all tokens again
        extend_digests(sequence.digests, sequence.token_ids[: full * self._block_tokens], self._block_tokens)
        new = slice(sequence.remembered, full)
        self._pool.remember(sequence.blocks[new], sequence.digests[new])
        sequence.remembered = full

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

    def _admit(self, step: _Step) -> list[tuple[Sequence, str]]:
        """Starts sequences that the step has room for."""
        impossible = []
        told = 0  # chunks of the step whose blocks those behind them may share; of the last, `launched` tells
        while self._waiting and self._slots and step.has_room:
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
            for chunk in step.chunks[told:]:
                self._remember_chunk(chunk)
            told = len(step.chunks)
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
            step.prefill(sequence)
        return impossible

    def _share(self, sequence: Sequence) -> list[int]:
        if not self._pool.knows_prefixes:
            return []
        extend_digests(sequence.digests, sequence.token_ids, self._block_tokens)
        # At least the last token is computed, for it tells the next one.
        return self._pool.share(sequence.digests[: (len(sequence.token_ids) - 1) // self._block_tokens])

    def _remember_chunk(self, chunk: Chunk) -> None:
        """Of a step that is about to be computed: whoever shares its blocks is computed with it, or behind it."""
        sequence = chunk.sequence
        self.remember(sequence, min(sequence.computed_tokens + chunk.length, len(sequence.token_ids)))

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
