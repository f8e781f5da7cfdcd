"""What replicas are worth: the objective."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.placer import value as objective
from services.placer.chances import Chances
from services.placer.demand import expect
from services.placer.snapshot import Quantiles, Rules, State, Tier, WindowLoad
from services.placer.value import expected_value, stakes
from tests.placer.cluster import NOW, agent, model, replica, snapshot, window


def worth(spec, rank=0, node="n0", share=1.0):
    return stakes(snapshot([agent("g0"), agent("g1")], [spec]), [])[spec.name].worth(rank, node, share)


def value(models, there, agents=None, **more):
    seen = snapshot(agents or [agent("g0"), agent("g1")], models, there, **more)
    return expected_value(seen, seen.replicas)


@given(st.lists(st.floats(0, 1000), min_size=3, max_size=3), st.floats(0, 500), st.floats(0, 500), st.floats(0, 500))
def test_chances_fall_with_the_load(numbers: list[float], a: float, b: float, c: float) -> None:
    chances = Chances(Quantiles(*sorted(numbers)))
    low, middle, high = sorted((a, b, c))
    assert 0 <= chances.between(low, high) <= high - low + 1e-6
    parts = chances.between(low, middle) + chances.between(middle, high)
    assert parts == pytest.approx(chances.between(low, high), abs=1e-6)
    width = min(middle - low, high - middle)
    assert chances.between(low, low + width) >= chances.between(high, high + width) - 1e-6


def test_the_quantiles_are_the_chances() -> None:
    chances = Chances(Quantiles(10, 20, 40))
    for load, above in ((10, 0.5), (20, 0.1), (40, 0.01)):
        assert chances.between(load, load + 1e-6) / 1e-6 == pytest.approx(above, rel=1e-3)
    sure = Chances(Quantiles.exactly(9))
    assert [sure.between(low, low + 8) for low in (0, 8, 16)] == [8, 1, 0]


def test_a_replica_is_worth_what_waits_times_what_it_saves() -> None:
    sure = model("a", mean=9, capacity=8, cold_load_s=2.0)
    assert worth(sure, rank=0) == 8 * 2.0
    assert worth(sure, rank=1) == 1 * 2.0
    assert worth(sure, rank=2) == 0
    assert worth(replace(sure, priority=3.0)) == 3 * worth(sure)
    assert worth(sure, share=0.25) == pytest.approx(worth(sure) / 4)
    maybe = replace(sure, windows=(WindowLoad(NOW, NOW + 300, Quantiles(0, 0, 0), Quantiles(0, 8, 8)),))
    assert 0 < worth(maybe) < worth(sure) / 2


def test_with_a_known_service_time_those_wait_that_arrive_during_the_load() -> None:
    # One for certain; and of 4 in progress for 10 s each 0.4 arrive per second, for 2 s, who wait half of that.
    assert worth(model("a", mean=4, capacity=8, cold_load_s=2.0, service_s=10.0)) == pytest.approx((1 + 0.4) * 2.0)


def test_seconds_within_the_target_count_a_tenth() -> None:
    spec = model("a", mean=1, cold_load_s=4.0, ttft_p95_s=1.0)
    assert worth(spec) == pytest.approx(3.0 + 0.1)
    assert worth(spec, share=0.75) == pytest.approx(3.0)  # its rest is loaded within the target


def test_where_the_image_is_decides_what_is_saved() -> None:
    spec = model("a", mean=9, load_s={Tier.HOST: 1.0, Tier.DISK: 10.0, Tier.PEER: 0.1}, images={"n0": Tier.DISK})
    assert worth(spec) == 8 * 10
    assert worth(spec, rank=1) == pytest.approx(0.1)  # the first one's GPU is a neighbour by then
    assert worth(replace(spec, images={"n0": Tier.HOST})) == 8


def test_those_likely_to_be_woken_together_hurt_one_another() -> None:
    models = [model("a", mean=1), model("b", mean=1)]
    apart = value(models, [replica("a", "g0"), replica("b", "g1")])
    together = value(models, [replica("a", "g0"), replica("b", "g0")])
    assert (apart, together) == (2.0, 2.0 * (1 - Rules().interference))
    unlikely = [models[0], replace(models[1], windows=())]
    assert value(unlikely, [replica("a", "g0"), replica("b", "g0")]) == 1.0
    serving = [replica("a", "g0"), replica("b", "g0", State.ACTIVE, running=1)]
    assert value(models, serving) == 0.5
    big = [model("a", mean=1), model("b", mean=1, tp=2)]
    assert value(big, [replica("a", "g1"), replica("b", "g0+g1")]) == 1.0


def test_the_coolest_replica_is_counted_as_woken_first() -> None:
    models = [model("a", mean=9, capacity=8), model("b", mean=1)]
    there = [replica("a", "g0"), replica("a", "g1"), replica("b", "g0")]
    # The first of a, worth 8, lies alone on g1; the second, worth 1, and b lie together.
    assert value(models, there) == 8 + (1 + 1) * (1 - Rules().interference)


moments = st.tuples(
    st.sampled_from([0.0, 280.0, 320.0, 90_000.0]),  # seconds: windows come near, end, are forgotten
    st.sampled_from(["quiet", "busy", "no forecast"]),
    st.integers(0, 1),  # instances
    st.sampled_from([("n0",), ("n0", "n1")]),
    st.sampled_from([Rules(), Rules(lookahead_s=310.0, scale_up=0.5)]),
)


@given(st.lists(moments, min_size=8, max_size=20))
def test_what_is_at_stake_does_not_depend_on_when_it_was_asked_before(asked) -> None:
    quiet = model("a", cold_load_s=9.0, load_s={Tier.HOST: 1.0}, images={"n1": Tier.HOST})
    quiet = replace(quiet, windows=(window(NOW, 3, 9), window(NOW + 300, 5, 20)))
    models = {
        "quiet": quiet,
        "busy": replace(quiet, waiting=3, running=20),
        "no forecast": replace(quiet, windows=()),
    }

    def found(moment):
        later_s, which, serving, nodes, rules = moment
        there = replace(snapshot([agent("g0")], [models[which]], rules=rules), now_s=NOW + later_s)
        return objective.stakes_of(there, models[which], serving, nodes)

    kept = [found(moment) for moment in asked]
    for moment, answer in zip(asked, kept, strict=True):
        objective._known.clear()
        assert answer == found(moment)


def seen_at(now_s, windows):
    return expect(windows, now_s, Rules(), 30.0)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -1.0])
def test_windows_that_make_no_sense_are_left_out(wrong: float) -> None:
    good = window(NOW, 3, 5)
    bad = replace(good, mean=Quantiles(wrong, 4, 5))
    assert seen_at(NOW, (bad, good)).peak == good.peak
    assert not seen_at(NOW, (bad,)).known
    assert "no usable number" in seen_at(NOW, (bad,)).problem
    assert not seen_at(NOW, (replace(good, end_s=good.start_s),)).known


def test_quantiles_that_cross_and_peaks_below_the_mean_are_put_right() -> None:
    odd = WindowLoad(NOW, NOW + 300, Quantiles(5, 4, 3), Quantiles(1, 1, 1))
    assert seen_at(NOW, (odd,)).mean == Quantiles(5, 5, 5)
    assert seen_at(NOW, (odd,)).peak == Quantiles(5, 5, 5)


def test_after_its_last_window_a_forecast_goes_on_ever_wider_for_a_day() -> None:
    last = WindowLoad(NOW, NOW + 300, Quantiles(4, 5, 6), Quantiles(4, 6, 8))
    end = NOW + 300
    fresh, hour, hours = (seen_at(end + age, (last,)) for age in (0, 3600, 7200))
    assert fresh.peak == last.peak
    assert hour.peak == Quantiles(4, 8, 12)  # twice as far from the median
    assert hours.peak == Quantiles(4, 10, 16)
    assert hour.known
    assert "ended 3600 s ago" in hour.problem
    sure = seen_at(end + 3600, (window(NOW, 4),))
    assert 4 == sure.peak.p50 < sure.peak.p90 < sure.peak.p99
    gone = seen_at(end + 86_401, (last,))
    assert not gone.known
    assert "24 h ago" in gone.problem
