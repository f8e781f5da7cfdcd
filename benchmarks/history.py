"""What a year of load history costs on disk, and how long reading it takes.

    python -m benchmarks.history [--json FILE]

Fills the forecaster's history with a year of 300 s windows of a tenth of 1,000 models, as the forecaster itself records
and files them, and with the week of past forecasts that it keeps; bytes are scaled by ten.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.report import Row, report
from services.forecaster.blocks import BLOCK
from services.forecaster.database import Database
from services.forecaster.history import History
from services.forecaster.past import KEEP_WINDOWS, PastForecasts
from services.forecaster.predictors import Floats

_MODELS = 1000
_SHARE = 10  # of which one is filled
_DAYS = 365
_WINDOW_S = 300.0
_SEED = 1


def history_cost() -> list[Row]:
    """Rows for a year of 1,000 models: bytes on disk, and the time to read what forecasts are made from."""
    with tempfile.TemporaryDirectory() as folder:
        database = Database(Path(folder), _WINDOW_S)
        history = History(database, 28 * 86_400.0, _DAYS * 86_400.0)
        names = [f"model-{number:04}" for number in range(_MODELS // _SHARE)]
        rng = np.random.default_rng(_SEED)
        for day in range(_DAYS):
            numbers = np.arange(day * BLOCK, (day + 1) * BLOCK)
            data = _day(rng, len(names))
            history.add({name: (numbers, data[row]) for row, name in enumerate(names)})
        windows = _bytes(database)
        last = _DAYS * BLOCK - 1
        took = []
        for _ in range(2):
            began = time.perf_counter()
            series = history.series(names, last, 28 * BLOCK)
            took.append((time.perf_counter() - began) * _SHARE)
        past = PastForecasts(database)
        for first in range(_DAYS * BLOCK, _DAYS * BLOCK + KEEP_WINDOWS):
            made = np.sort(_day(rng, len(names))[:, :12, :1, None] * rng.gamma(4, 0.25, (len(names), 12, 2, 3)), axis=3)
            made = np.concatenate([made, made[:, :, [0, 0, 0]]], axis=2)
            past.save(first, names, made, made)
        total = _bytes(database)
        database.close()
    source = f"{_MODELS // _SHARE} models measured, times {_SHARE}"
    gib = float(1 << 30)
    return [
        Row(
            "a year of windows of 1,000 models on disk", windows * _SHARE / gib, "GiB", limit_source=source, target=1.0
        ),
        Row("the same with a week of past forecasts", total * _SHARE / gib, "GiB", limit_source=source, target=1.0),
        Row(f"reading {series.shape[1]} windows of 1,000 models at start", took[0], "s", limit_source=source),
        Row("and at each window after it", took[1], "s", limit_source=source),
    ]


def _day(rng: np.random.Generator, models: int) -> Floats:
    """A day of noisy traffic: shape (models, windows, 5). Nothing in it repeats, so that little can be compressed."""
    shape = 1 + 0.7 * np.sin(np.arange(BLOCK) / BLOCK * 2 * np.pi)
    load = np.geomspace(0.1, 100, models)[:, None] * shape * rng.gamma(4, 0.25, (models, BLOCK))
    rate = load * rng.gamma(20, 0.005, load.shape)
    peak = np.ceil(load * 2)
    return np.stack(
        [load, peak, rate, rate * rng.gamma(9, 100, load.shape), rate * rng.gamma(9, 30, load.shape)], axis=2
    )


def _bytes(database: Database) -> int:
    with database.reading() as db:
        pages, free = (int(db.execute(f"pragma {name}").fetchone()[0]) for name in ("page_count", "freelist_count"))
        size = int(db.execute("pragma page_size").fetchone()[0])
    return (pages - free) * size


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    report("history", history_cost(), parser.parse_args().json)


if __name__ == "__main__":
    main()
