"""What the learnt predictor looks at: numbers of many series at once, each from what lies before a moment. Pure.

All that has the unit of the series is divided by the series' scale (its mean of late), so that one model serves series
of any size. Unknown is NaN, which LightGBM splits on as on any value.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Moments = NDArray[np.int64]

LAGS = (0, 1, 2, 3, 4, 5, 6, 8, 11, 12, 17, 23, 35, 47)
DRIFT = 10  # residuals that the published predictor looks back on
DAYS = 28  # past days that seasonal means look back on
_CHANGES = 10  # past days whose change from the origin's hour to the target's is looked at
_FADING = 0.6  # weight of a day's change, one day later
_SPANS = (3, 6, 18, 36)
_MEDIANS = (3, 5, 9, 18)  # windows; a dip of one window moves a mean, not a median
_DAY_QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
_HOURS = (6, 24)  # past hours whose habits are looked at
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

    def rows(self, which: NDArray[np.bool_]) -> Features:
        """Some of the moments."""
        return Features(self.values[which], self.base[which], self.scale[which], self.roughness[which])


def joined(parts: Sequence[Features]) -> Features:
    """The moments of several, one after the other."""
    return Features(
        np.concatenate([one.values for one in parts]),
        np.concatenate([one.base for one in parts]),
        np.concatenate([one.scale for one in parts]),
        np.concatenate([one.roughness for one in parts]),
    )


def features(series: Floats, origins: Moments, distances: Sequence[int], season: int) -> list[Features]:
    """For each of `distances` the features of the windows that far after each origin.

    `series`: shape (n, windows), NaN in gaps and before a series begins. `origins`: the last windows that may be looked
    at, increasing, each within the series. Rows are in the order of series, then origins.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # means of nothing: NaN is what they shall be
        step = max(1, _ROWS // max(1, len(origins)))
        parts = [
            _features(series[at : at + step], origins, distances, season) for at in range(0, max(1, len(series)), step)
        ]
    return [joined(of_distance) for of_distance in zip(*parts, strict=True)]


def _features(series: Floats, origins: Moments, distances: Sequence[int], season: int) -> list[Features]:
    # `past` holds enough unknown windows in front that every origin can look back on a whole season and its drift, and
    # has all lags.
    front = max(0, max(season + DRIFT, *LAGS) - int(origins.min()))
    usual = _mean_so_far(series, origins)
    past = np.concatenate([np.full((len(series), front), np.nan), series], axis=1)
    at = origins + front
    day = sliding_window_view(past, season, axis=1)[:, at - season + 1]  # (n, origins, season), the newest last
    mean_day: Floats = np.nanmean(day, axis=2)
    level = _fading_mean(past, at, 0.6, 6)
    slow, slower = _fading_mean(past, at, 0.8, 20), _fading_mean(past, at, 0.93, 60)
    drift_at = at[:, None] - np.arange(DRIFT)
    residual_phases = _same_phase(past, drift_at.ravel(), drift_at.ravel() - 1, season)
    residual = past[:, drift_at.ravel()] - np.nanmean(residual_phases, axis=2)
    residual = residual.reshape(len(series), len(at), DRIFT)
    halves: Floats = np.power(0.5, np.arange(DRIFT))
    drift = np.nansum(residual * halves, axis=2) / np.maximum(np.where(np.isnan(residual), 0, halves).sum(axis=2), TINY)
    phases = [
        _same_phase(past, at + distance, at, season) for distance in distances
    ]  # (n, origins, days), newest first

    known_mean: Floats = np.where(np.isnan(mean_day), np.nanmean(phases[0], axis=2), mean_day)
    scale = 0.7 * known_mean + 0.3 * np.where(np.isnan(level), known_mean, level)
    # A quiet day of a busy series is no series of another size.
    scale = np.maximum(np.nan_to_num(scale), _QUIET * usual)
    scale = np.where(np.isnan(known_mean) & np.isnan(level), np.nan, np.maximum(scale, TINY))
    base = np.nan_to_num(np.where(np.isnan(level), known_mean, level) / scale)

    columns = [past[:, at - lag] for lag in LAGS]
    columns += [level, mean_day, np.nanmax(day, axis=2), np.nanmin(day, axis=2), np.nanstd(day, axis=2)]
    for span in _SPANS:
        recent = day[:, :, -span:]
        columns += [np.nanmean(recent, axis=2), np.nanstd(recent, axis=2), np.nanmax(recent, axis=2)]
        columns += [np.nanmin(recent, axis=2)]
    then = np.nanmean(np.stack([_known(past, at - lag - season, at) for lag in range(6)]), axis=0)
    columns += [then, drift, residual[:, :, 0], slow, slower, level - slow, slow - slower]
    moves = np.diff(day, axis=2)
    steps = np.abs(moves)
    roughness = np.nanmean(steps, axis=2) / scale
    columns += [np.nanmean(steps[:, :, -12:], axis=2), np.nanmean(np.abs(residual), axis=2)]
    columns += [column for span in _MEDIANS for column in _quantiles(day[:, :, -span:], (0.5,))]
    columns += _quantiles(day, _DAY_QUANTILES)
    usual_step, recent_step = _quantiles(steps, (0.5,))[0], _quantiles(steps[:, :, -12:], (0.5,))[0]
    columns += [usual_step, recent_step]
    shared = [column / scale for column in columns]
    newest = past[:, at]
    shared += [
        (newest - _quantiles(day[:, :, -9:], (0.5,))[0]) / (usual_step + 1e-3 * scale),
        np.mean(day < newest[:, :, None], axis=2),
        # Below 0 where what goes up comes down at once.
        np.nansum(moves[:, :, 1:] * moves[:, :, :-1], axis=2) / (np.nansum(moves**2, axis=2) + TINY),
        roughness,
        np.nanmean(day == 0, axis=2),
        np.log(scale),
        newest / np.maximum(level, TINY),
        level / np.maximum(then, 0.01 * scale),
        (np.isnan(day)).mean(axis=2),
    ]
    hour = max(1, season // _HOURS[-1])
    count = season // hour
    hours = day[:, :, -count * hour :].reshape(len(series), len(at), count, hour)  # the newest ends at the origin
    result = []
    for distance, phase in zip(distances, phases, strict=True):
        own = _of_distance(past, at, distance, phase, drift, season)
        own += _changes(past, at, distance, level, season)
        own += _habits(hours, distance)
        target = at + distance - front
        clock = [
            np.sin(target * (2 * np.pi / season)),
            np.cos(target * (2 * np.pi / season)),
            target % season % hour / hour,
        ]
        columns = [*shared, *(column / scale for column in own), *(np.broadcast_to(of, scale.shape) for of in clock)]
        values = np.stack(columns, axis=2).reshape(base.size, len(columns))
        values = np.clip(values, -1e6, 1e6, out=values).astype(np.float32)
        result.append(Features(values, base.ravel(), scale.ravel(), roughness.ravel()))
    return result


def _of_distance(past: Floats, at: Moments, distance: int, phases: Floats, drift: Floats, season: int) -> list[Floats]:
    """The same window of past days, those around it, and the published forecast."""
    mean: Floats = np.nanmean(phases, axis=2)
    around = np.stack([_known(past, at + distance + shift - season, at) for shift in (-3, -2, -1, 1, 2, 3)])
    return [
        *(phases[:, :, day] for day in range(3)),
        mean,
        np.nanstd(phases, axis=2),
        np.maximum(mean + drift, 0),
        np.nanmax(phases, axis=2),
        np.nanmin(phases, axis=2),
        np.nanmean(around[2:4], axis=0),
        np.nanmean(around, axis=0),
        np.nanmax(around, axis=0),
    ]


def _changes(past: Floats, at: Moments, distance: int, level: Floats, season: int) -> list[Floats]:
    """How past days went on from the origin's hour to the target's, and what comes if this day does the same."""
    days = np.arange(1, min(_CHANGES, max(1, past.shape[1] // season)) + 1) * season

    def mean_around(moment: Moments, shifts: range) -> Floats:
        index = moment[:, None, None] - days[:, None] + np.array(shifts)
        mean: Floats = np.nanmean(_known(past, index, at[:, None, None]), axis=3)
        return mean  # (n, origins, days)

    then, target = mean_around(at, range(-2, 1)), mean_around(at + distance, range(-1, 2))
    wide = mean_around(at + distance, range(-3, 4))
    change = target - then
    weights: Floats = np.power(_FADING, np.arange(len(days)))
    likely = _weighted_mean(change, weights)
    growth = np.nanmean(target, axis=2) / np.maximum(np.nanmean(then, axis=2), TINY)
    return [
        change[:, :, 0],
        np.nanmean(change, axis=2),
        likely,
        level + likely,
        level * np.clip(growth, 0.2, 5),
        np.nanmean(wide, axis=2),
        _weighted_mean(wide, weights),
    ]


def _habits(hours: Floats, distance: int) -> list[Floats]:
    """How far the target's place in the hour was above the rest of its hour, of late: jobs start on the full hour."""
    above = hours[:, :, :, (distance - 1) % hours.shape[3]] - np.nanmean(hours, axis=3)
    return [np.nanmean(above[:, :, -count:], axis=2) for count in _HOURS]


def _quantiles(values: Floats, levels: Sequence[float]) -> list[Floats]:
    """Along the last axis, of what is known, no value between two; NaN where nothing is known."""
    order = np.sort(values, axis=-1)  # NaN last
    last = np.maximum((~np.isnan(order)).sum(axis=-1, keepdims=True) - 1, 0)
    return [np.take_along_axis(order, (last * level).astype(int), axis=-1)[..., 0] for level in levels]


def _fading_mean(past: Floats, at: Moments, keep: float, count: int) -> Floats:
    """The mean of the last `count` windows, each weighing `keep` of the one after it: shape (n, origins)."""
    newest = _known(past, at[:, None] - np.arange(count), at[:, None])
    return _weighted_mean(newest, np.power(keep, np.arange(count)))


def _weighted_mean(values: Floats, weights: Floats) -> Floats:
    """Along the last axis, of what is known; NaN where nothing is."""
    mean: Floats = np.nansum(values * weights, axis=-1) / np.where(np.isnan(values), 0, weights).sum(axis=-1)
    return mean


def _mean_so_far(series: Floats, origins: Moments) -> Floats:
    """The mean of all known windows up to each origin, 0 where there is none: shape (n, origins)."""
    known = ~np.isnan(series[:, : origins[-1] + 1])
    starts = np.concatenate([[0], origins[:-1] + 1])  # of what each origin adds to the one before
    sums = np.cumsum(np.add.reduceat(np.where(known, series[:, : origins[-1] + 1], 0.0), starts, axis=1), axis=1)
    counts = np.cumsum(np.add.reduceat(known, starts, axis=1, dtype=float), axis=1)
    means: Floats = sums / np.maximum(counts, 1)
    return means


def _known(past: Floats, index: Moments, last: Moments) -> Floats:
    """Windows by their index; NaN before the series and after `last`."""
    reached = (index >= 0) & (index <= last)
    return np.where(reached, past[:, np.clip(index, 0, past.shape[1] - 1)], np.nan)


def _same_phase(past: Floats, target: Moments, last: Moments, season: int) -> Floats:
    """The windows of the target's phase that are not after `last`, newest first: shape (n, targets, days)."""
    ahead = -(-(target - last) // season)  # seasons to go back until the window is known
    days = min(DAYS, max(3, past.shape[1] // season + 1))
    return _known(past, target[:, None] - (ahead[:, None] + np.arange(days)) * season, last[:, None])
