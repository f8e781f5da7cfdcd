"""Arrivals and token lengths drawn from the windows and quantiles that traces publish. Pure; seeded by the caller."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Gaps:
    """How the gaps between a window's arrivals are distributed: `family` is "Gamma" or "Weibull" with this shape."""

    family: str
    shape: float


POISSON = Gaps("Gamma", 1.0)


def in_window(count: int, length_s: float, gaps: Gaps, random: np.random.Generator) -> Floats:
    """Exactly `count` ascending times in [0, length_s), with gaps in proportion to draws from `gaps`.

    A window's fitted mean gap need not equal length / count (Weibull's least of all), so only the shape is used and the
    draws are scaled to fill the window, as ServeGen's own generator does: the rate is the trace's, exactly.
    """
    if count <= 0:
        return np.empty(0)
    draws = (
        random.gamma(gaps.shape, size=count + 1)
        if gaps.family == "Gamma"
        else random.weibull(gaps.shape, size=count + 1)
    )
    total = draws.sum()
    if total <= 0:  # every draw underflowed: shapes next to zero put all arrivals into one instant
        return np.full(count, random.uniform(0, length_s))
    return np.asarray(np.minimum(np.cumsum(draws)[:-1] / total, np.nextafter(1.0, 0.0)) * length_s)


def counts_of(rates: Floats, length_s: float, random: np.random.Generator) -> Integers:
    """Requests per window for mean rates (1/s; NaN is none), rounded up or down at random: right on average."""
    expected = np.nan_to_num(rates) * length_s
    return np.asarray(np.floor(expected + random.uniform(size=expected.shape)), dtype=np.int64)


@dataclass(frozen=True)
class Lengths:
    """Token counts by their quantiles; drawn by linear interpolation of the logarithm between them.

    Below the first and above the last known quantile the ends are kept: nothing is longer than what was published.
    """

    shares: tuple[float, ...]  # ascending, in (0, 1)
    tokens: tuple[float, ...]  # non-decreasing, >= 1

    def draw(self, count: int, random: np.random.Generator) -> Integers:
        """`count` lengths, at least 1 each."""
        logs = np.interp(random.uniform(size=count), self.shares, np.log(np.maximum(self.tokens, 1.0)))
        return np.maximum(1, np.rint(np.exp(logs))).astype(np.int64)


def thinned(times: Floats, share: float, random: np.random.Generator) -> NDArray[np.bool_]:
    """Which of `times` stay when each stays with probability `share`, 0 to 1."""
    return np.asarray(random.uniform(size=len(times)) < share)


def rotated(times: Floats, length_s: float, by_s: float) -> tuple[Floats, Integers]:
    """The same arrivals begun `by_s` later in a trace of `length_s` that goes round; and their order in `times`."""
    moved = (times - by_s) % length_s
    order = np.argsort(moved, kind="stable")
    return moved[order], order


def load_windows(
    starts_s: Floats, ends_s: Floats, prompt: Integers, output: Integers, window_s: float, windows: int
) -> Floats:
    """What routers would have counted of requests in progress from starts to ends: shape (windows, 5).

    Columns as forecasters keep them: mean load, peak load, requests/s, prompt tokens/s, output tokens/s.
    """
    result = np.zeros((windows, 5))
    if not len(starts_s):
        return result
    index = np.floor(starts_s / window_s).astype(np.int64)
    within = (index >= 0) & (index < windows)
    for column, weight in ((2, None), (3, prompt[within]), (4, output[within])):
        result[:, column] = np.bincount(index[within], weights=weight, minlength=windows)[:windows] / window_s
    times = np.concatenate((starts_s, ends_s, np.arange(windows + 1) * window_s))
    steps = np.concatenate((np.ones(len(starts_s)), -np.ones(len(ends_s)), np.zeros(windows + 1)))
    order = np.lexsort((steps, times))  # an end before a start of the same moment
    times, level = times[order], np.cumsum(steps[order])
    spans = np.diff(times, append=times[-1])
    at = np.floor(times / window_s + 1e-12).astype(np.int64)
    inside = (at >= 0) & (at < windows)
    result[:, 0] = np.bincount(at[inside], weights=(level * spans)[inside], minlength=windows)[:windows] / window_s
    np.maximum.at(result[:, 1], at[inside], level[inside])
    return result
