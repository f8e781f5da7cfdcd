"""Gradient-boosted quantiles of windows at one distance ahead, over all series at once, and their calibration. Pure.

Calibration is split-conformal (Romano et al., Conformalized Quantile Regression, 2019), in multiples of the model's own
spread and per class of series: how much a series steps from window to window.
"""

from __future__ import annotations

from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import lightgbm
import numpy as np

from services.forecaster.features import TINY, Features, Floats
from services.forecaster.predictors import LEVELS

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
class _Trees:
    """How a level is learnt: as the mean of a model per seed, whose errors of their own cancel out."""

    leaves: int
    rate: float = 0.05
    rounds: int = _ROUNDS
    seeds: tuple[int, ...] = (1,)


# Per level: a median bears more detail than what is far from it, and p90 is sharper as the mean of many rough ones.
_LEVELS = (_Trees(31), _Trees(15, 0.2, 50, (1, 3, 4, 5, 6)), _Trees(8))
_ROOT = _Trees(31, seeds=(2,))  # of the median's root: another seed than its own


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
    """Models per level for what is added to the last windows' level, of which the mean counts; the median is the mean
    of its own and of one for what is added to that level's root, for each is better where the other is not."""

    distance: int
    sums: tuple[tuple[lightgbm.Booster, ...], ...]
    root: lightgbm.Booster

    def quantiles(self, seen: Features) -> Floats:
        """Before calibration, in scales: (rows, 3), never negative, not crossing."""
        # A model on a thread each, as in learning, and the longest first.
        with ThreadPoolExecutor(_THREADS) as pool:
            asked = [[pool.submit(_predict, one, seen) for one in many] for many in ((self.root,), *self.sums)]
            root, *sums = (np.mean([answer.result() for answer in many], axis=0) for many in asked)
        answers = np.stack(sums, axis=1) + seen.base[:, None] / self.distance
        root += _root(seen.base) / np.sqrt(self.distance)
        answers[:, 0] = (answers[:, 0] + np.maximum(root, 0.0) ** 2 - _OFFSET) / 2
        return np.maximum.accumulate(np.maximum(answers, 0.0), axis=1)

    def to_texts(self) -> list[list[str]]:
        """What `from_texts` reads."""
        return [[one.model_to_string() for one in many] for many in (*self.sums, (self.root,))]

    @staticmethod
    def from_texts(distance: int, texts: list[list[str]]) -> Boosters:
        """Raises lightgbm.basic.LightGBMError where a text is no model."""
        *sums, (root,) = (tuple(lightgbm.Booster(model_str=text) for text in many) for many in texts)
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
    rounds = _NEAR_ROUNDS if distance == 1 else _ROUNDS
    median, *others = _LEVELS
    # The longest first.
    jobs = [_begin(pool, sums.result(), LEVELS[0], replace(median, rounds=rounds))]
    root = _begin(pool, roots.result(), LEVELS[0], replace(_ROOT, rounds=rounds))
    jobs += [_begin(pool, sums.result(), alpha, trees) for alpha, trees in zip(LEVELS[1:], others, strict=True)]
    return Boosters(distance, tuple(tuple(job.result() for job in many) for many in jobs), root[0].result())


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


def _begin(pool: Executor, data: lightgbm.Dataset, alpha: float, trees: _Trees) -> list[Future[lightgbm.Booster]]:
    own = {"alpha": alpha, "num_leaves": trees.leaves, "learning_rate": trees.rate}
    return [
        pool.submit(lightgbm.train, {**_PARAMETERS, **own, "seed": seed}, data, trees.rounds) for seed in trees.seeds
    ]


def _root(value: Floats) -> Floats:
    root: Floats = np.sqrt(np.maximum(value, 0.0) + _OFFSET)
    return root
