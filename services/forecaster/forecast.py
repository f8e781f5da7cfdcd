"""A model's history as a forecast message. Pure."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from services.common.load import window_start
from services.forecaster.history import QUANTITIES
from services.forecaster.predictors import Predictor
from warmserve.v1 import cluster_pb2


def make_forecast(
    model: str,
    series: NDArray[np.float64],
    predictor: Predictor,
    horizon: int,
    first_start_s: int,
    window_s: float,
    now_s: float,
) -> cluster_pb2.Forecast:
    """Forecasts `horizon` windows, of which the first begins at `first_start_s`, from `series` of shape (n, 5)."""
    quantiles = [predictor.predict(series[:, column], horizon) for column in range(len(QUANTITIES))]
    windows = []
    for step in range(horizon):
        window = cluster_pb2.WindowForecast(
            start_unix_s=window_start(first_start_s + (step + 0.5) * window_s, window_s)
        )
        for quantity, values in zip(QUANTITIES, quantiles, strict=True):
            p50, p90, p99 = values[step]
            getattr(window, quantity).CopyFrom(cluster_pb2.Quantiles(p50=p50, p90=p90, p99=p99))
        windows.append(window)
    return cluster_pb2.Forecast(
        model=model, made_unix_ms=int(now_s * 1e3), window_s=window_s, predictor=predictor.name, windows=windows
    )
