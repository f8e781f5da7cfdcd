"""What the learnt predictor looks at: numbers of many series at once, each from what lies before a moment. Pure.

All that has the unit of the series is divided by the series' scale (its mean of late), so that one model serves series
of any size. Unknown is NaN, which LightGBM splits on as on any value.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

Floats = NDArray[np.float64]

LAGS = (0, 1, 2, 3, 4, 5, 6, 8, 11)
DRIFT = 10  # residuals that the published predictor looks back on
DAYS = 28  # past days that seasonal means look back on
_SPANS = (3, 6, 18, 36)
TINY = 1e-9
_QUIET = 0.05  # of the mean of all windows: the least scale
_ROWS = 20_000  # rows worked on at once, for the memory's sake


@dataclass(frozen=True)
class Features:
    """Of `rows` moments: what the model sees, and what turns its answer into the series' unit."""

    values: NDArray[np.float32]
    """Shape (rows, features)."""
    base: Floats
    """Shape (rows,): the level of the last windows, in scales."""
    scale: Floats
    """Shape (rows,): the series' mean of late, in its own unit, above 0; NaN where nothing of it is known."""
    roughness: Floats
    """Shape (rows,): mean step from window to window over the last day, in scales; NaN where nothing is known."""


def features(series: Floats, origins: NDArray[np.int64], distance: int, season: int) -> Features:
    """Features of the windows `distance` after each origin.

    `series`: shape (n, windows), NaN in gaps and before a series begins. `origins`: the last windows that may be looked
    at, each within the series. Rows are in the order of series, then origins.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # means of nothing: NaN is what they shall be
        step = max(1, _ROWS // max(1, len(origins)))
        parts = [
            _features(series[at : at + step], origins, distance, season) for at in range(0, max(1, len(series)), step)
        ]
    return Features(
        np.concatenate([part.values for part in parts]),
        np.concatenate([part.base for part in parts]),
        np.concatenate([part.scale for part in parts]),
        np.concatenate([part.roughness for part in parts]),
    )


def _features(series: Floats, origins: NDArray[np.int64], distance: int, season: int) -> Features:
    # `past` holds enough unknown windows in front that every origin can look back on a whole season and its drift.
    first = int(origins.min())
    front = max(0, season + DRIFT - first)
    past = np.concatenate([np.full((len(series), front), np.nan), series], axis=1)
    at = origins + front
    day = sliding_window_view(past, season, axis=1)[:, at - season + 1]  # (n, origins, season), the newest last
    mean_day: Floats = np.nanmean(day, axis=2)
    ewm = _newest_first(past, at, 6)
    weights: Floats = np.power(0.6, np.arange(6))
    level: Floats = np.nansum(ewm * weights, axis=2) / np.where(np.isnan(ewm), 0, weights).sum(axis=2)

    phases = _same_phase(past, at + distance, at, season)  # (n, origins, days), the newest first
    phase_mean: Floats = np.nanmean(phases, axis=2)
    drift_at = at[:, None] - np.arange(DRIFT)
    residual_phases = _same_phase(past, drift_at.ravel(), drift_at.ravel() - 1, season)
    residual = past[:, drift_at.ravel()] - np.nanmean(residual_phases, axis=2)
    residual = residual.reshape(len(series), len(at), DRIFT)
    halves: Floats = np.power(0.5, np.arange(DRIFT))
    drift = np.nansum(residual * halves, axis=2) / np.maximum(np.where(np.isnan(residual), 0, halves).sum(axis=2), TINY)
    published = np.maximum(phase_mean + drift, 0)

    known_mean: Floats = np.where(np.isnan(mean_day), phase_mean, mean_day)
    scale = 0.7 * known_mean + 0.3 * np.where(np.isnan(level), known_mean, level)
    # A quiet day of a busy series is no series of another size.
    scale = np.maximum(np.nan_to_num(scale), _QUIET * _mean_so_far(past)[:, at])
    scale = np.where(np.isnan(known_mean) & np.isnan(level), np.nan, np.maximum(scale, TINY))

    columns = [past[:, at - lag] for lag in LAGS]
    columns += [level, mean_day, np.nanmax(day, axis=2), np.nanmin(day, axis=2), np.nanstd(day, axis=2)]
    for span in _SPANS:
        recent = day[:, :, -span:]
        columns += [np.nanmean(recent, axis=2), np.nanstd(recent, axis=2), np.nanmax(recent, axis=2)]
        columns += [np.nanmin(recent, axis=2)]
    # The same window of past days, those around it, and how those days stood at the origin.
    columns += [phases[:, :, 0], phases[:, :, 1], phases[:, :, 2], phase_mean, np.nanstd(phases, axis=2), published]
    columns += [np.nanmax(phases, axis=2), np.nanmin(phases, axis=2)]
    around = np.stack([_days_ago(past, at + distance + shift, 1, season) for shift in (-3, -2, -1, 1, 2, 3)])
    columns += [np.nanmean(around[2:4], axis=0), np.nanmean(around, axis=0), np.nanmax(around, axis=0)]
    then = np.nanmean(np.stack([_days_ago(past, at - lag, 1, season) for lag in range(6)]), axis=0)
    columns += [then, drift, residual[:, :, 0]]
    in_scales = [column / scale for column in columns]
    steps = np.abs(np.diff(day, axis=2))
    roughness = np.nanmean(steps, axis=2) / scale
    now = past[:, at]
    seasonal_swing = np.nanmean(np.abs(residual), axis=2) / scale
    plain = [
        roughness,
        np.nanmean(steps[:, :, -12:], axis=2) / scale,
        seasonal_swing,
        np.nanmean(day == 0, axis=2),
        np.log(scale),
        now / np.maximum(level, TINY),
        level / np.maximum(then, 0.01 * scale),
        (np.isnan(day)).mean(axis=2),
        np.broadcast_to(np.sin((at + distance - front) * (2 * np.pi / season)), scale.shape),
        np.broadcast_to(np.cos((at + distance - front) * (2 * np.pi / season)), scale.shape),
    ]
    base = np.nan_to_num(np.where(np.isnan(level), known_mean, level) / scale)
    values = np.stack([*in_scales, *plain], axis=2).reshape(base.size, len(in_scales) + len(plain))
    values = np.clip(values, -1e6, 1e6, out=values).astype(np.float32)
    return Features(values, base.ravel(), scale.ravel(), roughness.ravel())


def _mean_so_far(past: Floats) -> Floats:
    """For each window the mean of all known ones up to it; 0 where there is none."""
    known = np.cumsum(~np.isnan(past), axis=1)
    means: Floats = np.cumsum(np.nan_to_num(past), axis=1) / np.maximum(known, 1)
    return means


def _newest_first(past: Floats, at: NDArray[np.int64], count: int) -> Floats:
    """The `count` windows up to each of `at`: shape (n, at, count)."""
    newest: Floats = past[:, at[:, None] - np.arange(count)]
    return newest


def _days_ago(past: Floats, target: NDArray[np.int64], days: NDArray[np.int64] | int, season: int) -> Floats:
    """The window `days` seasons before each target; NaN where the series does not reach."""
    index = target - days * season
    reached = (index >= 0) & (index < past.shape[1])
    return np.where(reached, past[:, np.clip(index, 0, past.shape[1] - 1)], np.nan)


def _same_phase(past: Floats, target: NDArray[np.int64], last: NDArray[np.int64], season: int) -> Floats:
    """The windows of the target's phase that are not after `last`, newest first: shape (n, targets, days)."""
    ahead = -(-(target - last) // season)  # seasons to go back until the window is known
    days = min(DAYS, max(3, past.shape[1] // season + 1))
    return np.stack([_days_ago(past, target, ahead + day, season) for day in range(days)], axis=2)
