"""What is expected of new models: what others' first days were, the less the more is known of them."""

from __future__ import annotations

import numpy as np

from services.forecaster.prior import learn_prior

SEASON = 48


def others() -> np.ndarray:
    """Twenty models that begin at different times, each with a first day that grows: shape (20, windows, 2)."""
    rng = np.random.default_rng(0)
    history = np.full((20, 4 * SEASON, 2), np.nan)
    for number, one in enumerate(history):
        begin = rng.integers(0, 2 * SEASON)
        age = np.arange(len(one) - begin)
        one[begin:, 0] = (number + 1) * np.minimum(age / SEASON, 1.0)
        one[begin:, 1] = 100 * one[begin:, 0]
    return history


def test_a_model_without_history_is_expected_to_begin_as_others_did() -> None:
    prior = learn_prior(others(), SEASON)
    expected = prior.blend(np.empty((1, 0, 2)), np.zeros((1, SEASON, 2, 3)))[0]
    assert expected[:, 0, 0].tolist() == sorted(expected[:, 0, 0])  # it grows over the day
    np.testing.assert_allclose(expected[-1, 0], np.array([10.5, 18.1, 19.81]) * 0.98, rtol=0.05)
    np.testing.assert_allclose(expected[:, 1], 100 * expected[:, 0])


def test_the_first_windows_with_traffic_displace_it() -> None:
    prior = learn_prior(others(), SEASON)
    own = np.full((1, 1, 2, 3), 1000.0)
    distances = []
    for known in (1, 3, 6, 12):
        history = np.full((1, known, 2), 1000.0)
        distances.append(float(1000 - prior.blend(history, own)[0, 0, 0, 0]))
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 0.01


def test_silence_displaces_it_slowly() -> None:
    prior = learn_prior(others(), SEASON)
    silent = np.zeros((1, 5, 2))
    after = prior.blend(silent, np.zeros((1, 1, 2, 3)))[0, 0, 0]
    assert 0 < after[1] < prior.forecast(np.array([5]), 1)[0, 0, 0, 1] / 2


def test_gaps_are_no_silence() -> None:
    prior = learn_prior(others(), SEASON)
    forecast = np.zeros((1, 1, 2, 3))
    np.testing.assert_array_equal(
        prior.blend(np.full((1, 7, 2), np.nan), forecast), prior.blend(np.empty((1, 0, 2)), forecast)
    )


def test_an_old_model_is_left_alone() -> None:
    prior = learn_prior(others(), SEASON)
    forecast = np.full((1, 3, 2, 3), 0.001)
    np.testing.assert_array_equal(prior.blend(np.full((1, 2 * SEASON, 2), 0.001), forecast), forecast)
