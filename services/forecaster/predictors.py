"""Predictors: from series of past windows to quantiles of the next ones. Pure: no clock, no I/O."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

LEVELS = (0.5, 0.9, 0.99)
QUANTITIES = ("mean_load", "peak_load", "request_rate", "prompt_tokens_per_s", "output_tokens_per_s")
MEAN_LOAD, PEAK_LOAD = 0, 1  # columns of QUANTITIES
_RESIDUALS = 10
_ERRORS = 1000  # the newest windows whose errors quantiles are taken from
_MIN_ERRORS = 5
_PRIOR = (0.0, 0.0, 1.0)  # of a quantity of which nothing is known
_VALUES = 500_000  # windows worked on at once, for the memory's sake

Floats = NDArray[np.float64]


class Predictor(Protocol):
    """What the forecaster asks of a predictor.

    Forecasts have a last axis of the levels p50, p90, p99. They are never negative, never NaN, and never decrease along
    it. Past windows are oldest first, NaN in gaps and before a series begins; there may be none.
    """

    @property
    def name(self) -> str:
        """How forecasts are signed."""
        ...

    def predict_many(self, series: Floats, horizon: int) -> Floats:
        """Of one quantity: from shape (n, windows) to (n, horizon, 3), the windows that follow."""
        ...

    def forecast_all(self, history: Floats, horizon: int) -> Floats:
        """Of all QUANTITIES: from shape (n, windows, 5) to (n, horizon, 5, 3). No peak is below its mean."""
        ...

    def at(self, series: Floats, origins: NDArray[np.int64], distance: int) -> Floats:
        """Of one quantity, what would have been forecast at past moments: for each of `origins`, the last window then
        known, the window `distance` after it. From shape (n, windows) to (n, origins, 3).
        """
        ...


@dataclass(frozen=True)
class _Past:
    """What all distances have in common. Each of shape (n, windows)."""

    series: Floats
    overall: Floats  # the mean of all windows up to each
    phase: Floats  # the mean of the windows of its phase up to each
    drift: Floats  # the weighted mean of the last residuals


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

    def predict_many(self, series: Floats, horizon: int) -> Floats:
        """See Predictor."""
        result = np.tile(np.array(_PRIOR), (len(series), horizon, 1))
        if series.shape[1]:
            last = np.array([series.shape[1] - 1])
            rows = max(1, _VALUES // series.shape[1])
            for first in range(0, len(series), rows):
                some = series[first : first + rows]
                past = self._look_back(some)
                each = [self._at(past, last, step + 1)[:, 0] for step in range(horizon)]
                result[first : first + rows] = np.stack(each, axis=1)
        return result

    def forecast_all(self, history: Floats, horizon: int) -> Floats:
        """See Predictor."""
        each = [self.predict_many(history[:, :, column], horizon) for column in range(len(QUANTITIES))]
        return with_peaks_above_means(np.stack(each, axis=2))

    def points(self, series: Floats, distance: int) -> Floats:
        """For each past window what was forecast for it `distance` windows before; NaN where nothing was.

        (n, windows) to the same shape.
        """
        past = self._look_back(series)
        return self._past(self._seasonal(past, distance), past.drift, distance)

    def at(self, series: Floats, origins: NDArray[np.int64], distance: int) -> Floats:
        """See Predictor."""
        return self._at(self._look_back(series), origins, distance)

    def _at(self, past: _Past, origins: NDArray[np.int64], distance: int) -> Floats:
        series, drift = past.series, past.drift
        seasonal = self._seasonal(past, distance)  # one entry for each past window, and `distance` future ones
        errors = series - self._past(seasonal, drift, distance)
        result = np.empty((len(series), len(origins), len(LEVELS)))
        for index, origin in enumerate(origins):
            point = np.maximum(seasonal[:, origin + distance] + drift[:, origin], 0.0)
            newest = errors[:, max(0, origin + 1 - _ERRORS) : origin + 1]
            spread = _upper(newest)
            few = (~np.isnan(newest)).sum(axis=1) < _MIN_ERRORS
            # Too little is known of its errors: as far apart as the windows themselves have been.
            spread[few] = _upper(series[few, : origin + 1] - point[few, None])
            # The median is the rule's own; only what lies above it is moved.
            above = np.maximum.accumulate(np.maximum(spread, 0.0), axis=1)
            known = ~np.isnan(point)
            result[:, index] = np.where(known[:, None], np.column_stack([point, point[:, None] + above]), _PRIOR)
        return result

    def _past(self, seasonal: Floats, drift: Floats, distance: int) -> Floats:
        """What was forecast for past windows `distance` windows before; as many as there is drift of."""
        count = drift.shape[1]
        past = np.full(drift.shape, np.nan)
        past[:, distance:] = np.maximum(seasonal[:, distance:count] + drift[:, : max(count - distance, 0)], 0)
        return past

    def _look_back(self, series: Floats) -> _Past:
        count, season = series.shape[1], self._season
        filled, known = np.nan_to_num(series), (~np.isnan(series)).astype(float)
        with np.errstate(invalid="ignore", divide="ignore"):
            overall = np.cumsum(filled, axis=1) / np.cumsum(known, axis=1)
            for start in range(season, count, season):  # a running sum along each phase
                stop = min(start + season, count)
                filled[:, start:stop] += filled[:, start - season : stop - season]
                known[:, start:stop] += known[:, start - season : stop - season]
            past = _Past(series, overall, filled / known, np.empty(0))
        residuals = series - self._seasonal(past, 1)[:, :count]
        return replace(past, drift=_drift(residuals))

    def _seasonal(self, past: _Past, distance: int) -> Floats:
        """For each window t < windows + distance: the mean of its phase over days before t - distance + 1.

        Where there is none yet, the mean of all windows up to then; NaN where there is none of those either.
        """
        count = past.series.shape[1]
        lag = -(-distance // self._season) * self._season
        result = np.full((len(past.series), count + distance), np.nan)
        result[:, distance:] = past.overall
        source = np.arange(lag, min(count + lag, count + distance))
        phase = past.phase[:, source - lag]
        result[:, source] = np.where(np.isnan(phase), result[:, source], phase)
        return result


def _drift(residuals: Floats) -> Floats:
    """For each window the weighted mean of the ten residuals up to it, gaps left out; 0 where there is none."""
    known = ~np.isnan(residuals)
    filled = np.where(known, residuals, 0.0)
    sums, totals = np.zeros_like(filled), np.zeros_like(filled)
    for back in range(min(_RESIDUALS, residuals.shape[1])):
        kept = slice(0, residuals.shape[1] - back)
        sums[:, back:] += filled[:, kept] * 0.5**back
        totals[:, back:] += known[:, kept] * 0.5**back
    return np.divide(sums, totals, out=np.zeros_like(sums), where=totals > 0)


def with_peaks_above_means(forecasts: Floats) -> Floats:
    """Raises quantiles of the peak to those of the mean, in place. Shape (..., 5, 3)."""
    forecasts[..., PEAK_LOAD, :] = np.maximum(forecasts[..., PEAK_LOAD, :], forecasts[..., MEAN_LOAD, :])
    return forecasts


def _upper(values: Floats) -> Floats:
    """The quantiles above the median of each row's known values, interpolated linearly; 0 where none is known."""
    order = np.sort(values, axis=1)  # NaN last
    last = (~np.isnan(order)).sum(axis=1) - 1
    quantiles = np.zeros((len(values), len(LEVELS) - 1))
    rows = np.flatnonzero(last >= 0)
    for column, level in enumerate(LEVELS[1:]):
        place = last[rows] * level
        below = place.astype(int)
        lower, upper = order[rows, below], order[rows, np.minimum(below + 1, last[rows])]
        quantiles[rows, column] = lower + (upper - lower) * (place - below)
    return quantiles


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
