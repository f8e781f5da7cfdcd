"""Scores on forecasts whose worth is known."""

from __future__ import annotations

import numpy as np
import pytest

from services.forecaster.scores import score


def actuals(means: list[float], peaks: list[float] | None = None) -> np.ndarray:
    values = np.zeros((len(means), 5))
    values[:, 0] = means
    values[:, 1] = means if peaks is None else peaks
    values[:, 2] = 0.5
    return values


def forecasts(mean: tuple[float, float, float], peak: tuple[float, float, float], windows: int) -> np.ndarray:
    return np.tile(np.array([mean, peak], float), (windows, 1, 1))


def test_a_perfect_forecast_has_no_error_and_no_cost() -> None:
    found = score("m", actuals([4.0, 4.0]), forecasts((4, 4, 4), (4, 4, 4), 2), 300, 8)
    assert found is not None
    assert (found.windows, found.wape, found.pinball_p90, found.over_provision) == (2, 0, 0, 1)
    assert (found.coverage_p90, found.coverage_p99) == (1, 1)
    assert (found.needless_replica_s, found.missing_replica_s, found.unforeseen_requests) == (0, 0, 0)


def test_errors_are_weighed_as_their_quantile_says() -> None:
    found = score("m", actuals([10.0, 2.0]), forecasts((6, 8, 9), (0, 0, 0), 2), 300, 8)
    assert found is not None
    assert found.wape == pytest.approx((4 + 4) / 12)
    assert found.pinball_p90 == pytest.approx((0.9 * 2 + 0.1 * 6) / 12)
    assert (found.coverage_p90, found.coverage_p99) == (0.5, 0.5)
    assert found.over_provision == pytest.approx(16 / 12)


def test_costs_are_counted_in_replicas() -> None:
    peaks = [0.0, 8.0, 9.0, 40.0]
    found = score("m", actuals([1.0] * 4, peaks), forecasts((1, 1, 1), (1, 9, 20), 4), 300, 8)
    assert found is not None
    # Called for: 2 each time. Needed: 0, 1, 2, 5.
    assert found.needless_replica_s == (2 + 1) * 300
    assert found.missing_replica_s == 3 * 300
    assert found.unforeseen_requests == 0


def test_requests_that_no_replica_was_called_for_are_unforeseen() -> None:
    found = score("m", actuals([1.0, 1.0]), forecasts((0, 0, 0), (0, 0.05, 1), 2), 300, 8)
    assert found is not None
    assert found.unforeseen_requests == 2 * 0.5 * 300


def test_only_windows_that_were_both_forecast_and_counted_are_scored() -> None:
    actual, forecast = actuals([1.0, 1.0, 1.0]), forecasts((1, 1, 1), (1, 1, 1), 3)
    actual[0] = np.nan
    forecast[1] = np.nan
    found = score("m", actual, forecast, 300, 8)
    assert found is not None
    assert found.windows == 1
    actual[2] = np.nan
    assert score("m", actual, forecast, 300, 8) is None


def test_without_traffic_nothing_is_divided_by_zero() -> None:
    found = score("m", actuals([0.0]), forecasts((0, 1, 2), (0, 1, 2), 1), 300, 8)
    assert found is not None
    assert (found.wape, found.pinball_p90, found.over_provision) == (0, 0, 0)
    assert found.needless_replica_s == 300
