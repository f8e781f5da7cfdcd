"""The learnt predictor: it learns what is there to learn, never looks ahead, and stands odd series."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from services.forecaster.features import features
from services.forecaster.learned import ANCHORS, MAX_HORIZON, LearnedPredictor, dumps, fit, loads
from services.forecaster.predictors import PEAK_LOAD, Floats, PublishedPredictor, last_values, seasonal_naive
from tests.forecaster.series import SEASON, history, traffic


@functools.cache
def predictor() -> LearnedPredictor:
    return fit(traffic(20), SEASON)


def predict(series: Floats, horizon: int) -> Floats:
    """Of one series: shape (horizon, 3)."""
    quantiles: Floats = predictor().predict_many(series[None], horizon)[0]
    return quantiles


@functools.cache
def of_all() -> LearnedPredictor:
    return fit(history(10), SEASON)


def unusual() -> dict[str, np.ndarray]:
    """Series of sorts that production has."""
    usual = traffic(10, 1, seed=3)[0]
    spike, gap = usual.copy(), usual.copy()
    spike[-1] *= 100
    gap[-30:] = np.nan
    return {
        "empty": np.empty(0),
        "one window": np.array([3.0]),
        "only gaps": np.full(50, np.nan),
        "no traffic": np.zeros(200),
        "constant": np.full(200, 7.0),
        "short": usual[:5],
        "spike": spike,
        "gap of more than a day": gap,
        "first traffic": np.append(np.zeros(100), 5.0),
        "huge": usual * 1e12,
    }


@pytest.mark.parametrize("name", unusual())
def test_odd_series_are_forecast(name: str) -> None:
    forecast = predict(unusual()[name], MAX_HORIZON)
    assert forecast.shape == (MAX_HORIZON, 3)
    assert np.isfinite(forecast).all()
    assert (forecast >= 0).all()
    assert (np.diff(forecast, axis=1) >= 0).all()


def test_a_constant_is_forecast_nearly_as_itself() -> None:
    np.testing.assert_allclose(predict(np.full(200, 7.0), MAX_HORIZON)[:, 0], 7.0, rtol=0.25)


def test_a_gap_is_not_zero_traffic() -> None:
    series = traffic(10, 1, seed=3)[0]
    series[-4:] = np.nan
    assert predict(series, 3)[:, 0].min() > 0.3 * np.nanmin(series[-2 * SEASON :])


def test_a_spike_raises_the_next_window() -> None:
    series = unusual()["spike"]
    assert predict(series, 1)[0, 1] > 5 * predict(series[:-1], 1)[0, 1]


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(float, st.integers(0, 80), elements=st.one_of(st.just(np.nan), st.floats(0, 1e9))),
    st.integers(1, MAX_HORIZON),
)
def test_quantiles_never_cross_nor_fall_below_zero(series: np.ndarray, horizon: int) -> None:
    forecast = predict(series, horizon)
    assert forecast.shape == (horizon, 3)
    assert np.isfinite(forecast).all()
    assert (forecast >= 0).all()
    assert (np.diff(forecast, axis=1) >= 0).all()


def test_it_beats_the_published_predictor_and_covers_on_days_it_has_not_seen() -> None:
    series = traffic(28)
    origins = np.arange(20 * SEASON - 1, 28 * SEASON - 1)
    actual = series[:, origins + 1]
    forecast = predictor().at(series, origins, 1)
    published = PublishedPredictor(SEASON)
    peer = published.points(series, 1)[:, origins + 1]
    size = series.mean(axis=1, keepdims=True)
    assert np.abs((forecast[..., 0] - actual) / size).mean() < 0.95 * np.abs((peer - actual) / size).mean()
    assert 0.85 < (actual <= forecast[..., 1]).mean() < 0.96
    assert (actual <= forecast[..., 2]).mean() > 0.97


def test_the_size_of_a_series_does_not_matter() -> None:
    series = traffic(10, 1, seed=3)[0]
    small, large = (predict(series * size, 6) / size for size in (1.0, 10.0))
    np.testing.assert_allclose(small, large, rtol=0.35)


def test_several_series_are_forecast_as_each_by_itself() -> None:
    series = traffic(10, 4, seed=5)
    together = predictor().predict_many(series, 7)
    for one, forecast in zip(series, together, strict=True):
        np.testing.assert_allclose(predict(one, 7), forecast, rtol=1e-9)


def test_no_series_have_no_forecasts() -> None:
    assert predictor().predict_many(np.empty((0, 50)), 5).shape == (0, 5, 3)
    assert predictor().predict_many(np.empty((2, 0)), 5).shape == (2, 5, 3)


def test_windows_before_a_series_begins_change_nothing() -> None:
    series = traffic(3, 1, seed=4)[0]
    padded = np.concatenate([np.full(2 * SEASON, np.nan), series])
    # Whole seasons of padding, so that the time of day stays.
    np.testing.assert_allclose(predict(padded, 6), predict(series, 6), rtol=0.02)  # sums round


def test_between_anchors_lie_forecasts_between_theirs() -> None:
    forecast = predict(traffic(10, 1, seed=3)[0], MAX_HORIZON)
    np.testing.assert_allclose(forecast[1], (forecast[0] + forecast[2]) / 2)


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match="use the published predictor"):
        predict(np.ones(50), MAX_HORIZON + 1)
    with pytest.raises(ValueError, match="too few to learn from"):
        fit(traffic(2), SEASON)
    quiet = traffic(6)
    quiet[:, 4 * SEASON :] = np.nan
    for nothing in (np.full((2, 5 * SEASON), np.nan), np.zeros((2, 5 * SEASON)), np.empty((0, 5 * SEASON)), quiet):
        with pytest.raises(ValueError, match="no traffic to learn from"):
            fit(nothing, SEASON)


@pytest.mark.parametrize("distance", ANCHORS)
def test_features_do_not_look_ahead(distance: int) -> None:
    series = traffic(8)
    origins = np.arange(0, 6 * SEASON)
    changed = series.copy()
    changed[:, 6 * SEASON :] = 1e6
    before, after = (features(values, origins, [distance], SEASON)[0] for values in (series, changed))
    np.testing.assert_array_equal(before.values, after.values)
    np.testing.assert_array_equal(before.scale, after.scale)


def test_rows_know_nothing_of_the_windows_after_their_own() -> None:
    series = traffic(6, 3)
    for origin in (0, 1, 10, SEASON, 3 * SEASON + 5):
        together = features(series, np.arange(5 * SEASON), [3], SEASON)[0].values.reshape(3, 5 * SEASON, -1)[:, origin]
        alone = features(series[:, : origin + 1], np.array([origin]), [3], SEASON)[0].values
        width = min(together.shape[1], alone.shape[1])
        np.testing.assert_allclose(together[:, :width], alone[:, :width], rtol=1e-5, atol=1e-6)


def test_a_job_at_a_fixed_place_in_the_hour_is_foreseen() -> None:
    season = 144
    rng = np.random.default_rng(4)
    series = rng.gamma(40, 0.025, (8, 6 * season))
    series[:, ::6] *= 3
    series[1::2] = np.roll(series[1::2], 2, axis=1)
    origins = np.arange(5 * season, 6 * season - 6)
    learned = fit(series[:, : 5 * season], season)
    for distance in (1, 6):
        actual = series[:, origins + distance]
        assert np.abs(learned.at(series, origins, distance)[:, :, 0] - actual).sum() < 0.2 * actual.sum()


def test_simple_rules() -> None:
    series = np.array([[1.0, 2, np.nan, 4, 5, 6]])
    np.testing.assert_array_equal(last_values(series, 1), [[np.nan, 1, 2, 2, 4, 5]])
    np.testing.assert_array_equal(last_values(series, 9), np.full((1, 6), np.nan))
    np.testing.assert_array_equal(seasonal_naive(series, 1, 3), [[np.nan, 1, 2, 1, 2, 5]])


def test_all_quantities_of_any_history_are_forecast_and_agree() -> None:
    past = history(4, 6, seed=7)
    past[1, -30:] = np.nan
    past[2] = np.nan
    past[3] = 0.0
    past[4, -1] *= 100
    past[5, :, 1:] = 7.0
    for some in (past, past[:, :0], past[:, :1], past[:0]):
        forecast = of_all().forecast_all(some, MAX_HORIZON)
        assert forecast.shape == (len(some), MAX_HORIZON, 5, 3)
        assert np.isfinite(forecast).all()
        assert (forecast >= 0).all()
        assert (np.diff(forecast, axis=3) >= 0).all()
        assert (forecast[:, :, PEAK_LOAD] >= forecast[:, :, 0]).all()


def test_all_quantities_follow_what_came() -> None:
    past = history(12, 12, seed=0)
    origins = range(10 * SEASON, 12 * SEASON - 1, 5)
    forecasts = np.stack([of_all().forecast_all(past[:, : origin + 1], 1)[:, 0] for origin in origins], axis=1)
    actual = past[:, np.array(origins) + 1]
    covered = (actual[..., None] <= forecasts).mean(axis=(0, 1))
    assert (np.abs(covered[:, 0] - 0.5) < 0.2).all()
    assert (covered[:, 1] > 0.8).all()
    assert (covered[:, 2] > 0.95).all()


def test_a_new_model_begins_with_what_others_began_with() -> None:
    nothing = of_all().forecast_all(np.full((1, 3, 5), np.nan), 6)[0]
    day = history(10)[:, :SEASON]
    for quantity in range(5):
        low, high = np.quantile(day[:, :, quantity], (0.2, 0.8))
        assert low < nothing[0, quantity, 0] < high
    silent = of_all().forecast_all(np.zeros((1, 2 * SEASON, 5)), 6)[0]
    assert silent.max() < 0.01


def test_past_moments_are_forecast_as_they_would_have_been() -> None:
    series = traffic(12, 4, seed=5)
    origins = np.array([10 * SEASON, 11 * SEASON + 3])
    for distance in (1, 4, 6, 11):
        past = predictor().at(series, origins, distance)
        for index, origin in enumerate(origins):
            then = predictor().predict_many(series[:, : origin + 1], MAX_HORIZON)[:, distance - 1]
            np.testing.assert_allclose(past[:, index], then, rtol=0.05)  # sums round; trees have steps


def test_what_is_saved_forecasts_the_same() -> None:
    past = history(4, 5, seed=2)
    again = loads(dumps(of_all()), SEASON)
    np.testing.assert_array_equal(again.forecast_all(past, 12), of_all().forecast_all(past, 12))
    assert again.loss == of_all().loss
    single = loads(dumps(predictor()), SEASON)
    np.testing.assert_array_equal(single.predict_many(past[:, :, 0], 3), predictor().predict_many(past[:, :, 0], 3))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (lambda saved: b"", "no learnt predictor of this version"),
        (lambda saved: saved[:100], "damaged or cut off"),
        (lambda saved: saved[:-1], "damaged or cut off"),
        (lambda saved: saved[:-9] + bytes([saved[-9] ^ 1]) + saved[-8:], "damaged or cut off"),
        (lambda saved: saved.replace(b"learned 3 ", b"learned 2 ", 1), "no learnt predictor of this version"),
    ],
)
def test_what_is_broken_is_told(data: Callable[[bytes], bytes], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        loads(data(dumps(predictor())), SEASON)


def test_another_season_is_told() -> None:
    with pytest.raises(ValueError, match="seasons of 24 windows, not 288"):
        loads(dumps(predictor()), 288)


def test_one_quantity_does_not_tell_all() -> None:
    with pytest.raises(ValueError, match="fitted to one quantity only"):
        predictor().forecast_all(history(4), 1)
