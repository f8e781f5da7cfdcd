"""Continuous batching as pure decisions."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.gpu_agent.engine.sampling_params import SamplingParams
from services.gpu_agent.engine.scheduler import Schedule, Scheduler
from services.gpu_agent.engine.sequence import Sequence

BLOCK = 4


class Blocks:
    """A pool of numbered blocks; `elsewhere` of them are somebody else's for now."""

    def __init__(self, total: int, elsewhere: int = 0) -> None:
        self.total = total
        self.unused = set(range(total - elsewhere))

    knows_prefixes = False

    def share(self, digests: Iterable[bytes]) -> list[int]:
        return []

    def remember(self, blocks: Iterable[int], digests: Iterable[bytes]) -> None:
        pass

    def try_alloc(self, count: int) -> list[int] | None:
        return [self.unused.pop() for _ in range(count)] if count <= len(self.unused) else None

    def free(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            assert block not in self.unused
            self.unused.add(block)

    def limit_blocks(self) -> int:
        return self.total


def blocks_for(tokens: int) -> int:
    return -(-tokens // BLOCK)


def scheduler(pool: Blocks, max_batch: int = 8, token_budget: int = 32) -> Scheduler:
    return Scheduler(pool, BLOCK, max_batch, token_budget)


def sequence(name: str, prompt: int, max_tokens: int = 5) -> Sequence:
    return Sequence(name, 0, [1] * prompt, SamplingParams(max_tokens))


def carry_out(scheduler: Scheduler, schedule: Schedule) -> list[str]:
    """Computes the chunks as an instance would, and returns who got a token."""
    got = []
    for chunk in schedule.chunks:
        s = chunk.sequence
        assert chunk.length >= 1
        assert len(s.blocks) >= blocks_for(s.computed_tokens + chunk.length)
        s.computed_tokens += chunk.length
        if s.pending_tokens == 0:
            s.token_ids.append(1)
            s.num_generated += 1
            got.append(s.request_id)
            if s.num_generated == s.sampling.max_tokens:
                scheduler.remove(s)
    return got


def lengths(schedule: Schedule) -> dict[str, int]:
    return {chunk.sequence.request_id: chunk.length for chunk in schedule.chunks}


def test_prefill_fills_what_decodes_leave_of_the_budget() -> None:
    s = scheduler(Blocks(100), token_budget=10, max_batch=4)
    s.add(sequence("a", 3))
    s.add(sequence("b", 25))
    steps = []
    for _ in range(4):
        plan = s.schedule()
        steps.append(lengths(plan))
        carry_out(s, plan)
    assert steps == [{"a": 3, "b": 7}, {"a": 1, "b": 9}, {"a": 1, "b": 9}, {"a": 1, "b": 1}]


def test_prompts_come_in_larger_chunks_where_nobody_waits_for_a_token() -> None:
    s = Scheduler(Blocks(100), BLOCK, max_batch=4, token_budget=10, prefill_budget=25)
    s.add(sequence("a", 70))
    chunks = []
    for others_wait in (False, True, False):
        plan = s.schedule(others_wait)
        chunks.append(lengths(plan))
        carry_out(s, plan)
    s.add(sequence("b", 40))
    for _ in range(2):
        plan = s.schedule()
        chunks.append(lengths(plan))
        carry_out(s, plan)
    assert chunks == [{"a": 25}, {"a": 10}, {"a": 25}, {"a": 10, "b": 15}, {"a": 1, "b": 9}]


def test_first_come_first_served_without_overtaking() -> None:
    pool = Blocks(10, elsewhere=6)
    s = scheduler(pool)
    s.add(sequence("large", 20))
    s.add(sequence("small", 2))
    assert lengths(s.schedule()) == {}
    pool.unused.update(range(4, 10))
    assert lengths(s.schedule()) == {"large": 20, "small": 2}


def test_max_batch_holds() -> None:
    s = scheduler(Blocks(100), max_batch=2)
    for name in "abc":
        s.add(sequence(name, 2, max_tokens=2))
    assert carry_out(s, s.schedule()) == ["a", "b"]
    assert carry_out(s, s.schedule()) == ["a", "b"]
    assert carry_out(s, s.schedule()) == ["c"]


def test_the_newest_is_preempted_and_then_the_first_to_go_on() -> None:
    pool = Blocks(4)
    s = scheduler(pool, token_budget=64)
    s.add(sequence("a", 7, max_tokens=9))
    s.add(sequence("b", 7, max_tokens=9))
    s.add(sequence("c", 1, max_tokens=1))
    assert carry_out(s, s.schedule()) == ["a", "b"]  # 2 blocks each; none is left for c
    assert carry_out(s, s.schedule()) == ["a", "b"]
    assert s.preemptions == 0
    # Now a needs a third block, so b gives its two back. Then b is next and waits for three, and c does not overtake.
    assert [carry_out(s, s.schedule()) for _ in range(7)] == [["a"]] * 7
    assert s.preemptions == 1
    assert carry_out(s, s.schedule()) == ["b", "c"]


def test_a_lone_sequence_gives_way_when_others_hold_the_memory() -> None:
    """Two instances with one sequence each must not wait for one another's blocks for ever."""
    pool = Blocks(4, elsewhere=2)
    s = scheduler(pool)
    s.add(sequence("a", 7, max_tokens=4))
    carry_out(s, s.schedule())
    carry_out(s, s.schedule())
    assert lengths(s.schedule()) == {}
    assert (s.num_running, s.num_waiting) == (0, 1)
    assert len(pool.unused) == 2
    pool.unused.update((2, 3))
    assert lengths(s.schedule()) == {"a": 9}


def test_what_can_never_fit_fails_with_the_numbers() -> None:
    pool = Blocks(3, elsewhere=3)
    s = scheduler(pool)
    s.add(sequence("huge", 12))
    s.add(sequence("fits", 11))
    schedule = s.schedule()
    assert [(q.request_id, reason) for q, reason in schedule.impossible] == [
        (
            "huge",
            "13 tokens need 4 KV blocks, but with nothing else running there would be 3; "
            "evict or drain another model, or shorten the prompt",
        )
    ]
    assert (s.num_running, s.num_waiting) == (0, 1)
    pool.unused.update(range(3))
    assert lengths(s.schedule()) == {"fits": 11}


def test_what_outgrows_all_memory_fails() -> None:
    pool = Blocks(3)
    s = scheduler(pool)
    s.add(sequence("a", 8, max_tokens=99))
    plan = s.schedule()
    while not plan.impossible:
        carry_out(s, plan)
        plan = s.schedule()
    assert plan.impossible[0][0].num_generated == 5  # 13 tokens
    assert len(pool.unused) == 3


@pytest.mark.parametrize(("max_batch", "token_budget"), [(0, 5), (6, 5)])
def test_nonsense_is_refused(max_batch: int, token_budget: int) -> None:
    with pytest.raises(ValueError, match="max_batch"):
        scheduler(Blocks(1), max_batch, token_budget)


@settings(max_examples=200, deadline=None)
@given(
    requests=st.lists(st.tuples(st.integers(0, 12), st.integers(1, 40), st.integers(1, 20)), min_size=1, max_size=12),
    total=st.integers(1, 24),
    max_batch=st.integers(1, 6),
    extra_budget=st.integers(0, 20),
    cancelled=st.sets(st.integers(0, 11)),
)
def test_everything_ends_and_bounds_hold(
    requests: list[tuple[int, int, int]], total: int, max_batch: int, extra_budget: int, cancelled: set[int]
) -> None:
    """requests: (step of arrival, prompt, max_tokens)."""
    pool = Blocks(total)
    budget = max_batch + extra_budget
    s = scheduler(pool, max_batch, budget)
    waiting = {i: sequence(str(i), prompt, tokens) for i, (_, prompt, tokens) in enumerate(requests)}
    everyone = dict(waiting)
    ended: set[str] = set()
    for step in range(3000):
        for i in [i for i in waiting if requests[i][0] <= step]:
            s.add(waiting.pop(i))
        for i in list(cancelled):
            if i in everyone and i not in waiting and str(i) not in ended and step > requests[i][0] + 3:
                s.remove(everyone[i])
                ended.add(str(i))
                cancelled = cancelled - {i}
        plan = s.schedule()
        assert sum(chunk.length for chunk in plan.chunks) <= budget
        assert len(plan.chunks) <= s.num_running <= max_batch
        held = [block for q in everyone.values() for block in q.blocks]
        assert len(set(held)) == len(held)
        assert pool.unused == set(range(total)) - set(held)
        for q, _ in plan.impossible:
            assert blocks_for(len(q.token_ids) + 1) > total
            ended.add(q.request_id)
        decoding = {q.request_id for q in everyone.values() if q.blocks and q.pending_tokens == 1}
        assert decoding <= lengths(plan).keys()
        if not plan.chunks and not plan.impossible:
            # Only preemption may cost a step.
            assert s.num_waiting == 0 or s.preemptions > 0
        carry_out(s, plan)
        ended |= {q.request_id for q in everyone.values() if q.num_generated == q.sampling.max_tokens}
        if len(ended) == len(requests):
            assert (s.num_running, s.num_waiting) == (0, 0)
            assert len(pool.unused) == total
            return
    raise AssertionError("some sequence never ended")


def test_what_ends_with_the_steps_under_way_takes_no_more_blocks() -> None:
    """A sequence's last token is not computed, so it needs no room; the newer one is not preempted for it."""
    pool = Blocks(4)
    s = scheduler(pool, token_budget=64)
    first, second = sequence("a", 7, max_tokens=2), sequence("b", 7, max_tokens=2)
    for q in (first, second):
        q.max_length = 9
        s.add(q)
    for _ in range(2):
        plan = s.schedule()
        assert lengths(plan).keys() == {"a", "b"}
        for chunk in plan.chunks:
            chunk.sequence.computed_tokens += chunk.length
            chunk.sequence.in_flight += 1
    assert lengths(s.schedule()) == {}
    assert s.preemptions == 0
    assert not pool.unused


class Device:
    """Computes what is scheduled, and tells of it a step late."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.flights: deque[list[Sequence]] = deque()
        self.ended: set[str] = set()

    def launch(self, schedule: Schedule) -> None:
        for chunk in schedule.chunks:
            s = chunk.sequence
            assert len(s.blocks) >= blocks_for(s.computed_tokens + chunk.length)
            # What decodes may go on before its last token is known; prompts are known.
            assert chunk.length == 1 or s.computed_tokens + chunk.length <= len(s.token_ids)
        self.flights.append([c.sequence for c in schedule.chunks if c.length == c.sequence.pending_tokens])
        for chunk in schedule.chunks:
            chunk.sequence.computed_tokens += chunk.length
        for s in self.flights[-1]:
            s.in_flight += 1

    def collect(self, stops: set[tuple[str, int]]) -> None:
        """`stops`: (who, after how many tokens)."""
        for s in self.flights.popleft():
            s.in_flight -= 1
            if s.request_id in self.ended:
                continue
            s.token_ids.append(1)
            s.num_generated += 1
            if len(s.token_ids) == s.max_length or (s.request_id, s.num_generated) in stops:
                self.end(s)

    def end(self, s: Sequence) -> None:
        self.ended.add(s.request_id)
        self.scheduler.remove(s)


@settings(max_examples=200, deadline=None)
@given(
    requests=st.lists(st.tuples(st.integers(0, 12), st.integers(1, 40), st.integers(1, 20)), min_size=1, max_size=12),
    total=st.integers(1, 24),
    max_batch=st.integers(1, 6),
    extra_budget=st.integers(0, 20),
    max_prefills=st.integers(1, 3),
    cancelled=st.dictionaries(st.integers(0, 11), st.integers(0, 9)),
    stops=st.sets(st.tuples(st.integers(0, 11).map(str), st.integers(1, 9))),
    elsewhere=st.dictionaries(st.integers(0, 40), st.integers(0, 24)),
)
def test_steps_before_the_last_results_are_known(
    requests: list[tuple[int, int, int]],
    total: int,
    max_batch: int,
    extra_budget: int,
    max_prefills: int,
    cancelled: dict[int, int],
    stops: set[tuple[str, int]],
    elsewhere: dict[int, int],
) -> None:
    """requests: (step of arrival, prompt, max_tokens); cancelled: who, how long after; elsewhere: blocks that others
    hold from a step on."""
    pool = Blocks(total)
    budget = max_batch + extra_budget
    s = Scheduler(pool, BLOCK, max_batch, budget, max_prefills)
    device = Device(s)
    everyone = [sequence(str(i), prompt, tokens) for i, (_, prompt, tokens) in enumerate(requests)]
    for q in everyone:
        q.max_length = len(q.token_ids) + q.sampling.max_tokens
    arrived: set[int] = set()
    taken: set[int] = set()
    slots: dict[str, int] = {}
    for step in range(4000):
        if step > 40:
            elsewhere[step] = 0
        if step in elsewhere:
            pool.unused |= taken
            taken = {pool.unused.pop() for _ in range(min(elsewhere[step], len(pool.unused)))}
        for i, (arrival, _, _) in enumerate(requests):
            if i not in arrived and arrival <= step:
                arrived.add(i)
                s.add(everyone[i])
            if i in arrived and str(i) not in device.ended and arrival + cancelled.get(i, 1 << 30) <= step:
                device.end(everyone[i])
        plan = s.schedule()
        for q, _ in plan.impossible:
            assert blocks_for(len(q.token_ids) + 1) > total
            device.ended.add(q.request_id)
        assert sum(chunk.length for chunk in plan.chunks) <= budget
        assert sum(chunk.length > 1 for chunk in plan.chunks) <= max_prefills
        running = [q for q in everyone if q.blocks]
        assert len(running) == s.num_running <= max_batch
        assert len({q.slot for q in running}) == len(running)
        assert all(0 <= q.slot < max_batch for q in running)
        assert all(q.slot == slots.get(q.request_id, q.slot) for q in running)
        slots = {q.request_id: q.slot for q in running}
        held = [block for q in everyone for block in q.blocks]
        assert len(set(held)) == len(held)
        assert pool.unused == set(range(total)) - set(held) - taken
        assert all(q.num_tokens <= q.max_length for q in everyone)
        planned = lengths(plan)
        for q in running:
            assert q.pending_tokens != 1 or q.request_id in planned or not q.wants_more
        if plan.chunks:
            device.launch(plan)
        if len(device.flights) == 2 or (device.flights and not plan.chunks):
            device.collect(stops)
        if len(device.ended) == len(requests) and not device.flights:
            assert (s.num_running, s.num_waiting) == (0, 0)
            assert len(pool.unused | taken) == total
            return
    raise AssertionError("some sequence never ended")


def test_a_preempted_sequence_waits_for_its_tokens() -> None:
    pool = Blocks(4, elsewhere=2)
    s = scheduler(pool)
    q = sequence("a", 7, max_tokens=20)
    s.add(q)
    s.schedule()
    q.computed_tokens, q.in_flight = 7, 1
    assert lengths(s.schedule()) == {"a": 1}
    q.computed_tokens, q.in_flight = 8, 2
    assert lengths(s.schedule()) == {}  # a third block is not to be had
    assert (q.computed_tokens, q.blocks, q.slot, s.preemptions) == (0, [], -1, 1)
    pool.unused.update((2, 3))
    assert lengths(s.schedule()) == {}
    q.token_ids += [1, 1]
    q.in_flight = 0
    assert lengths(s.schedule()) == {"a": 9}
