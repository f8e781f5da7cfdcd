"""The learnt predictor: gradient-boosted quantiles over all series at once, calibrated on days unseen. Pure.

One LightGBM model per anchor (a distance ahead) and quantile; distances between anchors lie between their forecasts.
Calibration is split-conformal (Romano et al., Conformalized Quantile Regression, 2019), in multiples of the model's own
spread and per class of series: how much a series steps from window to window.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import lightgbm
import numpy as np
from numpy.typing import NDArray

from services.forecaster.features import TINY, Features, Floats, features
from services.forecaster.predictors import LEVELS, PublishedPredictor

ANCHORS = (1, 3, 6, 12)
MAX_HORIZON = ANCHORS[-1]
_MIN_DAYS = 3  # of history: two to calibrate on and one to learn from
_HELD_OUT_DAYS = 2
_MAX_ROWS = 100_000  # rows that one model learns from; what goes beyond is thinned out
_ROUNDS = 200
_CLASSES = 4
_FACTORS = (1.0, 4.0)  # calibration never narrows a spread: two days show too little to be bolder than all days
_AIMS = (
    0.905,
    0.993,
)  # coverage that p90 and p99 are calibrated to: the next day is less like those before than they are
_WEIGHT = 0.25  # power of the scale that rows weigh: between each series alike and each request alike
_PARAMETERS = {
    "objective": "quantile",
    "learning_rate": 0.05,
    "num_leaves": 15,
    "min_data_in_leaf": 100,
    "feature_fraction": 0.5,
    "bagging_fraction": 0.7,
    "bagging_freq": 1,
    "lambda_l2": 1.0,
    "max_bin": 127,
    "seed": 1,
    "deterministic": True,
    "force_row_wise": True,
    "num_threads": 1,
    "verbose": -1,
}


@dataclass(frozen=True)
class Calibration:
    """By how much the spreads above the median are multiplied, per class of series."""

    edges: Floats
    """Shape (classes - 1,): roughness between one class and the next."""
    factors: Floats
    """Shape (classes, levels above the median)."""

    def apply(self, quantiles: Floats, roughness: Floats) -> Floats:
        """`quantiles`: shape (rows, 3), not crossing. The same shape."""
        classes = np.searchsorted(self.edges, np.nan_to_num(roughness, nan=np.inf))
        median = quantiles[:, :1]
        spread = (quantiles[:, 1:] - median) * self.factors[classes]
        return np.hstack([median, median + np.maximum.accumulate(spread, axis=1)])


@dataclass(frozen=True)
class _Anchor:
    boosters: tuple[lightgbm.Booster, ...]  # one per level
    calibration: Calibration


class LearnedPredictor:
    """See the module. Made by `fit`."""

    name = "learned"

    def __init__(self, season: int, anchors: dict[int, _Anchor]) -> None:
        self._season = season
        self._anchors = anchors
        self._published = PublishedPredictor(season)

    def predict(self, series: Floats, horizon: int) -> Floats:
        """See Predictor. ValueError for a horizon beyond MAX_HORIZON."""
        quantiles: Floats = self.predict_many(series[None, :], horizon)[0]
        return quantiles

    def predict_many(self, series: Floats, horizon: int) -> Floats:
        """Of several series at once: shape (n, windows), filled with NaN in front where they differ in length.

        Returns shape (n, horizon, 3). ValueError for a horizon beyond MAX_HORIZON.
        """
        if horizon > MAX_HORIZON:
            raise ValueError(
                f"learned for up to {MAX_HORIZON} windows ahead, not {horizon}; use the published predictor"
            )
        if not series.shape[1]:
            return self._fall_back(series, horizon)
        at = np.array([series.shape[1] - 1])
        used = [anchor for anchor in ANCHORS if anchor < horizon]
        used.append(next(anchor for anchor in ANCHORS if anchor >= horizon))
        answers = np.empty((len(used), len(series), len(LEVELS)))
        known = np.ones(len(series), bool)
        for index, distance in enumerate(used):
            seen = features(series, at, distance, self._season)
            answers[index] = self._at(distance, seen)
            known &= ~np.isnan(seen.scale)
        result = np.empty((len(series), horizon, len(LEVELS)))
        for step in range(horizon):
            right = int(np.searchsorted(used, step + 1))
            left = max(right - 1, 0)
            share = (step + 1 - used[left]) / (used[right] - used[left]) if right > left else 0.0
            result[:, step] = answers[left] * (1 - share) + answers[right] * share
        if not known.all():
            result[~known] = self._fall_back(series[~known], horizon)
        return result

    def at(self, series: Floats, origins: NDArray[np.int64], distance: int) -> Floats:
        """What would have been forecast after each of `origins` for `distance`, an anchor: (n, origins, 3)."""
        seen = features(series, origins, distance, self._season)
        return self._at(distance, seen).reshape(len(series), len(origins), len(LEVELS))

    def _at(self, distance: int, seen: Features) -> Floats:
        anchor = self._anchors[distance]
        return anchor.calibration.apply(_raw(anchor.boosters, seen), seen.roughness) * seen.scale[:, None]

    def _fall_back(self, series: Floats, horizon: int) -> Floats:
        return np.stack([self._published.predict(one, horizon) for one in series])


def fit(series: Floats, season: int) -> LearnedPredictor:
    """Learns from `series`: shape (n, windows), NaN in gaps and before a series begins.

    ValueError where that is too little: fewer than three seasons.
    """
    windows = series.shape[1]
    if windows < _MIN_DAYS * season:
        raise ValueError(f"{windows} windows are too few to learn from; {_MIN_DAYS * season} are needed")
    split = windows - _HELD_OUT_DAYS * season
    anchors = {}
    for distance in ANCHORS:
        seen, actual = _examples(series, 0, windows, distance, season)
        origins = np.tile(_origins(windows, 0, distance, len(series)), len(series))
        early = origins + distance < split
        late = origins + 1 >= split  # no window of these was learnt from, nor that before
        learners = [_learner(_rows(seen, early), actual[early]), _learner(seen, actual)]
        # Many models on a thread each: LightGBM's own threads wait for each other wherever a core is taken.
        with ThreadPoolExecutor() as pool:
            trial, final = [tuple(pool.map(learner, LEVELS)) for learner in learners]
        anchors[distance] = _Anchor(final, _calibrate(trial, _rows(seen, late), actual[late]))
    return LearnedPredictor(season, anchors)


def _origins(windows: int, first: int, distance: int, count: int) -> NDArray[np.int64]:
    """Moments to learn from, thinned out evenly where there are too many."""
    thin = max(1, -(-count * windows // _MAX_ROWS))
    return np.arange(first, windows - distance, thin)


def _examples(series: Floats, first: int, windows: int, distance: int, season: int) -> tuple[Features, Floats]:
    """Features of all moments, and what came, in scales; NaN where that is unknown."""
    origins = _origins(windows, first, distance, len(series))
    seen = features(series, origins, distance, season)
    actual = series[:, origins + distance].ravel()
    useless = np.isnan(seen.scale) | (seen.scale <= TINY)
    return seen, np.where(useless, np.nan, actual / np.where(useless, 1.0, seen.scale))


def _rows(seen: Features, which: NDArray[np.bool_]) -> Features:
    return Features(seen.values[which], seen.base[which], seen.scale[which], seen.roughness[which])


def _learner(seen: Features, actual: Floats) -> Callable[[float], lightgbm.Booster]:
    """From a level to its model."""
    known = ~np.isnan(actual)
    weight = seen.scale[known] ** _WEIGHT
    data = lightgbm.Dataset(
        seen.values[known],
        (actual - seen.base)[known],
        weight=weight / weight.mean() if weight.size else weight,
        params=_PARAMETERS,
    ).construct()
    return lambda level: lightgbm.train({**_PARAMETERS, "alpha": level}, data, _ROUNDS)


def _raw(boosters: tuple[lightgbm.Booster, ...], seen: Features) -> Floats:
    """Quantiles before calibration, in scales: (rows, 3), never negative, not crossing."""
    answers = np.stack([np.asarray(one.predict(seen.values)) for one in boosters], axis=1) + seen.base[:, None]
    return np.maximum.accumulate(np.maximum(answers, 0.0), axis=1)


def _calibrate(boosters: tuple[lightgbm.Booster, ...], seen: Features, actual: Floats) -> Calibration:
    """Factors with which held-out windows are covered as often as the levels say, in each class."""
    known = ~np.isnan(actual)
    seen, actual = _rows(seen, known), actual[known]
    quantiles = _raw(boosters, seen)
    roughness = np.nan_to_num(seen.roughness, nan=np.inf)
    edges = np.quantile(roughness, np.arange(1, _CLASSES) / _CLASSES) if len(roughness) else np.zeros(_CLASSES - 1)
    classes = np.searchsorted(edges, roughness)
    factors = np.ones((_CLASSES, len(LEVELS) - 1))
    for column, aim in enumerate(_AIMS):
        spread = np.maximum(quantiles[:, column + 1] - quantiles[:, 0], TINY)
        score = (actual - quantiles[:, 0]) / spread
        for number in range(_CLASSES):
            of_class = score[classes == number]
            if len(of_class):
                reach = min(1.0, aim * (1 + 1 / len(of_class)))
                factors[number, column] = np.clip(np.quantile(of_class, reach), *_FACTORS)
    return Calibration(edges, factors)
