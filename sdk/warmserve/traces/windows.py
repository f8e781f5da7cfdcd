"""Reader of windows of your own: columns window_start (or time ...) and any of rate, load, peak and tokens per second.

`model` names the model, if there are several; `window_s` is a window's length, and where it is not told, the least time
from one window to the next is taken. An empty value is unknown; a window that is left out is unknown too.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

from warmserve.traces.fields import number_of, time_of
from warmserve.traces.file import TraceFile
from warmserve.traces.formats import WINDOW_VALUES, Format, checked_header
from warmserve.traces.shapes import TraceError, Window


def windows(file: TraceFile) -> Iterator[Window]:
    """The windows in the file's order."""
    lines = iter(file)
    header = checked_header(file, next(lines, ""), Format.windows)
    found = []
    try:
        for row in csv.reader(lines):
            if not row:
                continue
            if len(row) != len(header):
                raise ValueError(f"{len(row)} values where the first line names {len(header)} columns")
            found.append(_window(dict(zip(header, row, strict=True))))
    except (ValueError, csv.Error) as error:
        raise error if isinstance(error, TraceError) else file.wrong(error) from error
    length = _least_step(found) if "window_s" not in header else 0.0
    if length is None:
        raise TraceError(f"{file.path}: expected a column window_s, as there are not two windows to take it from")
    for window in found:
        yield window if not length else replace(window, window_s=length)


def _window(row: dict[str, str]) -> Window:
    rate, load, peak, prompt, output = (
        number_of(row[name], name) if row.get(name, "").strip() else None for name in WINDOW_VALUES
    )
    length = number_of(row["window_s"], "window_s") if "window_s" in row else 1.0
    if not length:
        raise ValueError("window_s: expected a length above 0")
    return Window(time_of(row["window_start"]), length, row.get("model", ""), rate, load, peak, prompt, output)


def _least_step(found: list[Window]) -> float | None:
    starts = sorted({window.start_s for window in found})
    return min((later - earlier for earlier, later in pairwise(starts)), default=None)
