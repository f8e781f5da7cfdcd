"""How predictors are compared: on known losses, and so that the better one wins."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from services.forecaster.predictors import PublishedPredictor
from services.forecaster.scoring import compare, loss, pinball
from tests.forecaster.series import SEASON, traffic


class Off:
    """Tells the truth, times a factor."""

    name = "off"

    def __init__(self, truth: NDArray[np.float64], factor: float) -> None:
        self._truth = truth
        self._factor = factor

    def at(self, series: NDArray[np.float64], origins: NDArray[np.int64], distance: int) -> NDArray[np.float64]:
        return np.repeat(self._factor * self._truth[:, origins + distance, None], 3, axis=2)

    def predict_many(self, series: NDArray[np.float64], horizon: int) -> NDArray[np.float64]:
        raise AssertionError("scores come from past moments")

    forecast_all = predict_many


def test_pinball_of_known_errors() -> None:
    losses = pinball(np.array([[8.0, 12.0, 10.0]]), np.array([10.0]))
    np.testing.assert_allclose(losses, [[0.5 * 2, 0.1 * 2, 0.0]])


def test_loss_is_relative_to_the_traffic_and_leaves_gaps_out() -> None:
    series = traffic(4)
    series[3, -10:] = np.nan
    half = loss(Off(traffic(4), 0.5), series, SEASON)
    assert half == pytest.approx(0.5 * (0.5 + 0.9 + 0.99) / 3)


def test_the_better_one_has_the_smaller_share() -> None:
    series = traffic(6)
    scores = compare(Off(series, 0.98), Off(series, 0.8), series, SEASON, SEASON)
    assert scores.challenger < scores.champion
    same = compare(PublishedPredictor(SEASON), PublishedPredictor(SEASON), series, SEASON, SEASON)
    assert (same.challenger, same.champion) == (1.0, 1.0)


def test_no_traffic_says_nothing() -> None:
    quiet = np.zeros((2, 4 * SEASON))
    assert math.isnan(loss(Off(quiet, 1), quiet, SEASON))
    scores = compare(Off(quiet, 1), Off(quiet, 1), quiet, SEASON, SEASON)
    assert math.isnan(scores.challenger)
    assert math.isnan(scores.champion)


def test_too_few_windows_are_refused() -> None:
    for newest in (6, 4 * SEASON):
        with pytest.raises(ValueError, match="newest of 96 windows"):
            loss(PublishedPredictor(SEASON), traffic(4), newest)
