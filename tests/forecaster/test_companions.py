"""The quantities that follow from the mean load: they keep to what they have been per load, and cover what comes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from services.forecaster.companions import Companions, learn_companions
from services.forecaster.predictors import LEVELS, MEAN_LOAD, PEAK_LOAD, QUANTITIES
from tests.forecaster.series import SEASON, history

PLAIN = Companions(np.array([1, 2, 0.5, 300, 90.0]), np.ones((5, 2)))


def known_load(past: np.ndarray, origins: np.ndarray) -> np.ndarray:
    """The load of the next window as if it were known, less doubt: shape (n, origins, 3)."""
    return np.repeat(past[:, origins + 1, MEAN_LOAD, None], 3, axis=2)


def test_what_each_request_brings_along_is_learned_from_the_series_itself() -> None:
    load = np.linspace(2, 9, 40)
    past = np.stack([load, load + 3 * np.sqrt(load), 0.25 * load, 700 * load, 50 * load], axis=1)[None]
    forecast = PLAIN.derive(past, np.array([[[4.0, 9.0, 16.0]]]))[0, 0]
    np.testing.assert_allclose(forecast[:, 0], [4, 4 + 3 * 2, 1, 2800, 200], rtol=1e-6)
    np.testing.assert_allclose(forecast[2:, 2], [4, 11200, 800], rtol=1e-6)  # no doubt but the load's


def test_a_change_of_what_requests_bring_is_followed() -> None:
    past = np.ones((1, 60, 5))
    past[:, 40:, 4] = 3.0
    assert PLAIN.derive(past, np.ones((1, 1, 3)))[0, 0, 4, 0] > 2.2


def test_without_a_past_others_speak() -> None:
    for past in (np.empty((1, 0, 5)), np.full((1, 20, 5), np.nan), np.zeros((1, 20, 5))):
        np.testing.assert_allclose(PLAIN.derive(past, np.full((1, 1, 3), 4.0))[0, 0, :, 0], [4, 8, 2, 1200, 360])


def test_they_cover_what_comes_on_days_unseen() -> None:
    past = history(12)
    learning, later = np.arange(5 * SEASON, 7 * SEASON), np.arange(8 * SEASON, 12 * SEASON - 1)
    companions = learn_companions(past[:, : 7 * SEASON + 1], learning, 1, known_load(past, learning), SEASON)
    covered = np.zeros((len(QUANTITIES), len(LEVELS)))
    for origin in later:
        load = known_load(past, np.array([origin]))
        forecast = companions.derive(past[:, origin + 1 - SEASON : origin + 1], load)[:, 0]
        covered += (past[:, origin + 1, :, None] <= forecast).mean(axis=0)
    covered /= len(later)
    for quantity in range(1, len(QUANTITIES)):
        assert 0.85 < covered[quantity, 1] < 0.96, QUANTITIES[quantity]
        assert covered[quantity, 2] > 0.97, QUANTITIES[quantity]


def test_what_comes_after_the_origins_changes_nothing() -> None:
    past = history(6)
    origins = np.arange(3 * SEASON, 4 * SEASON)
    changed = past.copy()
    changed[:, 4 * SEASON + 1 :] = 1e6
    before, after = (
        learn_companions(values[:, : 4 * SEASON + 1], origins, 1, known_load(past, origins), SEASON)
        for values in (past, changed)
    )
    np.testing.assert_array_equal(before.factors, after.factors)
    np.testing.assert_array_equal(before.usual, after.usual)


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(
        float,
        st.tuples(st.integers(0, 3), st.integers(0, 30), st.just(5)),
        elements=st.one_of(st.just(np.nan), st.floats(0, 1e9)),
    )
)
def test_any_past_gives_quantiles_that_do_not_cross(past: np.ndarray) -> None:
    load = np.sort(np.abs(np.random.default_rng(0).normal(0, 9, (len(past), 4, 3))), axis=2)
    forecast = PLAIN.derive(past, load)
    assert np.isfinite(forecast).all()
    assert (forecast >= 0).all()
    assert (np.diff(forecast, axis=3) >= 0).all()
    assert (forecast[:, :, PEAK_LOAD] >= forecast[:, :, MEAN_LOAD]).all()
    np.testing.assert_array_equal(forecast[:, :, MEAN_LOAD], load)


def test_nothing_known_teaches_nothing() -> None:
    empty = np.full((2, 2 * SEASON, 5), np.nan)
    origins = np.arange(SEASON, SEASON + 5)
    companions = learn_companions(empty, origins, 1, np.zeros((2, 5, 3)), SEASON)
    assert companions.usual == pytest.approx(np.zeros(5))
    np.testing.assert_array_equal(companions.factors, np.ones((5, 2)))
