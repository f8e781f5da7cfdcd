"""The published predictor on series whose answer is known, and its invariants on any series."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from services.forecaster.predictors import Floats, PublishedPredictor


def predict(predictor: PublishedPredictor, series: Floats, horizon: int) -> Floats:
    """Of one series: shape (horizon, 3)."""
    quantiles: Floats = predictor.predict_many(series[None], horizon)[0]
    return quantiles


def test_a_season_repeats() -> None:
    day = np.array([0.0, 1, 5, 9, 5, 1])
    forecast = predict(PublishedPredictor(6), np.tile(day, 5), 12)
    np.testing.assert_allclose(forecast[:, 0], np.tile(day, 2), atol=1e-9)


def test_a_shift_of_the_last_windows_is_followed() -> None:
    day = np.array([2.0, 4, 6, 4])
    series = np.tile(day, 6)
    series[-8:] += 3
    forecast = predict(PublishedPredictor(4), series, 4)
    assert (forecast[:, 0] > day + 1).all()
    assert (forecast[:, 0] <= day + 4).all()


def test_the_drift_weighs_the_newest_residual_most() -> None:
    # One day of zeros, then residuals 4 and, newest, 1: (1 * 1 + 4 / 2) / (1 + 1 / 2 + 1 / 4 + ...) over ten of them.
    season = 20
    series = np.zeros(season + 12)
    series[-2:] = [4, 1]
    expected = (1 + 4 / 2) / sum(0.5**i for i in range(10))
    forecast = predict(PublishedPredictor(season), series, 1)
    assert forecast[0, 0] == pytest.approx(expected)


def test_a_constant_is_forecast_as_itself_and_without_doubt() -> None:
    forecast = predict(PublishedPredictor(4), np.full(40, 2.5), 12)
    np.testing.assert_allclose(forecast, 2.5)


def test_nothing_known_is_little_expected() -> None:
    predictor = PublishedPredictor(4)
    for series in (np.empty(0), np.full(9, np.nan)):
        np.testing.assert_array_equal(predict(predictor, series, 2), [[0, 0, 1], [0, 0, 1]])


def test_a_gap_is_not_zero_traffic() -> None:
    series = np.full(40, 3.0)
    series[-6:] = np.nan
    np.testing.assert_allclose(predict(PublishedPredictor(8), series, 3), 3.0)


def test_quantiles_cover_what_comes() -> None:
    rng = np.random.default_rng(5)
    series = rng.poisson(4 + 3 * np.sin(np.arange(4000) * 2 * np.pi / 48)).astype(float)
    predictor = PublishedPredictor(48)
    hits = np.array([series[t] <= predict(predictor, series[:t], 1)[0] for t in range(3000, 3600)])
    coverage = hits.mean(axis=0)
    assert 0.85 < coverage[1] < 0.95
    assert coverage[2] > 0.96


def test_the_past_is_forecast_without_the_future() -> None:
    rng = np.random.default_rng(1)
    series = rng.gamma(2, 2, 200)
    predictor = PublishedPredictor(24)
    before = predict(predictor, series[:150], 12)
    changed = series.copy()
    changed[150:] = 1e6
    np.testing.assert_array_equal(before, predict(predictor, changed[:150], 12))


@given(
    hnp.arrays(float, st.integers(0, 60), elements=st.one_of(st.just(np.nan), st.floats(0, 1e6))),
    st.integers(1, 20),
    st.integers(1, 15),
)
def test_quantiles_never_cross_nor_fall_below_zero(series: np.ndarray, season: int, horizon: int) -> None:
    forecast = predict(PublishedPredictor(season), series, horizon)
    assert forecast.shape == (horizon, 3)
    assert np.isfinite(forecast).all()
    assert (forecast >= 0).all()
    assert (np.diff(forecast, axis=1) >= 0).all()
