"""What was and what is expected of one model, put side by side. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

from warmserve.admin.moments import length
from warmserve.admin.plain import Plain, plain
from warmserve.v1 import cluster_pb2, forecast_pb2


class Quantity(StrEnum):
    """What is forecast of a model."""

    load = "load"
    peak = "peak"
    rate = "rate"
    prompt_tokens = "prompt-tokens"
    output_tokens = "output-tokens"


FIELDS = {
    Quantity.load: "mean_load",
    Quantity.peak: "peak_load",
    Quantity.rate: "request_rate",
    Quantity.prompt_tokens: "prompt_tokens_per_s",
    Quantity.output_tokens: "output_tokens_per_s",
}
WORDS = {
    Quantity.load: "requests in progress, mean of each window",
    Quantity.peak: "most requests in progress at any moment of each window",
    Quantity.rate: "requests per second",
    Quantity.prompt_tokens: "prompt tokens per second",
    Quantity.output_tokens: "output tokens per second",
}


@dataclass(frozen=True)
class Outlook:
    """All that the forecaster tells of a model."""

    model: str
    ahead: int
    """How many windows before its own each forecast of `history` was made."""
    window_s: float
    predictor: str
    """What made `forecast`; "" where the model has none, as it is not deployed."""
    made_unix_ms: int
    history: list[Plain]
    """Past windows: what came, and what had been forecast; either may be None."""
    forecast: list[Plain]
    """The window that goes on now, and those to come."""
    calendar: list[Plain]
    """Announced expectations of this time."""


@dataclass(frozen=True)
class Point:
    """One window of one quantity; what is not known is None."""

    start_s: float
    window_s: float
    actual: float | None = None
    p50: float | None = None
    p90: float | None = None
    p99: float | None = None


def outlook(
    model: str,
    ahead: int,
    history: forecast_pb2.GetHistoryResponse,
    forecast: cluster_pb2.Forecast | None,
    calendar: Iterable[cluster_pb2.CalendarEntry],
) -> Outlook:
    """What the forecaster answered, in one. `calendar`: what is announced now; what has ended is in `history`."""
    entries = {(entry.start_unix_s, entry.id): plain(entry) for entry in (*history.calendar, *calendar)}
    return Outlook(
        model=model,
        ahead=ahead,
        window_s=history.window_s or (forecast.window_s if forecast else 0.0),
        predictor=forecast.predictor if forecast else "",
        made_unix_ms=forecast.made_unix_ms if forecast else 0,
        history=[plain(window) for window in history.windows],
        forecast=[plain(window) for window in forecast.windows] if forecast else [],
        calendar=[entries[key] for key in sorted(entries)],
    )


def title(view: Outlook, quantity: Quantity) -> str:
    """What is drawn."""
    windows = f"{view.ahead} window{'s' if view.ahead > 1 else ''} of {length(view.window_s)}"
    return f"{view.model}: {WORDS[quantity]}; past forecasts as made {windows} ahead"


def points(view: Outlook, quantity: Quantity) -> list[Point]:
    """Past and coming windows of one quantity, in order of time, with one of which nothing is known in each gap."""
    name = FIELDS[quantity]
    found: dict[float, Point] = {}
    for window in view.history:
        actual = (window["actual"] or {}).get(name)
        found[window["start_unix_s"]] = _point(
            window["start_unix_s"], window["window_s"], actual, window["forecast"], name
        )
    for coming in view.forecast:
        start = coming["start_unix_s"]
        known = found.get(start)
        found[start] = _point(start, view.window_s, known.actual if known else None, coming, name)
    ordered = [found[start] for start in sorted(found)]
    filled = ordered[:1]
    for before, after in pairwise(ordered):
        end = before.start_s + before.window_s
        if end < after.start_s:
            filled.append(Point(end, after.start_s - end))
        filled.append(after)
    return filled


def _point(start_s: float, window_s: float, actual: float | None, forecast: Plain | None, name: str) -> Point:
    quantiles = (forecast or {}).get(name) or {}
    return Point(start_s, window_s, actual, quantiles.get("p50"), quantiles.get("p90"), quantiles.get("p99"))
