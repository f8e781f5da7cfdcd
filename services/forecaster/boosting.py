"""Gradient-boosted quantiles of windows at one distance ahead, over all series at once, and their calibration. Pure.

Calibration is split-conformal (Romano et al., Conformalized Quantile Regression, 2019), in multiples of the model's own
spread and per class of series: how much a series steps from window to window.
"""

from __future__ import annotations

from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import lightgbm
import numpy as np

from services.forecaster.features import TINY, Features, Floats
from services.forecaster.predictors import LEVELS

_LEAVES = (31, 8, 8)  # per level: a median bears more detail than what is far from it
_ROUNDS = 200
_NEAR_ROUNDS = 400  # of the next window's median, of which the last ones tell most
_OFFSET = 0.02  # scales added before roots, which are steep near 0
_CLASSES = 4
_FACTORS = (0.8, 4.0)  # two days show too little to be much bolder than all days
_AIMS = (0.9, 0.993)  # coverage that p90 and p99 are calibrated to; two days hold few of the rarest windows
_WEIGHT = 0.25  # power of the scale that rows weigh: between each series alike and each request alike
_CALIBRATION_WEIGHT = 0.5  # the same, of rows calibrated on: large series stray more from their past than small ones
_THREADS = 2  # to forecast with
_PARAMETERS: dict[str, Any] = {
    "objective": "quantile",
    "learning_rate": 0.05,
    "min_data_in_leaf": 100,
    "feature_fraction": 0.3,
    "bagging_fraction": 0.7,
    "bagging_freq": 1,
    "lambda_l2": 1.0,
    "max_bin": 127,
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
class Boosters:
    """One model per level for what is added to the last windows' level; the median is the mean of its own and of one
    for what is added to that level's root, for each is better where the other is not."""

    distance: int
    sums: tuple[lightgbm.Booster, ...]
    root: lightgbm.Booster

    def quantiles(self, seen: Features) -> Floats:
        """Before calibration, in scales: (rows, 3), never negative, not crossing."""
        # A model on a thread each, as in learning, and the longest first.
        with ThreadPoolExecutor(_THREADS) as pool:
            root, *sums = pool.map(_predict, (self.root, *self.sums), repeat(seen))
        answers = np.stack(sums, axis=1) + seen.base[:, None] / self.distance
        root += _root(seen.base) / np.sqrt(self.distance)
        answers[:, 0] = (answers[:, 0] + np.maximum(root, 0.0) ** 2 - _OFFSET) / 2
        return np.maximum.accumulate(np.maximum(answers, 0.0), axis=1)

    def to_texts(self) -> list[str]:
        """What `from_texts` reads."""
        return [one.model_to_string() for one in (*self.sums, self.root)]

    @staticmethod
    def from_texts(distance: int, texts: list[str]) -> Boosters:
        """Raises lightgbm.basic.LightGBMError where a text is no model."""
        *sums, root = (lightgbm.Booster(model_str=text) for text in texts)
        return Boosters(distance, tuple(sums), root)


def learn(seen: Features, actual: Floats, distance: int, pool: Executor) -> Boosters:
    """From moments and what came, in scales, NaN where that is unknown."""
    known = ~np.isnan(actual)
    seen, actual = seen.rows(known), actual[known]
    weight = seen.scale**_WEIGHT
    # The further ahead, the less the last windows say by themselves.
    sums = pool.submit(_dataset, seen, actual - seen.base / distance, weight)
    change = _root(actual) - _root(seen.base) / np.sqrt(distance)
    roots = pool.submit(_dataset, seen, change, weight * _root(seen.base))
    rounds = (_NEAR_ROUNDS if distance == 1 else _ROUNDS, _ROUNDS, _ROUNDS)
    # The longest first. Another seed for the root: errors of their own cancel out.
    median = pool.submit(_boost, sums.result(), 0, rounds[0], seed=1)
    root = pool.submit(_boost, roots.result(), 0, rounds[0], seed=2)
    others = [pool.submit(_boost, sums.result(), level, rounds[level], seed=1) for level in range(1, len(LEVELS))]
    return Boosters(distance, tuple(job.result() for job in (median, *others)), root.result())


def calibrate(boosters: Boosters, seen: Features, actual: Floats) -> Calibration:
    """Factors with which held-out windows are covered as often as the levels say, in each class."""
    known = ~np.isnan(actual)
    seen, actual = seen.rows(known), actual[known]
    quantiles = boosters.quantiles(seen)
    roughness = np.nan_to_num(seen.roughness, nan=np.inf)
    weight = seen.scale**_CALIBRATION_WEIGHT
    edges = np.quantile(roughness, np.arange(1, _CLASSES) / _CLASSES)
    classes = np.searchsorted(edges, roughness)
    factors = np.ones((_CLASSES, len(LEVELS) - 1))
    for column, aim in enumerate(_AIMS):
        spread = np.maximum(quantiles[:, column + 1] - quantiles[:, 0], TINY)
        score = (actual - quantiles[:, 0]) / spread
        for number in np.unique(classes):
            own = classes == number
            reach = np.quantile(score[own], aim, weights=weight[own], method="inverted_cdf")
            factors[number, column] = np.clip(reach, *_FACTORS)
    return Calibration(edges, factors)


def _predict(booster: lightgbm.Booster, seen: Features) -> Floats:
    return np.asarray(booster.predict(seen.values, num_threads=1), dtype=np.float64)


def _dataset(seen: Features, target: Floats, weight: Floats) -> lightgbm.Dataset:
    return lightgbm.Dataset(seen.values, target, weight=weight / weight.mean(), params=_PARAMETERS).construct()


def _boost(data: lightgbm.Dataset, level: int, rounds: int, seed: int) -> lightgbm.Booster:
    own = {"alpha": LEVELS[level], "num_leaves": _LEAVES[level], "seed": seed}
    return lightgbm.train({**_PARAMETERS, **own}, data, rounds)


def _root(value: Floats) -> Floats:
    root: Floats = np.sqrt(np.maximum(value, 0.0) + _OFFSET)
    return root
