"""How good forecasts were, and what their errors cost. Pure."""

from __future__ import annotations

import math

import numpy as np

from services.forecaster.predictors import LEVELS, MEAN_LOAD, PEAK_LOAD, Floats
from warmserve.v1 import forecast_pb2

_RATE = PEAK_LOAD + 1  # the column of arrivals
_P50, _P90, _P99 = range(len(LEVELS))
_NO_LOAD = 0.1  # requests in progress; less calls for no replica, as the placer has it
_ROUNDED = 1 + 1e-3  # forecasts were kept with about this precision


def score(
    model: str, actual: Floats, forecast: Floats, window_s: float, capacity: int
) -> forecast_pb2.ForecastScore | None:
    """Of one model. None where of no window it is known what came and what had been forecast.

    `actual`: what came, shape (windows, 5), NaN where unknown. `forecast`: of mean and peak load, (windows, 2, 3).
    `capacity`: requests that a replica carries.
    """
    both = ~np.isnan(actual).any(axis=1) & ~np.isnan(forecast).any(axis=(1, 2))
    if not both.any():
        return None
    actual, forecast = actual[both].astype(float), forecast[both].astype(float)
    mean, expected = actual[:, MEAN_LOAD], forecast[:, MEAN_LOAD]
    total = float(mean.sum())
    p90 = expected[:, _P90]
    above = mean - p90
    pinball = np.maximum(LEVELS[_P90] * above, (LEVELS[_P90] - 1) * above)
    called = _replicas(forecast[:, PEAK_LOAD, _P90], capacity)
    needed = _replicas(actual[:, PEAK_LOAD], capacity)
    return forecast_pb2.ForecastScore(
        model=model,
        windows=len(mean),
        wape=float(np.abs(expected[:, _P50] - mean).sum()) / total if total else 0.0,
        pinball_p90=float(pinball.sum()) / total if total else 0.0,
        coverage_p90=float((mean <= p90 * _ROUNDED).mean()),
        coverage_p99=float((mean <= expected[:, _P99] * _ROUNDED).mean()),
        over_provision=float(p90.sum()) / total if total else 0.0,
        needless_replica_s=float(np.maximum(called - needed, 0).sum()) * window_s,
        missing_replica_s=float(np.maximum(needed - called, 0).sum()) * window_s,
        unforeseen_requests=float(actual[called == 0, _RATE].sum()) * window_s,
    )


def _replicas(load: Floats, capacity: int) -> Floats:
    replicas: Floats = np.where(load < _NO_LOAD, 0.0, np.ceil(load / capacity / math.sqrt(_ROUNDED)))
    return replicas
