"""Links and disks are shared fairly, also while copies come and go."""

from __future__ import annotations

import functools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.clock import Clock
from simulator.links import Flow, Links, shares

RESOURCES = ("a", "b", "c", "d")
USES = st.dictionaries(st.sampled_from(RESOURCES), st.sampled_from([1.0, 2.0, 4.0]), min_size=1)


def links(**capacity: float) -> tuple[Clock, Links]:
    clock = Clock(0.0)
    return clock, Links(clock, capacity)


def begin(clock: Clock, link: Links, left: float, *uses: str, ended: list[tuple[str, float]], name: str = "") -> Flow:
    flow = Flow(dict.fromkeys(uses, 1.0), left, lambda: ended.append((name, clock.now)))
    link.begin(flow)
    return flow


def _begin(clock: Clock, link: Links, left: float, use: str, ended: list[tuple[str, float]]) -> None:
    begin(clock, link, left, use, ended=ended)


def run(clock: Clock) -> None:
    while clock.next_due < float("inf"):
        clock.step()


def test_two_copies_share_a_link_and_the_rest_of_one_has_it_alone() -> None:
    clock, link = links(pcie=10.0)
    ended: list[tuple[str, float]] = []
    begin(clock, link, 50.0, "pcie", ended=ended, name="small")
    begin(clock, link, 100.0, "pcie", ended=ended, name="large")
    run(clock)
    assert [name for name, _ in ended] == ["small", "large"]
    assert [at for _, at in ended] == pytest.approx([10.0, 15.0])


def test_a_copy_bound_elsewhere_leaves_its_share_to_the_others() -> None:
    clock, link = links(pcie0=55.0, pcie1=55.0, node=60.0, disk=2.0)
    ended: list[tuple[str, float]] = []
    slow = begin(clock, link, 200.0, "pcie0", "node", "disk", ended=ended)
    fast = begin(clock, link, 200.0, "pcie1", "node", ended=ended)
    assert [slow.rate, fast.rate] == pytest.approx([2.0, 55.0])


def test_a_copy_that_is_cut_short_tells_what_it_lacks() -> None:
    clock, link = links(pcie=10.0)
    ended: list[tuple[str, float]] = []
    first = begin(clock, link, 100.0, "pcie", ended=ended)
    second = begin(clock, link, 100.0, "pcie", ended=ended, name="second")
    clock.at(4.0, lambda: lefts.append(link.end(first)))
    lefts: list[float] = []
    run(clock)
    assert lefts == pytest.approx([80.0])
    assert [name for name, _ in ended] == ["second"]
    assert ended[0][1] == pytest.approx(12.0)
    assert link.left(second) == 0


@given(st.lists(USES, min_size=1, max_size=8), st.lists(st.floats(0.5, 100), min_size=4, max_size=4))
def test_shares_are_max_min_fair(uses: list[dict[str, float]], sizes: list[float]) -> None:
    capacity = dict(zip(RESOURCES, sizes, strict=True))
    rates = shares(list(uses), capacity)
    used = {name: sum(rate * use.get(name, 0.0) for rate, use in zip(rates, uses, strict=True)) for name in RESOURCES}
    for name, amount in used.items():
        assert amount <= capacity[name] * (1 + 1e-9)
    for rate, use in zip(rates, uses, strict=True):
        # Nobody's rate can grow but at the cost of one that has no more: some resource of its own is full, and of those
        # who use that, none has more.
        assert any(
            used[name] >= capacity[name] * (1 - 1e-9)
            and all(other <= rate * (1 + 1e-9) for other, of in zip(rates, uses, strict=True) if name in of)
            for name in use
        )


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(1, 50)), min_size=1, max_size=8))
def test_all_bytes_are_copied_as_fast_as_the_link_allows(copies: list[tuple[float, float]]) -> None:
    clock, link = links(pcie=5.0)
    ended: list[tuple[str, float]] = []
    for start, size in copies:
        clock.at(start, functools.partial(_begin, clock, link, size, "pcie", ended=ended))
    run(clock)
    free_at = 0.0  # a link that is shared is busy as long as one that serves in order of arrival
    for start, size in sorted(copies):
        free_at = max(free_at, start) + size / 5.0
    assert len(ended) == len(copies)
    assert max(at for _, at in ended) == pytest.approx(free_at, rel=1e-6, abs=1e-3)
