"""Continuous batching as pure decisions."""

from __future__ import annotations

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

    def share(self, digests: Iterable[bytes]) -> list[int]:
        return []

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
        ("huge", "13 tokens need 4 KV blocks, but all free and KV pages hold only 3")
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
