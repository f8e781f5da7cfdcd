"""What a forecast says at a moment does not depend on when it was asked before."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.placer import demand
from services.placer.snapshot import Quantiles, Rules, WindowLoad
from tests.placer.cluster import NOW, model

times = st.integers(-3, 12).map(float)
loads = st.builds(Quantiles.exactly, st.integers(0, 5).map(float))
forecasts = st.lists(
    st.builds(
        lambda start, length, load: WindowLoad(start, start + length, load, load), times, st.integers(1, 4), loads
    ),
    max_size=6,
)


def forget() -> None:
    demand._same.clear()
    demand._equal.cache_clear()


@given(forecasts, st.lists(st.tuples(times, st.sampled_from([0.5, 1.0, 3.0])), min_size=2, max_size=12))
def test_answers_that_are_kept_are_those_that_would_be_found(
    windows: list[WindowLoad], asked: list[tuple[float, float]]
) -> None:
    forget()
    kept = [demand.expect(windows, now_s, Rules(), lookahead_s) for now_s, lookahead_s in asked]
    for (now_s, lookahead_s), answer in zip(asked, kept, strict=True):
        forget()
        assert answer == demand.expect(windows, now_s, Rules(), lookahead_s)


@given(st.integers(0, 40), st.integers(1, 8), st.integers(0, 3))
def test_nobody_waits_for_more_instances_than_there_are_requests(waiting: int, capacity: int, active: int) -> None:
    asked = model("m", waiting=waiting, capacity=capacity)
    assert demand.demand(asked, NOW, active, Rules()).wake <= waiting
