"""A refit, as a process of its own: learns from the history on disk, and holds what it learned against the champion.

    python -m services.forecaster.refit '{"folder": ..., "champion": ..., "challenger": ..., ...}'

writes the challenger to its file, and what came of it to standard output (`Outcome` as JSON).
"""

from __future__ import annotations

import json
import os
import resource
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from services.forecaster import stored
from services.forecaster.database import Database
from services.forecaster.history import History
from services.forecaster.learned import MIN_DAYS, fit
from services.forecaster.predictors import MEAN_LOAD, Floats
from services.forecaster.scoring import Comparison, compare
from warmserve.v1 import forecast_pb2

_MOST_SERIES = 300  # the busiest; more teach little that is new, and memory is bounded
_LEAST_SEASON = 24  # windows
_NICE = 10


@dataclass(frozen=True)
class Task:
    """What to learn from, and where to."""

    folder: str
    window_s: float
    season: int  # windows
    windows: int  # to look back
    last: int  # number of the newest window
    fitted_unix_ms: int
    memory_bytes: int
    champion: str  # file; where there is none, the published predictor is the champion
    challenger: str


@dataclass(frozen=True)
class Outcome:
    """What came of it."""

    better: bool
    words: str


def held_out(windows: int, season: int) -> int:
    """Newest windows on which predictors are compared, of so many in all: a season, or what is left of it by those that
    a fit needs. 0 where that is less than a quarter of a season, too little to compare on, or where a season has so few
    windows that there is no shape of a day to learn."""
    if season < _LEAST_SEASON:
        return 0
    newest = min(season, windows - MIN_DAYS * season)
    return newest if newest >= max(season / 4, 12) else 0


def refit(task: Task) -> Outcome:
    """Fits a challenger and compares. Without one where there is too little to learn from, said so."""
    champion = stored.published(task.season)
    if Path(task.champion).exists():
        champion = stored.from_bytes(Path(task.champion).read_bytes(), task.season)
    database = Database(Path(task.folder), task.window_s)
    try:
        history = History(database, task.windows * task.window_s, task.windows * task.window_s)
        series = _busiest(history, task)
    finally:
        database.close()
    newest = held_out(series.shape[1], task.season)
    if not newest:
        return Outcome(False, f"{series.shape[1]} windows are too few yet to learn from and to compare on")
    if not np.nansum(series[:, -newest:, MEAN_LOAD]) > 0:
        return Outcome(False, f"there was no traffic in the newest {newest} windows to compare on")
    learned_from = series[:, :-newest]
    try:
        challenger = fit(learned_from, task.season)
    except ValueError as error:
        return Outcome(False, f"nothing could be learned: {error}")
    losses = compare(challenger, champion.predictor, series[:, :, MEAN_LOAD], task.season, newest)
    known = ~np.isnan(learned_from[:, :, MEAN_LOAD])
    info = forecast_pb2.PredictorInfo(
        name=challenger.name,
        fitted_unix_ms=task.fitted_unix_ms,
        series=int(known.any(axis=1).sum()),
        windows=int(known.sum()),
        relative_loss=losses.challenger if losses.challenger == losses.challenger else 0.0,
    )
    stored.write(Path(task.challenger), stored.to_bytes(challenger, info))
    return Outcome(losses.challenger < losses.champion, _words(info, losses, newest))


def _words(info: forecast_pb2.PredictorInfo, losses: Comparison, newest: int) -> str:
    if losses.challenger != losses.challenger:
        return f"in the newest {newest} windows the published predictor was never wrong; the champion stays"
    if not losses.challenger < losses.champion:
        verdict = "is not better than the champion and was not kept"
    else:
        verdict = "is the champion now"
    return (
        f"what was learned from {info.series} models {verdict}: on the newest {newest} windows its loss is "
        f"{losses.challenger:.3f} of the published predictor's, that of the champion until now {losses.champion:.3f}"
    )


def _busiest(history: History, task: Task) -> Floats:
    names = history.models()
    traffic: list[float] = []
    for first in range(0, len(names), _MOST_SERIES):  # names that were undeployed long ago may be many
        series = history.series(names[first : first + _MOST_SERIES], task.last, task.windows)
        traffic += np.nansum(series[:, :, MEAN_LOAD], axis=1).tolist()
    chosen = sorted(range(len(names)), key=lambda at: -traffic[at])[:_MOST_SERIES]
    return history.series([names[at] for at in sorted(chosen) if traffic[at] > 0], task.last, task.windows)


def main() -> None:
    """Entry point of the process."""
    task = Task(**json.loads(sys.argv[1]))
    os.nice(_NICE)
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (task.memory_bytes, hard))
    print(json.dumps(asdict(refit(task))))


if __name__ == "__main__":
    main()
