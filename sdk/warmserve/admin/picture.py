"""Forecasts drawn in a file, with matplotlib: the `plots` extra, imported where it is needed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from warmserve.admin.forecast_views import Outlook, Point, Quantity, points, title
from warmserve.admin.target import CommandError


def save(view: Outlook, quantity: Quantity, now_s: float, path: Path) -> None:
    """The picture in a file, PNG or whatever else its name ends in. Raises CommandError where that cannot be."""
    try:
        from matplotlib.dates import AutoDateLocator, ConciseDateFormatter, date2num
        from matplotlib.figure import Figure
    except ImportError as error:
        raise CommandError("pictures need matplotlib: pip install 'warmserve[plots]'") from error
    found = points(view, quantity)
    zone = datetime.now().astimezone().tzinfo

    def point_time(unix_s: float) -> float:
        return float(date2num(datetime.fromtimestamp(unix_s, zone)))  # type: ignore[no-untyped-call]

    figure = Figure(figsize=(11, 4.5), dpi=130, layout="constrained")
    axes = figure.subplots()
    times = [point_time(point.start_s + point.window_s / 2) for point in found]
    for low, high, shade, label in (("p50", "p90", 0.35, "median to p90"), ("p90", "p99", 0.15, "p90 to p99")):
        lower, upper = _or_nan(found, low), _or_nan(found, high)
        axes.fill_between(times, lower, upper, color="tab:blue", alpha=shade, linewidth=0, label=label, step="mid")
    axes.plot(times, _or_nan(found, "p50"), color="tab:blue", linewidth=1.2, label="median", drawstyle="steps-mid")
    axes.plot(times, _or_nan(found, "actual"), color="black", linewidth=1.2, label="what came", drawstyle="steps-mid")
    axes.axvline(point_time(now_s), color="tab:orange", linewidth=1, label="now")
    locator = AutoDateLocator(tz=zone)  # type: ignore[no-untyped-call]
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(ConciseDateFormatter(locator, tz=zone))  # type: ignore[no-untyped-call]
    axes.set_ylim(bottom=0)
    axes.set_title(title(view, quantity), fontsize=10)
    axes.legend(fontsize=8, loc="upper left")
    axes.grid(alpha=0.3)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise CommandError(f"{path} cannot be written: {error}") from error


def _or_nan(found: Sequence[Point], name: str) -> list[float]:
    return [math.nan if getattr(point, name) is None else getattr(point, name) for point in found]
