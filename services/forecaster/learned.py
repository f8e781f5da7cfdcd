"""The learnt predictor: gradient-boosted quantiles over all series at once, calibrated on days unseen. Pure.

One LightGBM model per anchor (a distance ahead) and quantile; distances between anchors lie between their forecasts.
Calibration is split-conformal (Romano et al., Conformalized Quantile Regression, 2019), in multiples of the model's own
spread and per class of series: how much a series steps from window to window.
"""

from __future__ import annotations

from concurrent.futures import Executor, ThreadPoolExecutor
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
_MEDIAN_LEAVES = 31  # a median bears more detail than what is far from it
_THREADS = 2
_OFFSET = 0.05  # scales added before logarithms, for windows without traffic
_CLASSES = 4
_FACTORS = (1.0, 4.0)  # calibration never narrows a spread: two days show too little to be bolder than all days
_AIMS = (0.9, 0.993)  # coverage that p90 and p99 are calibrated to; two days hold few of the rarest windows
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
class _Boosters:
    """One model per level for what is added to the last windows' level; the median is the mean of its own and of one
    for what that level is multiplied by, for each is better where the other is not."""

    sums: tuple[lightgbm.Booster, ...]
    ratio: lightgbm.Booster
    distance: int

    def quantiles(self, seen: Features) -> Floats:
        """Before calibration, in scales: (rows, 3), never negative, not crossing."""
        answers = np.stack([np.asarray(one.predict(seen.values)) for one in self.sums], axis=1)
        answers += seen.base[:, None] / self.distance
        ratio = np.asarray(self.ratio.predict(seen.values))
        answers[:, 0] = (answers[:, 0] + np.exp(ratio + _log(seen.base)) - _OFFSET) / 2
        return np.maximum.accumulate(np.maximum(answers, 0.0), axis=1)


@dataclass(frozen=True)
class _Anchor:
    boosters: _Boosters
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
        if not series.size:
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
        return anchor.calibration.apply(anchor.boosters.quantiles(seen), seen.roughness) * seen.scale[:, None]

    def _fall_back(self, series: Floats, horizon: int) -> Floats:
        answers = [self._published.predict(one, horizon) for one in series]
        return np.array(answers).reshape(len(series), horizon, len(LEVELS))


def fit(series: Floats, season: int) -> LearnedPredictor:
    """Learns from `series`: shape (n, windows), NaN in gaps and before a series begins.

    ValueError where that is too little: fewer than three seasons, or none of them with traffic to learn from.
    """
    windows = series.shape[1]
    if windows < _MIN_DAYS * season:
        raise ValueError(f"{windows} windows are too few to learn from; {_MIN_DAYS * season} are needed")
    split = windows - _HELD_OUT_DAYS * season
    anchors = {}
    for distance in ANCHORS:
        origins = _origins(windows, distance, len(series))
        seen, actual = _examples(series, origins, distance, season)
        # The trial learns from every other moment: they tell almost what their neighbours tell.
        thinned = np.tile(np.arange(len(origins)) % 2 == 0, len(series))
        origins = np.tile(origins, len(series))
        early = thinned & (origins + distance < split)
        late = origins + 1 >= split  # no window of these was learnt from, nor that before
        if np.isnan(actual[early]).all() or np.isnan(actual[late]).all():
            raise ValueError("no traffic to learn from, or none in the last two seasons to calibrate on")
        # Many models on a thread each: LightGBM's own threads wait for each other wherever a core is taken.
        with ThreadPoolExecutor(_THREADS) as pool:
            trial = _learn(_rows(seen, early), actual[early], distance, pool)
            final = _learn(seen, actual, distance, pool)
        anchors[distance] = _Anchor(final, _calibrate(trial, _rows(seen, late), actual[late]))
    return LearnedPredictor(season, anchors)


def _origins(windows: int, distance: int, count: int) -> NDArray[np.int64]:
    """Moments to learn from, thinned out evenly where there are too many."""
    thin = max(1, -(-count * windows // _MAX_ROWS))
    return np.arange(0, windows - distance, thin)


def _examples(series: Floats, origins: NDArray[np.int64], distance: int, season: int) -> tuple[Features, Floats]:
    """Features of these moments, and what came, in scales; NaN where that is unknown."""
    seen = features(series, origins, distance, season)
    actual = series[:, origins + distance].ravel()
    useless = np.isnan(seen.scale) | (seen.scale <= TINY)
    return seen, np.where(useless, np.nan, actual / np.where(useless, 1.0, seen.scale))


def _rows(seen: Features, which: NDArray[np.bool_]) -> Features:
    return Features(seen.values[which], seen.base[which], seen.scale[which], seen.roughness[which])


def _learn(seen: Features, actual: Floats, distance: int, pool: Executor) -> _Boosters:
    """One model per level, and one more for the median."""
    known = ~np.isnan(actual)
    seen, actual = _rows(seen, known), actual[known]
    weight = seen.scale**_WEIGHT
    # The further ahead, the less the last windows say by themselves.
    sums = _dataset(seen, actual - seen.base / distance, weight)
    ratios = _dataset(seen, _log(actual) - _log(seen.base), weight * np.maximum(seen.base, _OFFSET))
    jobs = [pool.submit(_boost, sums, level) for level in LEVELS]
    ratio = pool.submit(_boost, ratios, LEVELS[0])
    return _Boosters(tuple(job.result() for job in jobs), ratio.result(), distance)


def _dataset(seen: Features, target: Floats, weight: Floats) -> lightgbm.Dataset:
    return lightgbm.Dataset(seen.values, target, weight=weight / weight.mean(), params=_PARAMETERS).construct()


def _boost(data: lightgbm.Dataset, level: float) -> lightgbm.Booster:
    leaves = _MEDIAN_LEAVES if level == LEVELS[0] else _PARAMETERS["num_leaves"]
    return lightgbm.train({**_PARAMETERS, "alpha": level, "num_leaves": leaves}, data, _ROUNDS)


def _log(value: Floats) -> Floats:
    logarithm: Floats = np.log(np.maximum(value, 0.0) + _OFFSET)
    return logarithm


def _calibrate(boosters: _Boosters, seen: Features, actual: Floats) -> Calibration:
    """Factors with which held-out windows are covered as often as the levels say, in each class."""
    known = ~np.isnan(actual)
    seen, actual = _rows(seen, known), actual[known]
    quantiles = boosters.quantiles(seen)
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
