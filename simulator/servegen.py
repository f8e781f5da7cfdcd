"""ServeGen's published windows and token lengths, as the folder of traces holds them: clients that become models."""

from __future__ import annotations

import csv
import gzip
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from simulator.arrivals import POISSON, Floats, Gaps, Lengths

WINDOW_S = 600.0
DAY_WINDOWS = 144
GAP_SHARE = 0.05
"""A window in which a production model's total is under this share of its running one-day median is missing."""

_QUANTILES = {"p5": 0.05, "p10": 0.10, "p25": 0.25, "p50": 0.50, "p75": 0.75, "p90": 0.90, "p95": 0.95, "p99": 0.99}


@dataclass(frozen=True)
class Client:
    """One client of one production model."""

    model: str
    number: int
    rates: Floats  # requests/s per window of 600 s; NaN where the collection has a gap
    gaps: tuple[Gaps, ...]  # how the arrivals of each window are spread


def read_clients(file: Path, models: Sequence[str] = ("m-large", "m-mid", "m-small")) -> list[Client]:
    """All clients of `models`, in order of model and number. ValueError where the file holds no ServeGen windows."""
    # By model and client: window, rate, gaps.
    found: dict[str, dict[int, list[tuple[int, float, Gaps]]]] = {model: defaultdict(list) for model in models}
    with gzip.open(file, "rt", newline="") as lines:
        rows = csv.reader(lines)
        header = next(rows, [])
        wanted = ("model", "client", "window_start_s", "rate_per_s", "arrival_dist", "param1")
        if missing := [name for name in wanted if name not in header]:
            raise ValueError(f"{file} does not hold ServeGen's windows: its first line lacks {', '.join(missing)}")
        at = [header.index(name) for name in wanted]
        for row in rows:
            model, number, start, rate, family, shape = (row[column] for column in at)
            if model in found:
                gaps = Gaps(family, float(shape)) if family else POISSON
                found[model][int(number)].append((round(float(start) / WINDOW_S), float(rate), gaps))
    clients = []
    for name, mine in found.items():
        if not mine:
            raise ValueError(f"{file} has no windows of {name}")
        windows = 1 + max(window for told in mine.values() for window, _, _ in told)
        rates = np.zeros((len(mine), windows))
        gaps_of: list[list[Gaps]] = [[POISSON] * windows for _ in mine]
        for values, spread, told in zip(rates, gaps_of, mine.values(), strict=True):
            for window, mean, gaps in told:
                values[window] = mean
                spread[window] = gaps
        rates[:, _missing(rates.sum(axis=0))] = np.nan
        clients += [
            Client(name, number, values, tuple(spread))
            for number, values, spread in zip(mine, rates, gaps_of, strict=True)
        ]
    return clients


def busiest(clients: Sequence[Client], count: int, windows: int) -> list[Client]:
    """The `count` clients with the most traffic in the first `windows` windows, the busiest first."""
    return sorted(clients, key=lambda client: -float(np.nanmean(client.rates[:windows])))[:count]


def read_lengths(file: Path) -> dict[tuple[str, str], Lengths]:
    """Token lengths by (model, "input_tokens" or "output_tokens")."""
    with gzip.open(file, "rt", newline="") as lines:
        rows = list(csv.DictReader(lines))
    try:
        return {
            (row["model"], row["field"]): Lengths(
                tuple(_QUANTILES.values()), tuple(float(row[name]) for name in _QUANTILES)
            )
            for row in rows
            if row["field"] in ("input_tokens", "output_tokens")
        }
    except KeyError as error:
        raise ValueError(f"{file} does not hold ServeGen's lengths: there is no column {error}") from error


def _missing(total: Floats) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Windows in which the collection failed: a total far under its running one-day median."""
    usual = np.array([np.median(total[max(0, at - DAY_WINDOWS + 1) : at + 1]) for at in range(len(total))])
    return np.asarray(total < GAP_SHARE * usual)
