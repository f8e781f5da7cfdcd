"""Calibration follows what came: coverage is as it should be however wrong the spreads were, and survives restarts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from services.forecaster.adaptive import adapted, follow, unmoved, usual_traffic
from services.forecaster.database import Database
from services.forecaster.following import Following
from services.forecaster.past import PastForecasts
from services.forecaster.predictors import MEAN_LOAD, PEAK_LOAD, QUANTITIES, Floats

MODELS = ("a", "b", "c", *(f"other-{number}" for number in range(8)))
LAST = 5000
HORIZON = 12


def roll(spreads: tuple[float, float], windows: int, jump: float = 1.0) -> tuple[Floats, Floats]:
    """Normal noise around 10, forecast one window ahead with `spreads` of a hundred series: which windows p90 and p99
    covered, shape (windows, 100, 2), and the factors. The noise is `jump` times as large in the second half."""
    rng = np.random.default_rng(6)
    forecast = np.tile([10.0, 10 + spreads[0], 10 + spreads[1]], (100, 1))
    logs, covered = unmoved(100), []
    for window in range(windows):
        actual = 10 + rng.normal(0, 1 if 2 * window < windows else jump, 100)
        made = adapted(forecast, logs)
        covered.append(actual[:, None] <= made[:, 1:])
        logs = follow(logs, made, actual, np.full(100, 10.0))
    return np.array(covered), np.exp(logs)


@pytest.mark.parametrize("wrong", [0.75, 1.0, 1.35])
def test_spreads_that_were_wrong_when_fitted_are_put_right(wrong: float) -> None:
    covered, factors = roll((1.2816 * wrong, 2.3263 * wrong), 800)
    newest = covered[-400:].mean(axis=(0, 1))
    assert abs(newest[0] - 0.9) < 0.02  # forgetting draws it a little towards the wrong spreads
    assert newest[1] > 0.987
    assert abs(covered[-300:].mean(axis=0)[:, 0] - 0.9).max() < 0.06  # each series by itself
    assert np.median(factors[:, 0]) == pytest.approx(1 / wrong, rel=0.12)


@pytest.mark.parametrize("jump", [1.3, 1 / 1.3])
def test_what_strays_more_or_less_than_before_is_covered_as_ever_half_a_day_later(jump: float) -> None:
    covered, _ = roll((1.2816, 2.3263), 800, jump)
    at_once, later, newest = (covered[some].mean(axis=(0, 1)) for some in np.s_[400:410, 472:544, -200:])
    assert abs(at_once[0] - 0.9) > 0.03
    assert abs(later[0] - 0.9) < 0.015
    assert newest[1] > 0.985


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(float, (20, 3), elements=st.one_of(st.just(np.nan), st.floats(0, 1e9))),
    st.lists(st.floats(0, 1e9), min_size=3, max_size=3),
)
def test_factors_are_bounded_and_quantiles_never_cross(came: np.ndarray, one: list[float]) -> None:
    forecast = np.tile(np.sort(one), (3, 1))
    logs = unmoved(3)
    for actual in np.repeat(came, 20, axis=0):
        logs = follow(logs, adapted(forecast, logs), actual, np.ones(3))
    assert (np.exp(np.abs(logs)) <= 1.5 + 1e-9).all()
    made = adapted(forecast, logs)
    assert (np.diff(made, axis=1) >= 0).all()
    np.testing.assert_array_equal(made[:, 0], forecast[:, 0])


def test_nothing_is_learnt_where_nothing_is_known_or_could_be_missed() -> None:
    forecast = np.array([[np.nan] * 3, [9.0, 10, 11], [0.1, 0.5, 0.6], [0.1, 0.2, 0.3]])
    came, usual = np.array([50.0, np.nan, 0.0, 0.0]), np.array([100.0, 100, 100, 0])
    np.testing.assert_array_equal(follow(unmoved(4), forecast, came, usual), unmoved(4))


def test_a_burst_in_quiet_hours_is_a_miss_as_any() -> None:
    moved = follow(unmoved(1), np.array([[0.1, 0.5, 0.6]]), np.array([90.0]), np.array([100.0]))
    assert (moved > 0).all()


def test_what_befalls_all_moves_p90_of_each_and_the_idle_teach_nothing() -> None:
    forecast = np.tile([9.0, 10.0, 11.0], (100, 1))
    idle = np.arange(100) >= 50
    forecast[idle] = [0.0, 1e-6, 2e-6]
    came, usual = np.where(idle, 0.0, 10.5), np.where(idle, 0.0, 10.0)
    came[0] = np.nan
    moved = follow(unmoved(100), forecast, came, usual)
    assert moved[0, 0] == moved[-1, 0] > 0.05
    assert (moved[1:50, 0] > moved[0, 0]).all()
    assert moved[0, 1] == moved[-1, 1] == 0


def moved_by(missed: list[bool]) -> float:
    """How far a series of which nothing is known moves by what befell as many others as `missed` has."""
    forecast = np.tile([9.0, 10.0, 11.0], (len(missed) + 1, 1))
    came = np.array([*np.where(missed, 10.5, 9.0), np.nan])
    return float(follow(unmoved(len(came)), forecast, came, np.full(len(came), 10.0))[-1, 0])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_the_fewer_series_the_less_they_tell_of_all(missed: list[bool]) -> None:
    share = (float(np.mean(missed)) - 0.1) * min(1.0, len(missed) / 20)
    assert moved_by(missed) == pytest.approx(moved_by([True] * 100) * share / 0.9)


def test_usual_is_the_mean_of_what_is_known_of_late() -> None:
    series = np.full((3, 700, 2), 8.0)
    series[:, :200] = 1000.0  # long ago
    series[0, -100:, 1] = np.nan
    series[1, -250:, 0] = 0.0
    series[2] = np.nan
    np.testing.assert_allclose(usual_traffic(series), [[8, 8], [4, 8], [0, 0]])


def test_what_was_learnt_is_forgotten() -> None:
    logs = np.full((1, 2), 0.4)
    for _ in range(5000):
        logs = follow(logs, np.full((1, 3), np.nan), np.array([1.0]), np.array([1.0]))
    assert np.abs(logs).max() < 0.01


@pytest.fixture
def past(tmp_path: Path) -> Iterator[PastForecasts]:
    database = Database(tmp_path, 300)
    yield PastForecasts(database)
    database.close()


def flat(models: int = len(MODELS)) -> Floats:
    """The same forecast of all windows and quantities."""
    return np.tile(np.array([10.0, 12.0, 14.0]), (models, HORIZON, len(QUANTITIES), 1))


def history(windows: int = 200) -> Floats:
    """Mean loads of "a" lie above p99, of "c" nobody knows, those of others below the median: one in ten is above
    p90, as it should be. Peaks are the same with "a" and "b" changed about."""
    values = np.full((len(MODELS), windows, len(QUANTITIES)), 9.0)
    values[0, :, MEAN_LOAD], values[1, :, PEAK_LOAD], values[2] = 20.0, 20.0, np.nan
    return values


def keep(past: PastForecasts, windows: range, raised: float = 0.0) -> None:
    for window in windows:
        past.save(window, MODELS, flat() + raised, flat())


def test_forecasts_follow_each_model_and_quantity(past: PastForecasts) -> None:
    keep(past, range(LAST - 150, LAST + 1))
    made = Following(past).adapt(MODELS, history(), LAST, flat())
    p90 = made[..., 1]
    assert (p90[0, :, [MEAN_LOAD, *range(2, 5)]] > 12.5).all()  # rates and tokens as the mean load
    assert (p90[1, :, [MEAN_LOAD, *range(2, 5)]] < 11.9).all()
    assert (p90[1, :, PEAK_LOAD] > 12.5).all()
    assert (made[:, :, PEAK_LOAD] >= made[:, :, MEAN_LOAD]).all()
    np.testing.assert_allclose(made[2], flat()[2])
    np.testing.assert_array_equal(made[..., 0], 10)


def test_a_start_learns_the_same_anew(past: PastForecasts) -> None:
    following, series = Following(past), history(400)
    for last in range(LAST - 199, LAST + 1):
        keep(past, range(last, last + 1))
        before = following.adapt(MODELS, series[:, : 400 + last - LAST], last, flat())
    np.testing.assert_allclose(Following(past).adapt(MODELS, series, LAST, flat()), before)
    other = following.adapt(("b", "new"), series[[1, 2]], LAST, flat(2))  # one is new, two were taken back
    np.testing.assert_allclose(other[0], before[1])
    np.testing.assert_allclose(other[1], flat()[0])


def test_a_new_model_begins_with_what_befell_all(past: PastForecasts) -> None:
    keep(past, range(LAST - 60, LAST + 1))
    series = history()
    series[3:, :, MEAN_LOAD] = 20.0
    following = Following(past)
    following.adapt(MODELS, series, LAST, flat())
    names, seen = (*MODELS, "new"), np.concatenate([series, np.full((1, *series.shape[1:]), np.nan)])
    made = following.adapt(names, seen, LAST, flat(len(names)))
    assert (made[-1, :, MEAN_LOAD, 1] > 12.3).all()
    np.testing.assert_allclose(made, Following(past).adapt(names, seen, LAST, flat(len(names))))


def test_a_clock_that_leaps_ahead_and_comes_back_stops_no_learning(past: PastForecasts) -> None:
    keep(past, range(LAST - 100, LAST + 1))
    following, series = Following(past), history()
    following.adapt(MODELS, np.full_like(series, np.nan), LAST + 100_000, flat())
    p90 = following.adapt(MODELS, series[:, :-50], LAST - 50, flat())[0, :, MEAN_LOAD, 1]
    assert (following.adapt(MODELS, series, LAST, flat())[0, :, MEAN_LOAD, 1] > p90.min() + 0.05).all()


def test_each_distance_learns_from_its_own_forecasts(past: PastForecasts) -> None:
    for window in range(LAST - 100, LAST + 1):
        made = flat()
        made[:, 5:] += 50  # far ahead nothing is ever missed
        past.save(window, MODELS, made, made)
    p90 = Following(past).adapt(MODELS, history(), LAST, flat())[0, :, MEAN_LOAD, 1]
    assert p90[0] > 12.5
    assert p90[5] < 11.9
    assert p90[0] >= p90[1] >= p90[2] >= p90[3] >= p90[4] >= p90[5]


def test_windows_for_which_something_was_announced_teach_nothing(past: PastForecasts) -> None:
    """Whether it comes or not: without the announcement they would have been missed by it."""
    keep(past, range(LAST - 100, LAST + 1), raised=50.0)
    np.testing.assert_array_equal(Following(past).adapt(MODELS, history(), LAST, flat()), flat())


def test_no_models_and_no_history_are_no_trouble(past: PastForecasts) -> None:
    following = Following(past)
    assert following.adapt((), np.empty((0, 5, 5)), LAST, flat(0)).shape == flat(0).shape
    np.testing.assert_array_equal(following.adapt(MODELS, np.empty((len(MODELS), 0, 5)), LAST, flat()), flat())
