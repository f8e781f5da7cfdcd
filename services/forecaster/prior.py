"""What is expected of a new model: what other models' first days were like. Pure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.forecaster.features import Floats
from services.forecaster.predictors import LEVELS

_BINS = 24  # of the first day
_TRUST = 0.1  # what is left of the prior after each window with traffic


@dataclass(frozen=True)
class Prior:
    """Quantiles of loads and rates, by the time since a model's first window."""

    season: int
    table: Floats
    """Shape (bins of a day, quantities, 3)."""

    def forecast(self, age: NDArray[np.int64], horizon: int) -> Floats:
        """For models of which `age` windows have passed, shape (n,): shape (n, horizon, quantities, 3)."""
        at = age[:, None] + np.arange(horizon)
        forecast: Floats = self.table[np.minimum(at * _BINS // self.season, _BINS - 1)]
        return forecast

    def blend(self, history: Floats, forecast: Floats) -> Floats:
        """Mixes the prior into forecasts, shape (n, horizon, quantities, 3), as far as little is known of a series.

        `history`: shape (n, windows, quantities); what is known of its first quantity counts.
        """
        known = ~np.isnan(history[:, :, 0])
        first = np.column_stack([known, np.ones(len(known), bool)]).argmax(axis=1)
        windows, busy = known.sum(axis=1), (history[:, :, 0] > 0).sum(axis=1)
        # The first windows with traffic tell a model's size; how long it stays without any is told by how long it has.
        weight = np.where(busy > 0, _TRUST ** np.minimum(busy, 1000), 1 / (1 + windows))
        weight = np.where(windows < self.season, weight, 0.0)[:, None, None, None]
        expected = self.forecast(history.shape[1] - first, forecast.shape[1])
        mixed: Floats = weight * expected + (1 - weight) * forecast
        return mixed


def learn_prior(history: Floats, season: int) -> Prior:
    """From shape (n, windows, quantities): the first `season` windows from each model's first known one on.

    Of a model that is older than the history, the first day in it stands for its first.
    """
    known = ~np.isnan(history[:, :, 0])
    rows = np.flatnonzero(known.any(axis=1))
    at = known[rows].argmax(axis=1)[:, None] + np.arange(season)
    days = history[rows[:, None], np.minimum(at, history.shape[1] - 1)]  # (models, season, quantities)
    days[at >= history.shape[1]] = np.nan
    anywhere = np.nanquantile(days, LEVELS, axis=(0, 1))
    table = np.empty((_BINS, history.shape[2], len(LEVELS)))
    bins = np.arange(season) * _BINS // season
    for number in range(_BINS):
        some = days[:, bins == number].reshape(-1, history.shape[2])
        for quantity in range(history.shape[2]):
            values = some[~np.isnan(some[:, quantity]), quantity]
            table[number, quantity] = np.quantile(values, LEVELS) if len(values) else anywhere[:, quantity]
    return Prior(season, np.nan_to_num(table))
