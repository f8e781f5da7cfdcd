"""From requests to the windows that a forecaster keeps, and from windows of one kind to those of another.

A trace tells when requests came and how long they were, not how long they took: how many are in progress at a time
follows from a service-time model, which the caller gives.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

from warmserve.traces.fields import TYPICAL_OUTPUT_TOKENS, TYPICAL_PROMPT_TOKENS
from warmserve.traces.shapes import Request, TraceError, Window

ServiceTime = Callable[[int, int], float]
"""Seconds that a request of so many prompt and output tokens is in progress."""

_TOLERANCE = 1e-6


@dataclass
class _Counts:
    arrivals: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    load_seconds: float = 0.0
    peak: int = 0


@dataclass
class _Model:
    counts: dict[int, _Counts] = field(default_factory=dict)  # by the window's number
    ends: list[float] = field(default_factory=list)  # of requests in progress, a heap
    window: int = 0  # up to which peaks are counted


def count(requests: Iterable[Request], window_s: float, service_time: ServiceTime, aligned: bool) -> list[Window]:
    """Windows of all models, in order of model, then time; from requests in order of time.

    Windows begin at multiples of `window_s` where they are `aligned`, else at multiples after the first request. Only
    windows that the trace covers whole are given; in these a model without requests had no traffic.
    """
    models: dict[str, _Model] = {}
    begin = end = 0.0
    origin: float | None = None
    for request in requests:
        if origin is None:
            begin = request.time_s
            origin = 0.0 if aligned else begin
        end = request.time_s
        model = models.setdefault(request.model, _Model())
        at = request.time_s - origin
        _arrive(model, request, at, at + max(0.0, service_time(request.prompt_tokens, request.output_tokens)), window_s)
    if origin is None:
        return []
    first = math.ceil((begin - origin) / window_s - _TOLERANCE)
    last = math.floor((end - origin) / window_s + _TOLERANCE)  # the one that is not whole any more
    found = []
    for name, model in sorted(models.items()):
        _peaks_until(model, last, window_s)
        found += [_window(name, model.counts.get(number), number, origin, window_s) for number in range(first, last)]
    return found


def _arrive(model: _Model, request: Request, at: float, end: float, window_s: float) -> None:
    number = math.floor(at / window_s)
    _peaks_until(model, number, window_s)
    while model.ends and model.ends[0] <= at:
        heapq.heappop(model.ends)
    heapq.heappush(model.ends, end)
    counts = model.counts.setdefault(number, _Counts())
    counts.arrivals += 1
    counts.prompt_tokens += request.prompt_tokens
    counts.output_tokens += request.output_tokens
    counts.peak = max(counts.peak, len(model.ends))
    for within in range(number, math.floor(end / window_s) + 1):
        share = min(end, (within + 1) * window_s) - max(at, within * window_s)
        model.counts.setdefault(within, _Counts()).load_seconds += max(0.0, share)


def _peaks_until(model: _Model, number: int, window_s: float) -> None:
    """What is in progress as a window begins counts for its peak."""
    while model.window < number:
        if not model.ends:
            model.window = number
            return
        model.window += 1
        while model.ends and model.ends[0] <= model.window * window_s:
            heapq.heappop(model.ends)
        if model.ends:
            counts = model.counts.setdefault(model.window, _Counts())
            counts.peak = max(counts.peak, len(model.ends))


def _window(model: str, counts: _Counts | None, number: int, origin: float, window_s: float) -> Window:
    counts = counts or _Counts()
    return Window(
        start_s=origin + number * window_s,
        window_s=window_s,
        model=model,
        request_rate=counts.arrivals / window_s,
        mean_load=counts.load_seconds / window_s,
        peak_load=float(counts.peak),
        prompt_tokens_per_s=counts.prompt_tokens / window_s,
        output_tokens_per_s=counts.output_tokens / window_s,
    )


def complete(window: Window, service_time: ServiceTime) -> Window:
    """The window, with what its trace does not tell guessed from its rate or its load. Raises TraceError without both.

    Requests are taken as typical conversations (Azure's medians). Mean load = rate x service time (Little's law); the
    peak is what Poisson arrivals reach once in the window: mean + sqrt(2 ln(n) mean) of n independent moments, where a
    service time separates one from the next.
    """
    service_s = service_time(TYPICAL_PROMPT_TOKENS, TYPICAL_OUTPUT_TOKENS)
    rate, mean, peak = window.request_rate, window.mean_load, window.peak_load
    if rate is None and mean is None:
        raise TraceError(
            f"the window of {window.model or 'the model'} at {window.start_s:g} s has neither rate nor load"
        )
    if mean is None:
        mean = (rate or 0.0) * service_s
    if rate is None:
        rate = mean / service_s
    if peak is None:
        moments = max(math.e, window.window_s / service_s)
        peak = mean + math.sqrt(2 * math.log(moments) * mean)
    prompt, output = window.prompt_tokens_per_s, window.output_tokens_per_s
    return replace(
        window,
        request_rate=rate,
        mean_load=mean,
        peak_load=max(peak, mean),
        prompt_tokens_per_s=rate * TYPICAL_PROMPT_TOKENS if prompt is None else prompt,
        output_tokens_per_s=rate * TYPICAL_OUTPUT_TOKENS if output is None else output,
    )


def fit(windows: Iterable[Window], window_s: float) -> Iterator[Window]:
    """Windows that can be joined into ones of `window_s`: longer ones are cut into equal ones with the same values.

    Raises TraceError where lengths do not divide one another.
    """
    for window in windows:
        ratio = window.window_s / window_s
        pieces = max(1, round(ratio))
        whole = ratio if ratio >= 1 else 1 / ratio
        if abs(whole - round(whole)) > _TOLERANCE:
            raise TraceError(
                f"windows of {window.window_s:g} s can neither be cut into windows of {window_s:g} s nor joined to them"
            )
        for piece in range(pieces):
            yield replace(window, start_s=window.start_s + piece * window_s, window_s=window.window_s / pieces)
