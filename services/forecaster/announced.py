"""Announced expectations: how they raise a forecast, and how far they are believed. Pure.

Operators speak of a model's whole load, so of theirs the largest counts; each client speaks of its own requests, so
clients' add up. The larger of the two is what a forecast is raised to. Operators are believed. Clients are believed as
far as what they announced for this model has come true: see `trust`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from services.forecaster.predictors import MEAN_LOAD, PEAK_LOAD, Floats

_DOUBT = 2  # hints that came true, to begin with
RATES = slice(PEAK_LOAD + 1, None)
"""Columns of arrivals and tokens."""


@dataclass(frozen=True)
class Expectation:
    """Requests in progress to expect for a time."""

    start_s: float
    end_s: float
    load: float  # as far as it is believed
    of_all: bool  # of the model's whole load, or one client's own


def trust(hints: Sequence[tuple[float, float]]) -> float:
    """How far clients' hints for a model are believed, 0 to 1: the mean share of them that has come.

    `hints`: of the newest that have ended, the announced load and the largest that came. Two that came true are added,
    so that one that did not costs a third of the trust.
    """
    came = sum(min(1.0, actual / announced) for announced, actual in hints)
    return (_DOUBT + came) / (_DOUBT + len(hints))


def raised(
    forecast: Floats, begins: Sequence[float], window_s: float, expected: Sequence[Expectation], per_load: Floats
) -> Floats:
    """A model's forecast with what was announced: at least that load, at every quantile, for as long as it is to last.

    `forecast`: shape (windows, 5, 3), of windows that begin at `begins`. The peak of a window is raised wherever they
    overlap, the mean by what is covered, and arrivals and tokens by `per_load` (shape (3,)) for each request in
    progress that is added. Returns a new array, or `forecast` itself where nothing is raised.
    """
    result = forecast
    for row, begin in enumerate(begins):
        end = begin + window_s
        now = [one for one in expected if one.start_s < end and one.end_s > begin]
        if not now:
            continue
        if result is forecast:
            result = forecast.copy()
        mean = forecast[row, MEAN_LOAD]
        edges = sorted({begin, end, *(min(max(at, begin), end) for one in now for at in (one.start_s, one.end_s))})
        total, top = np.zeros_like(mean), 0.0
        for left, right in pairwise(edges):
            level = _level([one for one in now if one.start_s <= left and one.end_s >= right])
            total += np.maximum(mean, level) * (right - left) / window_s
            top = max(top, level)
        result[row, MEAN_LOAD] = np.maximum(total, mean)
        result[row, PEAK_LOAD] = np.maximum(np.maximum(forecast[row, PEAK_LOAD], top), result[row, MEAN_LOAD])
        more = forecast[row, RATES] + (result[row, MEAN_LOAD] - mean) * per_load[:, None]
        result[row, RATES] = np.maximum.accumulate(more, axis=1)
    return result


def _level(expected: Sequence[Expectation]) -> float:
    of_all = max((one.load for one in expected if one.of_all), default=0.0)
    return max(of_all, sum(one.load for one in expected if not one.of_all))


def per_load(series: Floats) -> Floats:
    """Arrivals and tokens per second for each request in progress: from (models, windows, 5) to (models, 3).

    0 for a model without load, of which nothing is known.
    """
    sums = np.nansum(series, axis=1)
    load = sums[:, MEAN_LOAD, None]
    rates: Floats = np.divide(sums[:, RATES], load, out=np.zeros_like(sums[:, RATES]), where=load > 0)
    return rates


def what_came(
    start_s: float, end_s: float, window_s: float, windows: Sequence[tuple[float, float, float]]
) -> tuple[float, float] | None:
    """The mean load while an expectation lasted, and the largest of a window; None where none is known.

    `windows`: begin, mean and peak load of each that is known. In one that it covers in part all load is taken to have
    come in that part, as far as the peak allows; and that part of it counts.
    """
    over = []
    for at, mean, peak in windows:
        share = (min(end_s, at + window_s) - max(start_s, at)) / window_s
        if share > 0:
            over.append((share, min(mean / share, max(mean, peak))))
    if not over:
        return None
    return sum(share * load for share, load in over) / sum(share for share, _ in over), max(load for _, load in over)
