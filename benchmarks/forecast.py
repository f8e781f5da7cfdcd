"""How well the forecaster foresees production traffic, beside the published predictor and simpler rules.

    python -m benchmarks.forecast [--json FILE] [--trace FILE] [--first-test-day 8]

On ServeGen's windows of 600 s (in the folder $WARMSERVE_TRACES, or ../shared/traces): three long models' totals and the
60 busiest clients, each as a model of its own. At the begin of each test day the learnt predictor is fitted to all days
before; within it, it forecasts from every window with nothing but what lies before. So it did on the two days before
the first test day, which are not counted, for the calibration follows what was covered of late. Windows in which a
model's traffic falls under 5 % of its running one-day median are gaps, and not counted.

The peers' p90 is their point forecast times the 0.9 quantile of past ratios of actual and forecast, over all series of
the set, up to the same fit.

New models are the second, fourth ... of the 120 busiest clients, as if each had begun with the first test day; the
predictor is fitted to the others, and forecasts each with what came since.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.history import history_cost
from benchmarks.report import Row, report
from services.forecaster.adaptive import adapted, follow, unmoved, usual_traffic
from services.forecaster.database import Database
from services.forecaster.features import Floats
from services.forecaster.following import Following
from services.forecaster.learned import MIN_DAYS, LearnedPredictor, dumps, fit, loads
from services.forecaster.past import PastForecasts
from services.forecaster.predictors import Predictor, PublishedPredictor, last_values, seasonal_naive
from services.forecaster.scoring import pinball

MODELS = ("m-large", "m-mid", "m-small")
WINDOW_S = 600
DAY = 86_400 // WINDOW_S
CLIENTS = 60
GAP = 0.05
LIVED_DAYS = 2  # before the first test day, of which the calibration has seen how forecasts did
HORIZONS = (1, 6)
REFIT_DAYS = 11
FORECASTS = 1000
FIRST_WINDOWS = (range(1), range(1, 7), range(7, DAY - 6))  # known of a new model when it is forecast
_LIKE_LOADS = (1.0, 1.6, 0.3, 300.0, 90.0)  # of quantities made from one, where only the time it takes counts
P50, P90, P99 = range(3)

# (set, horizon): of the published predictor's pinball loss, of its WAPE; None where the issue asks for none.
TARGETS = {
    ("clients", 1): (0.73, 0.87),
    ("clients", 6): (0.80, 0.89),
    ("totals", 1): (None, 0.93),
    ("totals", 6): (None, 0.96),
}
OVER_PROVISION = {("clients", 6): 1.38}

# From series of shape (n, windows), origins and a distance to points of shape (n, origins).
Rule = Callable[[Floats, int], Floats]


@dataclass(frozen=True)
class Score:
    """Of forecasts over a set of series. Losses are divided by the actual traffic."""

    wape: float
    pinball: float
    cover90: float
    cover99: float
    over: float


def read_windows(file: Path) -> dict[str, Floats]:
    """Request rates per model, of shape (clients, windows), NaN in gaps. ValueError where the file is none such."""
    rates: dict[str, dict[int, dict[int, float]]] = {model: {} for model in MODELS}
    with gzip.open(file, "rt") as lines:
        for row in csv.DictReader(lines):
            if row["model"] in rates:
                client = rates[row["model"]].setdefault(int(row["client"]), {})
                client[int(float(row["window_start_s"])) // WINDOW_S] = float(row["rate_per_s"])
    series = {}
    for model, clients in rates.items():
        if not clients:
            raise ValueError(f"{file} has no windows of {model}")
        values = np.full((len(clients), max(map(max, clients.values())) + 1), np.nan)
        for values_of, (_, windows) in zip(values, sorted(clients.items()), strict=True):
            values_of[list(windows)] = list(windows.values())
        total = np.nansum(values, axis=0)
        usual = np.array([np.median(total[max(0, at - DAY + 1) : at + 1]) for at in range(len(total))])
        values[:, total < GAP * usual] = np.nan
        series[model] = values
    return series


def choose_series(rates: dict[str, Floats], learn: int) -> dict[str, Floats]:
    """The sets by name; the busiest clients are those of the first `learn` windows."""
    totals = np.stack([np.where(np.isnan(one).all(axis=0), np.nan, np.nansum(one, axis=0)) for one in rates.values()])
    clients = np.concatenate(list(rates.values()))
    busiest = np.argsort(-np.nanmean(clients[:, :learn], axis=1), kind="stable")[:CLIENTS]
    return {"totals": totals, "clients": clients[busiest]}


def rolling_origins(windows: int, first_day: int, distance: int) -> list[tuple[int, np.ndarray]]:
    """For each test day the number of windows to fit to, and the last known windows to forecast from."""
    days = range(first_day, -(-windows // DAY))
    return [(day * DAY, np.arange(day * DAY - 1, min((day + 1) * DAY - 1, windows - distance))) for day in days]


def learned_quantiles(series: Floats, fits: dict[int, LearnedPredictor], first_day: int, distance: int) -> Floats:
    """Rolling forecasts with the newest fit: shape (n, origins, 3), adapted as the service adapts them to what came of
    those before them, from the first fit on."""
    parts = []
    rolling = rolling_origins(series.shape[1], min(fits) // DAY, distance)
    for fitted_to, origins in rolling:
        if len(origins):
            parts.append(fits[fitted_to].at(series[:, : origins[-1] + 1], origins, distance))
    made = np.concatenate(parts, axis=1)
    logs = unmoved(len(series))
    for at, origin in enumerate(np.concatenate([origins for _, origins in rolling])):
        if at >= distance:
            usual = usual_traffic(series[:, : origin + 1])
            logs = follow(logs, made[:, at - distance], series[:, origin], usual)
        made[:, at] = adapted(made[:, at], logs)
    return made[:, first_day * DAY - min(fits) :]


def rule_quantiles(series: Floats, rule: Rule, first_day: int, distance: int) -> Floats:
    """The same of a rule for the point, with past ratios for its p90 and p99."""
    points = rule(series, distance)  # for each window, from `distance` windows before
    parts = []
    for fitted_to, origins in rolling_origins(series.shape[1], first_day, distance):
        past = slice(DAY, fitted_to)
        told = points[:, past] > 0
        factors = np.nanquantile(series[:, past][told] / points[:, past][told], (0.9, 0.99))
        point = points[:, origins + distance]
        parts.append(np.stack([point, point * factors[0], point * factors[1]], axis=2))
    return np.concatenate(parts, axis=1)


def score(quantiles: Floats, actual: Floats) -> Score:
    """Of `quantiles` (n, origins, 3) against what came (n, origins), gaps left out."""
    known = ~np.isnan(actual)
    actual, quantiles = actual[known], quantiles[known]
    error = actual - quantiles[:, P90]
    return Score(
        wape=float(np.abs(actual - quantiles[:, P50]).sum() / actual.sum()),
        pinball=float(np.maximum(0.9 * error, -0.1 * error).sum() / actual.sum()),
        cover90=float((actual <= quantiles[:, P90]).mean()),
        cover99=float((actual <= quantiles[:, P99]).mean()),
        over=float(quantiles[:, P90].sum() / actual.sum()),
    )


def covering_in_hindsight(quantiles: Floats, actual: Floats) -> Floats:
    """Like forecasts that cannot be: the spreads of p90 times one factor with which it covers 0.9 of what came."""
    known = ~np.isnan(actual)
    median = quantiles[..., P50]
    spread = quantiles[..., P90] - median
    reach = np.where(actual > median, (actual - median) / np.maximum(spread, 1e-12), 0.0)
    result = quantiles.copy()
    result[..., P90] = median + spread * np.quantile(reach[known], 0.9, method="inverted_cdf")
    return result


def accuracy(sets: dict[str, Floats], first_day: int) -> list[Row]:
    """The issue's table, on all days from `first_day` on."""
    everything = np.concatenate(list(sets.values()))
    fits = {}
    for fitted_to, _ in rolling_origins(everything.shape[1], max(MIN_DAYS, first_day - LIVED_DAYS), 1):
        fits[fitted_to] = fit(everything[:, :fitted_to], DAY)
    published = PublishedPredictor(DAY)
    rules: dict[str, Rule] = {
        "published": published.points,
        "last value": last_values,
        "seasonal naive": lambda series, distance: seasonal_naive(series, distance, DAY),
    }
    begins = dict(zip(sets, np.cumsum([0, *map(len, sets.values())]).tolist(), strict=False))
    made = {distance: learned_quantiles(everything, fits, first_day, distance) for distance in HORIZONS}
    rows = []
    for (name, distance), (pinball_target, wape_target) in TARGETS.items():
        series = sets[name]
        origins = np.concatenate([chosen for _, chosen in rolling_origins(series.shape[1], first_day, distance)])
        actual = series[:, origins + distance]
        quantiles = made[distance][begins[name] : begins[name] + len(series)]
        learned = score(quantiles, actual)
        peers = {rule: score(rule_quantiles(series, rules[rule], first_day, distance), actual) for rule in rules}
        peer = peers["published"]
        where = f"{name}, {distance * WINDOW_S // 60} min"

        def against(what: str, value: float, limit: float, share: float | None, where: str = where) -> Row:
            goal = None if share is None else share * limit
            return Row(f"{what}, {where}", value, "of traffic", limit, "published predictor", goal)

        rows.append(against("pinball loss of p90", learned.pinball, peer.pinball, pinball_target))
        rows.append(against("WAPE of p50", learned.wape, peer.wape, wape_target))
        rows.append(Row(f"p90 covers less than .88, {where}", max(0.88 - learned.cover90, 0), "short", target=0.0))
        rows.append(Row(f"p90 covers, {where}", learned.cover90, "of windows", peer.cover90, "published", 0.93))
        rows.append(Row(f"p99 leaves uncovered, {where}", 1 - learned.cover99, "of windows", target=0.015))
        goal = OVER_PROVISION.get((name, distance))
        rows.append(Row(f"p90 over actual, {where}", learned.over, "x", peer.over, "published predictor", goal))
        if goal is not None:
            alike = score(covering_in_hindsight(quantiles, actual), actual)
            each = [covering_in_hindsight(one[None], came[None]) for one, came in zip(quantiles, actual, strict=True)]
            apart = score(np.concatenate(each), actual)
            know = f"with spreads that know the test days so as to cover .90, {where}"
            rows.append(Row(f"p90 over actual {know}, one factor for all", alike.over, "x"))
            rows.append(Row(f"p90 over actual {know}, one for each", apart.over, "x"))
        for rule in ("last value", "seasonal naive"):
            source = "published predictor"
            rows.append(Row(f"{rule}: pinball loss, {where}", peers[rule].pinball, "of traffic", peer.pinball, source))
            rows.append(Row(f"{rule}: WAPE, {where}", peers[rule].wape, "of traffic", peer.wape, source))
    return rows


def first_days(rates: dict[str, Floats], first_day: int) -> list[Row]:
    """How new models are forecast that the predictor has never seen."""
    clients = np.concatenate(list(rates.values()))
    begin = first_day * DAY
    busiest = np.argsort(-np.nanmean(clients[:, :begin], axis=1), kind="stable")[: 2 * CLIENTS]
    predictor = fit(clients[busiest[::2], :begin], DAY)
    new = clients[busiest[1::2], begin : begin + DAY]
    rows = []
    for known in FIRST_WINDOWS:
        losses = [sum(_loss(one, new, at) for at in known) for one in (predictor, PublishedPredictor(DAY))]
        came = sum(np.nansum(new[:, at : at + HORIZONS[-1]]) for at in known)
        what = f"new models, {known[0]} to {known[-1]} windows known" if len(known) > 1 else "new models, nothing known"
        limit = float(losses[1] / came)
        rows.append(
            Row(f"{what}: pinball loss", float(losses[0] / came), "of traffic", limit, "published predictor", limit)
        )
    return rows


def _loss(predictor: Predictor, series: Floats, known: int) -> float:
    """Mean over levels of the pinball losses of the next hour, when so many windows are known."""
    actual = series[:, known : known + HORIZONS[-1]]
    return float(np.nansum(pinball(predictor.predict_many(series[:, :known], HORIZONS[-1]), actual).mean(axis=2)))


def cost(sets: dict[str, Floats]) -> list[Row]:
    """What a fit to eleven days costs, and forecasts of all quantities for a thousand models."""
    series = np.concatenate(list(sets.values()))[:, : REFIT_DAYS * DAY]
    # The other quantities cost the same whatever they are.
    history = series[:, :, None] * np.array(_LIKE_LOADS)
    began, busy = time.perf_counter(), time.process_time()
    predictor = fit(history, DAY)
    took, busy = time.perf_counter() - began, time.process_time() - busy
    unit = 1024 if sys.platform != "darwin" else 1  # of ru_maxrss
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
    began = time.perf_counter()
    saved = dumps(predictor)
    loads(saved, DAY)
    restored = time.perf_counter() - began
    many = np.tile(history, (-(-FORECASTS // len(series)), 1, 1))[:FORECASTS]
    what = f"{len(series)} series, {series.shape[1] // DAY} days"
    return [
        Row(f"refit, {what}", took, "s", target=60.0),
        Row("refit, time of all cores", busy, "s"),
        Row("peak memory of this process", peak, "GiB", target=1.0),
        *forecast_cost(predictor, many),
        Row("saved and loaded", restored, "s"),
        Row("size when saved", len(saved) / 1e6, "MB"),
    ]


def forecast_cost(predictor: LearnedPredictor, history: Floats) -> list[Row]:
    """What forecasts of all quantities cost at the end of a window, adapted to what came of those before."""
    names, last = [f"model-{number:04}" for number in range(len(history))], 1000
    wall, busy, published = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        database = Database(Path(folder), WINDOW_S)
        past = PastForecasts(database)
        following = Following(past)
        for window in range(last, last + 6):
            begun, cpu = time.perf_counter(), time.process_time()
            made = following.adapt(names, history, window, predictor.forecast_all(history, 12))
            wall.append(time.perf_counter() - begun)
            busy.append(time.process_time() - cpu)
            past.save(window + 1, names, made, made)
            begun = time.perf_counter()
            PublishedPredictor(DAY).forecast_all(history, 12)
            published.append(time.perf_counter() - begun)
        database.close()
    # Without the first, which has nothing to be adapted to.
    took, cores, peer = (float(np.median(one[1:])) * 1e3 for one in (wall, busy, published))
    what = f"forecasts of {len(names)} models, 12 windows, 5 quantities"
    return [
        Row(what, took, "ms", target=200.0),
        Row("forecasts, time of all cores", cores, "ms"),
        Row("the same by the published predictor", peer, "ms"),
    ]


def trace_file() -> Path:
    """Where the trace lies, if anywhere."""
    folder = os.environ.get("WARMSERVE_TRACES") or Path(__file__).resolve().parents[2] / "shared" / "traces"
    return Path(folder) / "servegen_windows.csv.gz"


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="another file of ServeGen's windows")
    parser.add_argument("--first-test-day", type=int, default=8, help="days before it are learnt from (8)")
    arguments = parser.parse_args()
    file = arguments.trace or trace_file()
    if not file.is_file():
        parser.exit(2, f"{file} is missing: set WARMSERVE_TRACES to the folder that holds servegen_windows.csv.gz\n")
    try:
        rates = read_windows(file)
    except (KeyError, ValueError, OSError) as error:
        parser.exit(2, f"{file} does not read as ServeGen's windows: {error}\n")
    length = min(one.shape[1] for one in rates.values())
    days = arguments.first_test_day
    if not 3 <= days < length / DAY:
        parser.exit(2, f"--first-test-day is one of 3 ... {(length - 1) // DAY} with {file}, not {days}\n")
    sets = choose_series(rates, days * DAY)
    report("forecast", accuracy(sets, days) + first_days(rates, days) + cost(sets) + history_cost(), arguments.json)


if __name__ == "__main__":
    main()
