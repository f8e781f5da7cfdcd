"""Forecasts drawn in the terminal, with plotext. Importing it takes a while: it is done where something is drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from datetime import datetime
from itertools import pairwise
from typing import Any

import plotext

from warmserve.admin.forecast_views import Outlook, Point, Quantity, points

LEGEND = "█ what came   ⣀ median   ▒ to p90   ░ to p99   │ now"

_TICKS_S = (1, 5, 15, 60, 300, 900, 3600, 3 * 3600, 6 * 3600, 12 * 3600, 86_400, 7 * 86_400, 28 * 86_400)
_MARGIN = 12  # columns that the axis and its numbers take
_COLORS = {"came": "default", "median": 33, "p90": 75, "p99": 153, "now": 208}


def draw(view: Outlook, quantity: Quantity, now_s: float, width: int, height: int, colors: bool) -> str:
    """The picture in characters, `width` columns wide and `height` lines high; "" where there is nothing to draw."""
    found = points(view, quantity)
    if not found:
        return ""
    columns = _columns(found, max(1, width - _MARGIN))
    figure: Any = plotext.figure
    figure.clear()
    plotext.terminal.limit(False, False)
    figure.plot_size(width, height)
    figure.theme("colorless").canvas("default")
    _draw_band(figure, columns, "p90", "p99", "░")
    _draw_band(figure, columns, "p50", "p90", "▒")
    _draw_line(figure, columns, "p50", "braille", "median")
    figure.line(now_s, orientation="vertical", pixel=_COLORS["now"])
    _draw_line(figure, columns, "actual", "hd", "came")
    top = max(
        (value for point in found for value in (point.actual, point.p50, point.p99) if value is not None), default=0
    )
    ticks = nice_ticks(top)
    figure.ruler("y").lim(0, ticks[-1]).ticks(ticks, [f"{tick:g}" for tick in ticks])
    begin, end = found[0].start_s, found[-1].start_s + found[-1].window_s
    times = time_ticks(begin, end, max(2, width // 14))
    figure.ruler("x").lim(begin, end).ticks(times, _time_labels(times, end - begin))
    text = str(figure.build().string()).rstrip("\n")
    return text if colors else str(plotext.uncolorize(text))


def nice_ticks(top: float) -> list[float]:
    """Four to six round numbers from 0, of which the last is at least `top` and above 0."""
    if top <= 0:
        return [0.0, 1.0]
    power = 10.0 ** math.floor(math.log10(top / 4))
    step = next(step * power for step in (1, 2, 2.5, 5, 10, 20) if 5 * step * power >= top)
    return [number * step for number in range(math.ceil(top / step - 1e-9) + 1)]


def time_ticks(begin_s: float, end_s: float, most: int) -> list[float]:
    """At most `most` moments at round local times."""
    span = end_s - begin_s
    step = next((step for step in _TICKS_S if span / step <= most), span)
    offset = (datetime.fromtimestamp(begin_s).astimezone().utcoffset() or datetime.min - datetime.min).total_seconds()
    first = math.ceil((begin_s + offset) / step)
    return [tick * step - offset for tick in range(first, math.floor((end_s + offset) / step) + 1)]


def _time_labels(times: Sequence[float], span_s: float) -> list[str]:
    shape = (
        "%H:%M:%S"
        if span_s < 600
        else "%H:%M"
        if span_s <= 86_400
        else "%d %b %H:%M"
        if span_s < 14 * 86_400
        else "%d %b"
    )
    return [datetime.fromtimestamp(time).strftime(shape) for time in times]


def _columns(found: Sequence[Point], columns: int) -> list[Point]:
    """One point for each half column: the mean of the windows in it, or the window that it is part of."""
    begin, end = found[0].start_s, found[-1].start_s + found[-1].window_s
    width = (end - begin) / (2 * columns)
    inside: list[list[Point]] = [[] for _ in range(2 * columns)]
    for point in found:
        first = int((point.start_s - begin) / width + 0.5)
        last = int((point.start_s + point.window_s - begin) / width + 0.5)
        for column in range(first, min(max(last, first + 1), len(inside))):
            inside[column].append(point)

    def mean(of: list[Point], value: Callable[[Point], float | None]) -> float | None:
        known = [one for one in map(value, of) if one is not None]
        return sum(known) / len(known) if known else None

    return [
        Point(
            begin + (column + 0.5) * width,
            width,
            mean(of, lambda point: point.actual),
            mean(of, lambda point: point.p50),
            mean(of, lambda point: point.p90),
            mean(of, lambda point: point.p99),
        )
        for column, of in enumerate(inside)
        if of
    ]


def _draw_band(figure: Any, columns: Sequence[Point], low: str, high: str, character: str) -> None:
    known = [point for point in columns if getattr(point, low) is not None and getattr(point, high) is not None]
    if known:
        times = [point.start_s for point in known]
        marker = plotext.marker(character, _COLORS[high])
        lower = figure.signal(times, [getattr(point, low) for point in known], marker=marker)
        figure.draw(figure.signal(times, [getattr(point, high) for point in known], marker=marker).fill(lower))


def _draw_line(figure: Any, columns: Sequence[Point], name: str, symbol: str, color: str) -> None:
    known = [point for point in columns if getattr(point, name) is not None]
    if known:
        marker = plotext.marker(symbol, _COLORS[color])
        line = figure.signal(
            [point.start_s for point in known], [getattr(point, name) for point in known], marker=marker
        )
        line.lines()
        for index, (before, after) in enumerate(pairwise(known), 1):
            if after.start_s - before.start_s > 1.5 * after.window_s:
                line.line(index, False)  # nobody knows what was in between
        figure.draw(line)
