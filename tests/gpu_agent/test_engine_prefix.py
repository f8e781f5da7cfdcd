"""KV blocks that sequences share, keep and give back: any order of events, against a device that only notes tokens."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from services.gpu_agent.arena.pages import KvOwner, OutOfPages
from services.gpu_agent.engine.kv import KvCache
from services.gpu_agent.engine.kv_spec import KvSpec
from services.gpu_agent.engine.prefix import PrefixCache, extend_digests
from tests.gpu_agent.serving import arena

BLOCK = 2
SPEC = KvSpec(layers=1, kv_heads=1, head_dim=75, dtype=torch.float32, block_tokens=BLOCK)  # 1,200 bytes a block
PAGE_BYTES = 4096
SLOTS = 3  # blocks in a page, behind which a part of the page belongs to none
PAGES = 5
TOKENS = st.builds(  # beginnings are often the same
    lambda common, own: [0] * common + own, st.integers(0, 8), st.lists(st.integers(0, 1), min_size=1, max_size=3)
)


def digests_of(tokens: list[int]) -> list[bytes]:
    digests: list[bytes] = []
    extend_digests(digests, tokens, BLOCK)
    return digests


@given(st.lists(st.integers(0, 2), max_size=12), st.lists(st.integers(0, 2), max_size=12), st.integers(0, 12))
def test_digests_are_equal_where_all_tokens_up_to_there_are(one: list[int], other: list[int], cut: int) -> None:
    ones, others = digests_of(one), digests_of(other)
    assert len(ones) == len(one) // BLOCK
    for i in range(min(len(ones), len(others))):
        assert (ones[i] == others[i]) == (one[: (i + 1) * BLOCK] == other[: (i + 1) * BLOCK])
    grown = digests_of(one[:cut])
    extend_digests(grown, one, BLOCK)
    assert grown == ones


def test_digests_tell_tokens_from_others_of_the_same_bytes() -> None:
    assert digests_of([1, 0]) != digests_of([0, 1]) != digests_of([256, 0])
    assert digests_of([(1 << 31) + 5, 7]) != digests_of([5, 7])


def test_the_least_recently_used_is_forgotten_first() -> None:
    cache = PrefixCache()
    for block in (7, 8, 9):
        cache.add(block, bytes([block]))
        assert cache.release(block)
    cache.take(7)
    assert cache.release(7)
    assert [cache.forget(), cache.forget(), cache.forget()] == [8, 9, 7]
    assert cache.find([bytes([7])]) == []
    assert cache.num_idle == 0


def test_of_a_prefix_the_end_is_forgotten_first() -> None:
    """What is left of it is then still of use."""
    memory = arena(1, page_bytes=PAGE_BYTES)
    cache = KvCache(memory, "a", SPEC)
    cache.reserve(1)
    tokens = [1, 0, 0, 1, 1, 1]
    blocks = cache.try_alloc(3) or []
    cache.remember(blocks, digests_of(tokens))
    cache.free(blocks)
    assert cache.blocks_kept == 3
    new = cache.try_alloc(1) or []
    assert cache.share(digests_of(tokens)) == blocks[:2]
    assert new == blocks[2:]
    cache.close()
    memory.close()


@dataclass(eq=False)
class Running:
    """A sequence that holds blocks for all its tokens, `computed` of which are, or will be, in them."""

    tokens: list[int]
    blocks: list[int]
    computed: int
    remembered: int
    digests: list[bytes] = field(default_factory=list)


class Sharing(RuleBasedStateMachine):
    """A cache in use, with steps that end later than they begin, and somebody else who wants the same pages."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = arena(PAGES, page_bytes=PAGE_BYTES)
        self.cache = KvCache(self.memory, "a", SPEC, self.clear)
        self.running: list[Running] = []
        self.flights: deque[tuple[Running, list[int], int]] = deque()
        self.steps = 0
        self.reserved = 0
        self.elsewhere: list[int] = []
        # What a block holds: all tokens up to its end, as keys and values depend on all before them.
        self.content: dict[int, list[int]] = {}

    def clear(self, page: int) -> None:
        for block in range(page * SLOTS, (page + 1) * SLOTS):
            assert all(block not in sequence.blocks for sequence in self.running)
            self.content.pop(block, None)

    @initialize(pages=st.integers(0, 2))
    def begin_with(self, pages: int) -> None:
        self.reserve(pages)

    @rule(tokens=TOKENS, at_once=st.booleans())
    def begin(self, tokens: list[int], at_once: bool) -> None:
        digests = digests_of(tokens)
        shared = self.cache.share(digests[: (len(tokens) - 1) // BLOCK])
        for i, block in enumerate(shared):
            assert self.content[block] == tokens[: (i + 1) * BLOCK]
        missing = SPEC.blocks_for(len(tokens)) - len(shared)
        room = self.memory.free_pages + self.pages_held + self.pages_leaving
        room = room * SLOTS - self.cache.blocks_in_use
        blocks = self.cache.try_alloc(missing)
        assert (blocks is None) == (missing > room)
        if blocks is None:
            self.cache.free(shared)
            return
        assert len(blocks) == missing
        for block in blocks:
            self.content.pop(block, None)
        done = len(shared) * BLOCK
        self.running.append(Running(tokens, shared + blocks, done, len(shared), digests))
        if at_once:
            self.compute(self.running[-1], len(tokens) - done)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def launch(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.running))
        if sequence.computed == len(sequence.tokens):
            more = -(-len(sequence.tokens) // BLOCK) * BLOCK + 1 - len(sequence.tokens)
            got = self.cache.try_alloc(1)
            if got is None:
                return
            self.content.pop(got[0], None)
            sequence.blocks += got
            sequence.tokens = sequence.tokens + [1] * more
        self.compute(sequence, data.draw(st.integers(1, len(sequence.tokens) - sequence.computed)))

    def compute(self, sequence: Running, count: int) -> None:
        sequence.computed += count
        for i, block in enumerate(sequence.blocks[: SPEC.blocks_for(sequence.computed)]):
            self.content[block] = sequence.tokens[: min(sequence.computed, (i + 1) * BLOCK)]
        self.steps += 1
        self.cache.launched()
        self.flights.append((sequence, sequence.blocks, sequence.computed))

    @precondition(lambda self: self.flights)
    @rule()
    def collect(self) -> None:
        sequence, _, computed = self.flights.popleft()
        if sequence in self.running:
            extend_digests(sequence.digests, sequence.tokens, BLOCK)
            new = range(sequence.remembered, max(computed // BLOCK, sequence.remembered))
            self.cache.remember([sequence.blocks[i] for i in new], [sequence.digests[i] for i in new])
            sequence.remembered = new.stop
        self.cache.settled(self.steps - len(self.flights))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.running))
        self.running.remove(sequence)
        self.cache.free(sequence.blocks)

    @rule(pages=st.integers(0, PAGES))
    def reserve(self, pages: int) -> None:
        before = self.cache.pages_in_use
        if pages - before > self.memory.free_pages + self.pages_leaving:
            try:
                self.cache.reserve(pages)
            except OutOfPages:
                assert self.cache.pages_in_use == before
                return
            raise AssertionError("more pages than there are were reserved")
        self.cache.reserve(pages)
        self.reserved = pages

    @rule(count=st.integers(0, PAGES))
    def somebody_holds(self, count: int) -> None:
        self.memory.give_kv("somebody", self.elsewhere)
        self.elsewhere = self.memory.take_kv("somebody", min(count, self.memory.free_pages))
        for page in self.elsewhere:
            for block in range(page * SLOTS, (page + 1) * SLOTS):
                self.content.pop(block, None)

    @property
    def pages_held(self) -> int:
        return self.cache.pages_in_use

    @property
    def pages_leaving(self) -> int:
        return self.memory.usage().kv_by_instance.get("a", 0) - self.cache.pages_in_use

    def owned(self, block: int) -> bool:
        return self.memory._pages.owner(block // SLOTS) == KvOwner("a")

    @invariant()
    def pages_have_one_owner(self) -> None:
        self.memory.check()

    @invariant()
    def blocks_are_held_by_those_that_hold_them(self) -> None:
        holders = Counter(block for sequence in self.running for block in sequence.blocks)
        assert self.cache.blocks_in_use == len(holders)
        for sequence in self.running:
            assert len(set(sequence.blocks)) == len(sequence.blocks)
            # Nobody else has written to them: shared ones hold the same for all.
            for i, block in enumerate(sequence.blocks[: SPEC.blocks_for(sequence.computed)]):
                assert self.content[block] == sequence.tokens[: min(sequence.computed, (i + 1) * BLOCK)]
        assert all(self.owned(block) for block in holders)
        assert not any(self.cache._prefixes.is_idle(block) for block in holders)
        pages = {block // SLOTS for block in holders}
        assert self.cache.pages_in_use == max(len(pages), self.reserved)
        assert self.cache.blocks_kept <= self.cache.pages_in_use * SLOTS - len(holders)

    @invariant()
    def steps_under_way_touch_no_page_that_was_given_back(self) -> None:
        assert all(self.owned(block) for _, blocks, _ in self.flights for block in blocks)

    @invariant()
    def pages_do_not_stay_longer_than_steps(self) -> None:
        assert self.pages_leaving >= 0
        if not self.flights:
            assert self.pages_leaving == 0

    def teardown(self) -> None:
        self.flights.clear()
        self.cache.close()
        self.cache.close()
        self.memory.check()
        assert self.memory.free_pages == PAGES - len(self.elsewhere)
        self.memory.close()


TestSharing = Sharing.TestCase
TestSharing.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
