"""Forecasts as messages. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from services.common.load import start_of
from services.forecaster.predictors import QUANTITIES, Floats
from warmserve.v1 import cluster_pb2, forecast_pb2

_DIGITS = 4
_LEAST = 1e-6


@dataclass(frozen=True)
class Forecasting:
    """What was forecast for all models at one moment, without announcements."""

    predictor: str
    first: int
    """The number of the first window, which is the current one."""
    models: tuple[str, ...]
    quantiles: Floats
    """Shape (models, windows, 5, 3)."""
    per_load: Floats
    """Arrivals and tokens per second for each request in progress: shape (models, 3)."""


def message(
    model: str, quantiles: Floats, made_unix_ms: int, predictor: str, first: int, window_s: float
) -> cluster_pb2.Forecast:
    """One model's forecast, from quantiles of shape (windows, 5, 3), to four digits: etcd need not hold more."""
    windows = []
    for step, window in enumerate(_rounded(quantiles).tolist()):
        quantities = {
            name: cluster_pb2.Quantiles(p50=p50, p90=p90, p99=p99)
            for name, (p50, p90, p99) in zip(QUANTITIES, window, strict=True)
        }
        windows.append(cluster_pb2.WindowForecast(start_unix_s=start_of(first + step, window_s), **quantities))
    return cluster_pb2.Forecast(
        model=model, made_unix_ms=made_unix_ms, window_s=window_s, predictor=predictor, windows=windows
    )


def _rounded(values: Floats) -> Floats:
    size = np.floor(np.log10(np.maximum(values, _LEAST))).astype(int) - (_DIGITS - 1)
    up, down = 10.0 ** np.maximum(-size, 0), 10.0 ** np.maximum(size, 0)  # whole numbers, so that quotients are short
    rounded: Floats = np.round(values * up / down) * down / up
    return rounded


def loads_message(start_unix_s: int, quantiles: Floats) -> cluster_pb2.WindowForecast | None:
    """What is kept of a past forecast, shape (2, 3): mean and peak load. None where nothing is."""
    if np.isnan(quantiles).any():
        return None
    mean, peak = (cluster_pb2.Quantiles(p50=a, p90=b, p99=c) for a, b, c in quantiles.tolist())
    return cluster_pb2.WindowForecast(start_unix_s=start_unix_s, mean_load=mean, peak_load=peak)


def sample(values: Sequence[float]) -> forecast_pb2.LoadSample:
    """A window that was counted, columns as in QUANTITIES."""
    return forecast_pb2.LoadSample(**dict(zip(QUANTITIES, values, strict=True)))
