"""Reading a trace of any format."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from warmserve.traces import requests
from warmserve.traces.file import OnProgress, TraceFile
from warmserve.traces.formats import Format, detect
from warmserve.traces.servegen import servegen
from warmserve.traces.shapes import Request, TraceError, Window
from warmserve.traces.windows import windows

_READERS: dict[Format, Callable[[TraceFile], Iterator[Request]]] = {
    Format.azure: requests.azure,
    Format.burstgpt: requests.burstgpt,
    Format.csv: requests.table,
    Format.jsonl: requests.json_lines,
    Format.access_log: requests.access_log,
}
_LATE = 100_000  # requests: how far out of order a trace may be


def read_requests(
    path: Path, format: Format | None = None, model: str | None = None, on_progress: OnProgress | None = None
) -> Iterator[Request]:
    """The requests of a trace, in order of time, read as they are asked for.

    `format`: found out where it is None. `model`: the model of all of them, whatever the trace says. A request may
    stand up to 100,000 places behind its own; a trace that is less in order than that is refused. Raises TraceError,
    also while iterating.
    """
    format = format or detect(path)
    if format.has_windows:
        raise TraceError(f"{path} holds windows ({format}), and requests were expected: {', '.join(_READERS)}")
    file = TraceFile(path, on_progress)
    found = _READERS[format](file)
    if model is not None:
        found = (replace(request, model=model) for request in found)
    return _in_order(file, found)


def read_windows(
    path: Path,
    format: Format | None = None,
    model: str | None = None,
    by_client: bool = False,
    on_progress: OnProgress | None = None,
) -> Iterator[Window]:
    """The windows of a trace; those that nobody counted are left out.

    `by_client`: each of ServeGen's clients is a model of its own, named MODEL/CLIENT. Otherwise as read_requests, but
    in the file's order.
    """
    format = format or detect(path)
    if not format.has_windows:
        raise TraceError(f"{path} holds requests ({format}), and windows were expected: servegen, windows")
    file = TraceFile(path, on_progress)
    found = servegen(file, by_client) if format is Format.servegen else windows(file)
    return found if model is None else (replace(window, model=model) for window in found)


def from_zero(trace: Iterable[Request]) -> Iterator[Request]:
    """The same requests, of which the first is at 0 s."""
    begin: float | None = None
    for request in trace:
        begin = request.time_s if begin is None else begin
        yield replace(request, time_s=request.time_s - begin)


def _in_order(file: TraceFile, found: Iterable[Request]) -> Iterator[Request]:
    # Logs are written as requests end: what is near its place is sorted on the way, without holding all of it.
    waiting: list[tuple[float, int, Request]] = []
    newest = -float("inf")
    count = 0
    for request in found:
        if request.time_s < newest:
            raise file.wrong(f"it is more than {_LATE:,} requests behind its place: sort the trace by time")
        count += 1
        heapq.heappush(waiting, (request.time_s, count, request))
        if len(waiting) > _LATE:
            newest, _, earliest = heapq.heappop(waiting)
            yield earliest
    waiting.sort()
    if not count:
        raise TraceError(f"{file.path}: there are no requests in it")
    for _, _, request in waiting:
        yield request
