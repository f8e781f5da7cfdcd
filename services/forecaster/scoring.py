"""How good predictors are on what has come, to compare them and to see them drift. Pure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from services.forecaster.features import Floats, Moments
from services.forecaster.predictors import LEVELS, Predictor, PublishedPredictor

DISTANCES = (1, 6)  # windows ahead at which predictors are judged


@dataclass(frozen=True)
class Comparison:
    """Mean pinball losses on the same windows, relative to the published predictor's. Less is better."""

    challenger: float
    champion: float


def pinball(quantiles: Floats, actual: Floats) -> Floats:
    """Losses, shape (..., 3), of quantiles (..., 3) against what came (...)."""
    error = actual[..., None] - quantiles
    losses: Floats = np.maximum(np.array(LEVELS) * error, (np.array(LEVELS) - 1) * error)
    return losses


def loss(predictor: Predictor, series: Floats, newest: int) -> float:
    """The mean pinball loss over p50, p90, p99 and DISTANCES, of forecasts of the `newest` windows, over the traffic.

    `series`: shape (n, windows) of the mean load, NaN in gaps. No forecast sees what comes after its own moment. NaN
    where there was no traffic. ValueError where there are too few windows.
    """
    windows = series.shape[1]
    if not max(DISTANCES) < newest < windows:
        raise ValueError(f"{newest} newest of {windows} windows: needed are more than {max(DISTANCES)} and some before")
    origins = np.arange(windows - newest - 1, windows - max(DISTANCES))
    return loss_of({distance: predictor.at(series, origins, distance) for distance in DISTANCES}, series, origins)


def loss_of(forecasts: dict[int, Floats], series: Floats, origins: Moments) -> float:
    """`loss`, from forecasts made at `origins`, shape (n, origins, 3) for each distance."""
    lost = came = 0.0
    for distance, quantiles in forecasts.items():
        actual = series[:, origins + distance]
        known = ~np.isnan(actual)
        lost += float(pinball(quantiles, actual)[known].mean(axis=1).sum())
        came += float(actual[known].sum())
    return lost / came if came > 0 else float("nan")


def compare(challenger: Predictor, champion: Predictor, series: Floats, season: int, newest: int) -> Comparison:
    """Both on the `newest` windows, which neither may have learned from. See `loss`.

    NaN where there was no traffic, or where the published predictor is never wrong.
    """
    published = loss(PublishedPredictor(season), series, newest)
    if not published > 0:
        return Comparison(float("nan"), float("nan"))
    return Comparison(loss(challenger, series, newest) / published, loss(champion, series, newest) / published)
