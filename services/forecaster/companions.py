"""The other quantities from the mean load: what each request in progress brings along changes slowly. Pure.

Little's law says mean load = request rate x mean time in the system; so rates and tokens are the load times what they
have been per load of late. A peak lies above its mean by a multiple of the mean's square root, as in a queue with
many servers. How far that has been off on the same series is added to the load's own doubt, as independent errors are.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np

from services.forecaster.features import Floats, Moments
from services.forecaster.predictors import LEVELS, MEAN_LOAD, PEAK_LOAD, QUANTITIES, with_peaks_above_means

_KEEP = 0.9  # of a window's weight, left one window later
_MIN_WEIGHT = 1e-9
_FACTORS = (0.25, 4.0)
_AIMS = (0.9, 0.993)


@dataclass(frozen=True)
class Companions:
    """How the quantities of QUANTITIES hang on the mean load."""

    usual: Floats
    """Shape (5,): per load, or for the peak per its square root, over all series: for those without a past."""
    factors: Floats
    """Shape (5, 2): by how much spreads above the median are multiplied, per quantity."""

    def derive(self, recent: Floats, load: Floats) -> Floats:
        """From quantiles of the mean load, shape (n, horizon, 3), to those of all: shape (n, horizon, 5, 3).

        `recent`: shape (n, windows, 5), the last day or so.
        """
        level, off = _levels(recent, self.usual)
        forecasts = np.empty((*load.shape[:2], len(QUANTITIES), len(LEVELS)))
        forecasts[:, :, MEAN_LOAD] = load
        for quantity in range(len(QUANTITIES)):
            if quantity == MEAN_LOAD:
                continue
            per = level[:, quantity, None]
            carrier = np.sqrt(load) if quantity == PEAK_LOAD else load
            own = per[:, :, None] * carrier
            middle = own[:, :, 0] + (load[:, :, 0] if quantity == PEAK_LOAD else 0)
            of_load = own[:, :, 1:] - own[:, :, :1]
            if quantity == PEAK_LOAD:
                of_load = of_load + load[:, :, 1:] - load[:, :, :1]
            of_level = off[:, None, quantity] * carrier[:, :, :1]
            spread = np.hypot(of_load, of_level) * self.factors[quantity]
            forecasts[:, :, quantity, 0] = middle
            forecasts[:, :, quantity, 1:] = middle[:, :, None] + np.maximum.accumulate(spread, axis=2)
        return with_peaks_above_means(forecasts)


def learn_companions(history: Floats, origins: Moments, distance: int, load: Floats, season: int) -> Companions:
    """From shape (n, windows, 5) and the mean load's quantiles as they were forecast `distance` windows ahead at each
    of `origins`: shape (n, origins, 3). No forecast looks past its origin; the factors are learned from what came.
    """
    usual = _usual(history)
    plain = Companions(usual, np.ones((len(QUANTITIES), len(LEVELS) - 1)))
    scores: list[list[Floats]] = [[] for _ in QUANTITIES]
    for index, origin in enumerate(origins):
        recent = history[:, max(0, origin + 1 - season) : origin + 1]
        forecast = plain.derive(recent, load[:, index : index + 1])[:, 0]
        actual = history[:, origin + distance]
        for quantity in range(len(QUANTITIES)):
            spread = forecast[:, quantity, 1:] - forecast[:, quantity, :1]
            error = (actual[:, quantity] - forecast[:, quantity, 0])[:, None]
            told = ~np.isnan(error[:, 0]) & (spread[:, 0] > 0)
            scores[quantity].append(error[told] / spread[told])
    factors = plain.factors.copy()
    for quantity, parts in enumerate(scores):
        all_scores = np.concatenate(parts)
        if quantity != MEAN_LOAD and len(all_scores):
            for column, aim in enumerate(_AIMS):
                factors[quantity, column] = np.clip(np.quantile(all_scores[:, column], aim), *_FACTORS)
    return Companions(usual, factors)


def _parts(history: Floats) -> tuple[Floats, Floats]:
    """What hangs on the load, and what it hangs on, both (n, windows, 5), 0 where either is unknown."""
    load = history[:, :, :1]
    whole = history.copy()
    whole[:, :, PEAK_LOAD] -= load[:, :, 0]
    carriers = np.repeat(load, len(QUANTITIES), axis=2)
    carriers[:, :, PEAK_LOAD] = np.sqrt(carriers[:, :, PEAK_LOAD])
    known = ~np.isnan(whole) & ~np.isnan(carriers)
    return np.where(known, whole, 0.0), np.where(known, carriers, 0.0)


def _usual(history: Floats) -> Floats:
    """Shape (5,): the median of the series' own means."""
    whole, carriers = _parts(history)
    sums, by = whole.sum(axis=1), carriers.sum(axis=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # medians of nothing
        usual: Floats = np.nanmedian(np.where(by > 0, sums / np.where(by > 0, by, 1), np.nan), axis=0)
    return np.nan_to_num(usual)


def _levels(recent: Floats, usual: Floats) -> tuple[Floats, Floats]:
    """What hangs on the load per what it hangs on, now, shape (n, 5), and by how much more the next window's may be:
    quantiles above the median, shape (n, 5, 2)."""
    whole, carriers = _parts(recent)
    sums, by = np.zeros((len(recent), len(QUANTITIES))), np.zeros((len(recent), len(QUANTITIES)))
    errors = np.full(whole.shape, np.nan)
    for at in range(recent.shape[1]):
        level = np.where(by > _MIN_WEIGHT, sums / np.maximum(by, _MIN_WEIGHT), usual)
        carrier = carriers[:, at]
        told = (carrier > _MIN_WEIGHT) & (by > _MIN_WEIGHT)
        errors[:, at] = np.where(told, whole[:, at] / np.where(told, carrier, 1) - level, np.nan)
        sums = sums * _KEEP + whole[:, at]
        by = by * _KEEP + carrier
    level = np.where(by > _MIN_WEIGHT, sums / np.maximum(by, _MIN_WEIGHT), usual)
    return level, np.maximum(_upper(errors), 0.0)


def _upper(errors: Floats) -> Floats:
    """Quantiles above the median along the second axis, of what is known: (n, windows, 5) to (n, 5, 2)."""
    order = np.sort(errors, axis=1)  # NaN last
    count = (~np.isnan(errors)).sum(axis=1)  # (n, 5)
    quantiles = np.zeros((*count.shape, len(LEVELS) - 1))
    if errors.shape[1]:
        for column, quantile in enumerate(LEVELS[1:]):
            place = np.minimum(np.ceil(count * quantile), np.maximum(count, 1) - 1).astype(int)
            found = np.take_along_axis(order, place[:, None, :], axis=1)[:, 0]
            quantiles[:, :, column] = np.where(count > 0, found, 0.0)
    return quantiles
