"""Calibration that follows what was covered of late: adaptive conformal inference. Pure.

After Gibbs and Candes, Adaptive Conformal Inference Under Distribution Shift, 2021, with forgetting: each window that
stays below a quantile narrows its distance from the median a little, and each that does not widens it, by as much more
as such windows shall be rarer. At p90 a series moves slowly by its own windows, of which it takes many to tell
anything, and all move faster by what happened to them together; at p99 each moves by its own alone. So coverage comes
to what it should be, whatever was wrong when the predictor was fitted. Nothing but what came of forecasts is needed, so
the factors follow anew from forecasts of the past that were kept.
"""

from __future__ import annotations

import numpy as np

from services.forecaster.predictors import LEVELS, Floats

_MISSED = np.array([0.1, 0.007])  # of windows, above p90 and above p99; the rarest are few to learn from
_OWN_GAIN = np.array([0.01, 0.1])  # of the logarithm of a factor, times how far a series' window was from _MISSED
_COMMON_GAIN = np.array([0.1, 0.0])  # the same, times how far the mean of all series was
_MANY = 20  # series of which that mean tells what befalls all; a mean of fewer moves them by as much less
_KEEP = 0.999  # of such a logarithm, one window later: in time the fit's own calibration speaks again
_BOUND = np.log(1.5)
_QUIET = 0.01  # of the usual traffic; where neither more came nor was expected there was nothing to miss
REMEMBERED = 2_000  # windows after which little is left of what one has taught

_USUAL = 500  # newest windows of which the mean is what is usual


def unmoved(*shape: int) -> Floats:
    """Factors' logarithms, shape (..., 2), with which `adapted` changes nothing."""
    return np.zeros((*shape, len(LEVELS) - 1))


def follow(logs: Floats, forecast: Floats, actual: Floats, usual: Floats) -> Floats:
    """One window later: logarithms of factors, shape (n, ..., 2), from those when `forecast` was made, or later ones.

    `forecast`: shape (n, ..., 3), of n series, as it was given out; `actual`: what came, (n, ...). NaN where either is
    unknown: such a series moves only as all do together. `usual`: the series' means, to be broadcast to (n, ...).
    """
    with np.errstate(invalid="ignore"):  # comparisons with what is unknown are false
        counts = (usual > 0) & (np.maximum(actual, forecast[..., 1]) > _QUIET * usual)
        missed = actual[..., None] > forecast[..., 1:]
    error = np.where(counts[..., None], missed - _MISSED, 0.0)
    common = error.sum(axis=0) / np.maximum(counts.sum(axis=0), _MANY)[..., None]
    moved: Floats = np.clip(_KEEP * logs + _OWN_GAIN * error + _COMMON_GAIN * common, -_BOUND, _BOUND)
    return moved


def usual_traffic(series: Floats) -> Floats:
    """Of shape (n, windows, ...), NaN where unknown: the mean of the newest, (n, ...); 0 where none is known."""
    newest = np.ascontiguousarray(np.moveaxis(series[:, -_USUAL:], 1, -1))  # ten times as fast as along strides
    known = ~np.isnan(newest)
    means: Floats = newest.sum(axis=-1, where=known) / np.maximum(np.count_nonzero(known, axis=-1), 1)
    return means


def adapted(quantiles: Floats, logs: Floats) -> Floats:
    """`quantiles`, shape (..., 3), not crossing, with their spreads above the median multiplied. The same shape."""
    median = quantiles[..., :1]
    spread = (quantiles[..., 1:] - median) * np.exp(logs)
    return np.concatenate([median, median + np.maximum.accumulate(spread, axis=-1)], axis=-1)
