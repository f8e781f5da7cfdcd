"""Reader of ServeGen's windows: the request rate of each client of each model, window by window.

Columns model, client, window_start_s, rate_per_s; what else there is is left alone. A rate of 0 may mean that nothing
was collected: windows in which all clients of a model together have less than 5 % of what is usual (the median of the
day up to that window) are gaps, and left out.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from statistics import median

from warmserve.traces.fields import number_of
from warmserve.traces.file import TraceFile
from warmserve.traces.formats import COLUMNS, Format, checked_header
from warmserve.traces.shapes import TraceError, Window

_DAY_S = 86_400
_GAP = 0.05

Rates = dict[str, dict[str, dict[float, float]]]  # by model, client, and begin of the window


def servegen(file: TraceFile, by_client: bool) -> Iterator[Window]:
    """Windows with their rate: of each model, or of each client as a model of its own named MODEL/CLIENT.

    In order of name, then time. The whole file is read first, because gaps show in totals only.
    """
    rates = _read(file)
    window_s = _window_length(file, rates)
    for model, clients in rates.items():
        totals: dict[float, float] = defaultdict(float)
        for windows in clients.values():
            for start, rate in windows.items():
                totals[start] += rate
        known = _without_gaps(totals, window_s)
        if not by_client:
            yield from (Window(start, window_s, model, request_rate=totals[start]) for start in known)
            continue
        for client, windows in clients.items():
            name = f"{model}/{client}"
            for start in known:
                if start in windows:
                    yield Window(start, window_s, name, request_rate=windows[start])


def _read(file: TraceFile) -> Rates:
    lines = iter(file)
    header = checked_header(file, next(lines, ""), Format.servegen)
    at = [header.index(name) for name in COLUMNS[Format.servegen]]
    rates: Rates = defaultdict(lambda: defaultdict(dict))
    try:
        for row in csv.reader(lines):
            if row:
                model, client, start, rate = (row[index] for index in at)
                rates[model][client][number_of(start, "window_start_s")] = number_of(rate, "rate_per_s")
    except (IndexError, ValueError, csv.Error) as error:
        raise error if isinstance(error, TraceError) else file.wrong(error) from error
    return rates


def _window_length(file: TraceFile, rates: Rates) -> float:
    starts = sorted({start for clients in rates.values() for windows in clients.values() for start in windows})
    if len(starts) < 2:
        raise TraceError(f"{file.path}: expected at least two windows, so that their length shows")
    return min(later - earlier for earlier, later in pairwise(starts))


def _without_gaps(totals: dict[float, float], window_s: float) -> list[float]:
    starts = sorted(totals)
    day = max(1, round(_DAY_S / window_s))
    values = [totals[start] for start in starts]
    return [
        start for at, start in enumerate(starts) if values[at] >= _GAP * median(values[max(0, at - day + 1) : at + 1])
    ]
