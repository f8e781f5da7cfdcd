"""Predictors: from a series of past windows to quantiles of the next ones. Pure: no clock, no I/O."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

LEVELS = (0.5, 0.9, 0.99)
_RESIDUALS = 10
_ERRORS = 1000  # the newest errors that quantiles are taken from
_MIN_ERRORS = 5
_PRIOR = (0.0, 0.0, 1.0)  # of a quantity of which nothing is known

Floats = NDArray[np.float64]


class Predictor(Protocol):
    """What the forecaster asks of a predictor."""

    name: str

    def predict(self, series: Floats, horizon: int) -> Floats:
        """Quantiles of the windows that follow `series`.

        `series`: shape (n,), oldest first, NaN in gaps, n may be 0. Returns shape (horizon, 3), columns as in LEVELS,
        never negative, never decreasing along a row, never NaN.
        """
        ...


class PublishedPredictor:
    """The predictor of the WarmServe paper (arXiv 2512.09472).

    The mean of the same window of past days, plus a weighted mean of the last ten residuals against that, with the
    weights 1, 1/2, 1/4 ... from the newest on. Its quantiles are ours: the point forecast plus quantiles of the
    errors that the same rule has made on this series, at the same distance.
    """

    name = "published"

    def __init__(self, season: int) -> None:
        """`season`: windows after which the series resembles itself (a day's)."""
        if season < 1:
            raise ValueError(f"a season has at least one window, not {season}")
        self._season = season

    def predict(self, series: Floats, horizon: int) -> Floats:
        """See Predictor."""
        known = np.flatnonzero(~np.isnan(series))
        if not known.size:
            return np.tile(np.array(_PRIOR), (horizon, 1))
        series = series[known[0] :]
        drift = self._drift(series - self._seasonal(series, 1)[: len(series)])
        return np.stack([self._at(series, drift, distance) for distance in range(1, horizon + 1)])

    def points(self, series: Floats, distance: int) -> Floats:
        """For each past window what was forecast for it `distance` windows before, of shape (n,); NaN where nothing."""
        points = np.full(len(series), np.nan)
        known = np.flatnonzero(~np.isnan(series))
        if known.size:
            series = series[known[0] :]
            drift = self._drift(series - self._seasonal(series, 1)[: len(series)])
            points[known[0] :] = self._past(self._seasonal(series, distance), drift, distance)
        return points

    @staticmethod
    def _past(seasonal: Floats, drift: Floats, distance: int) -> Floats:
        """What was forecast for past windows `distance` windows before; as many as there is drift of."""
        count = len(drift)
        past = np.full(count, np.nan)
        past[distance:] = np.maximum(seasonal[distance:count] + drift[: max(count - distance, 0)], 0)
        return past

    def _at(self, series: Floats, drift: Floats, distance: int) -> Floats:
        """Quantiles of the window `distance` windows after the last one."""
        count = len(series)
        seasonal = self._seasonal(series, distance)  # one entry for each past window, and `distance` future ones
        past = self._past(seasonal, drift, distance)
        point = max(float(seasonal[count + distance - 1] + drift[-1]), 0.0)
        errors = (series - past)[-_ERRORS:]
        errors = errors[~np.isnan(errors)]
        if errors.size < _MIN_ERRORS:
            # Too little is known of its errors: as far apart as the windows themselves have been.
            errors = series[~np.isnan(series)] - point
        spread = np.quantile(errors, LEVELS)
        # The median is the rule's own; only what lies above it is moved.
        return point + np.maximum.accumulate(np.maximum(np.array([0.0, spread[1], spread[2]]), 0.0))

    def _seasonal(self, series: Floats, distance: int) -> Floats:
        """For each window t < len + distance: the mean of its phase over days before t - distance + 1.

        Where there is none yet, the mean of all windows up to then; NaN where there is none of those either.
        """
        count, season = len(series), self._season
        filled, known = np.nan_to_num(series), (~np.isnan(series)).astype(float)
        sums, counts = filled.copy(), known.copy()
        for start in range(season, count, season):  # a running sum along each phase
            stop = min(start + season, count)
            sums[start:stop] += sums[start - season : stop - season]
            counts[start:stop] += counts[start - season : stop - season]
        lag = -(-distance // season) * season
        result = np.full(count + distance, np.nan)
        upto = np.minimum(np.arange(count + distance) - distance, count - 1)
        total, number = np.cumsum(filled), np.cumsum(known)
        anywhere = upto >= 0
        with np.errstate(invalid="ignore", divide="ignore"):
            result[anywhere] = (total / number)[upto[anywhere]]
            source = np.arange(lag, min(count + lag, count + distance))
            phase = sums[source - lag] / counts[source - lag]
        has_phase = ~np.isnan(phase)
        result[source[has_phase]] = phase[has_phase]
        return result

    @staticmethod
    def _drift(residuals: Floats) -> Floats:
        """For each window the weighted mean of the ten residuals up to it, gaps left out; 0 where there is none."""
        known = ~np.isnan(residuals)
        weights = 0.5 ** np.arange(_RESIDUALS)
        sums = np.convolve(np.where(known, residuals, 0.0), weights)[: len(residuals)]
        totals = np.convolve(known.astype(float), weights)[: len(residuals)]
        return np.divide(sums, totals, out=np.zeros_like(sums), where=totals > 0)


def last_values(series: Floats, distance: int) -> Floats:
    """For each past window the newest known one, `distance` windows or more before. (n, windows) to the same shape."""
    width = series.shape[1]
    newest = np.maximum.accumulate(np.where(np.isnan(series), -1, np.arange(width)), axis=1)
    held = np.where(newest < 0, np.nan, np.take_along_axis(series, np.maximum(newest, 0), axis=1))
    return _shifted(held, distance)


def seasonal_naive(series: Floats, distance: int, season: int) -> Floats:
    """For each past window the same one of the newest season that was over `distance` windows before.

    (n, windows) to the same shape. The last value where there is none.
    """
    back = -(-distance // season) * season
    past = _shifted(series, back)
    return np.where(np.isnan(past), last_values(series, distance), past)


def _shifted(series: Floats, by: int) -> Floats:
    unknown = np.full((len(series), min(by, series.shape[1])), np.nan)
    return np.concatenate([unknown, series[:, : series.shape[1] - unknown.shape[1]]], axis=1)
