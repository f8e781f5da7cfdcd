"""Series that tests of predictors share."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from services.forecaster.predictors import QUANTITIES

SEASON = 24


def traffic(days: int, series: int = 12, seed: int = 0) -> NDArray[np.float64]:
    """Daily curves with noise that lasts some windows, of sizes from 1 to 1000: shape (series, windows)."""
    rng = np.random.default_rng(seed)
    at = np.arange(days * SEASON)
    noise = rng.normal(0, 0.15, (series, len(at)))
    for step in range(1, len(at)):
        noise[:, step] += 0.8 * noise[:, step - 1]
    phase = rng.uniform(0, 2 * np.pi, (series, 1))
    curve = 1 + 0.7 * np.sin(2 * np.pi * at / SEASON + phase)
    values: NDArray[np.float64] = np.geomspace(1, 1000, series)[:, None] * curve * np.exp(noise)
    return values


def history(days: int, series: int = 12, seed: int = 0) -> NDArray[np.float64]:
    """All quantities of such series: requests of some seconds each, whose lengths wander: (series, windows, 5)."""
    rng = np.random.default_rng(seed + 1)
    load = traffic(days, series, seed)
    wandering = np.exp(np.cumsum(rng.normal(0, 0.02, (3, *load.shape)), axis=2) + rng.normal(0, 0.05, (3, *load.shape)))
    values = np.empty((*load.shape, len(QUANTITIES)))
    values[..., 0] = load
    values[..., 1] = load + rng.gamma(9, 1 / 3, load.shape) * np.sqrt(load)
    for column, (per_load, factor) in enumerate(zip((0.3, 300, 90), wandering, strict=True), start=2):
        values[..., column] = load * per_load * factor
    return values
