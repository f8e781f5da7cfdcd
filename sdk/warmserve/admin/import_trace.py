"""A trace made into the windows that the forecaster records. Pure but for reading the file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from warmserve.admin.moments import length, spell_unix
from warmserve.admin.views import nearest
from warmserve.cluster.keys import check_model_name
from warmserve.traces import Format, Request, TraceError, Window, detect, read_requests, read_windows
from warmserve.traces.counting import ServiceTime, complete, count, fit
from warmserve.traces.file import OnProgress
from warmserve.v1 import forecast_pb2

_DATES_FROM_S = 1e8  # 1973: what is earlier counts from the trace's own begin
_WINDOWS_PER_MESSAGE = 2000


@dataclass(frozen=True)
class Renaming:
    """Which models of a trace to take, and under which name. `""` stands for all of them."""

    names: dict[str, str]

    @classmethod
    def parse(cls, options: Sequence[str]) -> Renaming:
        """From NAME, or any number of FROM=NAME. Raises ValueError."""
        names: dict[str, str] = {}
        for option in options:
            old, _, new = option.rpartition("=")
            if old in names or (names and "" in (old, *names)):
                raise ValueError(f"{option!r} says again what was said: give one NAME, or FROM=NAME for each")
            check_model_name(new)
            names[old] = new
        return cls(names)

    def name(self, model: str) -> str | None:
        """What a model of the trace is to be called; None where it is to be left out."""
        if not self.names:
            return model
        return self.names[""] if "" in self.names else self.names.get(model)


@dataclass(frozen=True)
class Import:
    """What to read, and how."""

    path: Path
    format: Format | None
    renaming: Renaming
    shift_to_now: bool
    by_client: bool
    window_s: float
    """Length of the forecaster's windows."""
    service_time: ServiceTime


def read(what: Import, now_s: float, on_progress: OnProgress | None) -> list[Window]:
    """The windows to record, in order of model, then time, in Unix seconds. Raises TraceError."""
    format = what.format or detect(what.path)
    seen: set[str] = set()

    def renamed(found: Iterable[Request] | Iterable[Window]) -> Iterator[Request | Window]:
        for item in found:
            seen.add(item.model)
            name = what.renaming.name(item.model)
            if name is not None:
                yield item if name == item.model else replace(item, model=name)

    windows: list[Window]
    if format.has_windows:
        found = read_windows(what.path, format, by_client=what.by_client, on_progress=on_progress)
        taken = [complete(window, what.service_time) for window in renamed(found) if isinstance(window, Window)]
        windows = sorted(fit(taken, what.window_s), key=lambda window: (window.model, window.start_s))
    else:
        requests = read_requests(what.path, format, on_progress=on_progress)
        taken_requests = (request for request in renamed(requests) if isinstance(request, Request))
        windows = count(taken_requests, what.window_s, what.service_time, aligned=not what.shift_to_now)
    _check_models(what, windows, seen)
    return _placed(what, windows, now_s)


def messages(windows: Iterable[Window], on_sent: Callable[[int], None]) -> Iterator[forecast_pb2.ImportHistoryRequest]:
    """ImportHistory's requests. `on_sent` hears how many windows each that was taken held."""
    batch: list[Window] = []
    for window in windows:
        if batch and (len(batch) == _WINDOWS_PER_MESSAGE or window.model != batch[0].model):
            yield _message(batch)
            on_sent(len(batch))
            batch = []
        batch.append(window)
    if batch:
        yield _message(batch)
        on_sent(len(batch))


def _message(windows: Sequence[Window]) -> forecast_pb2.ImportHistoryRequest:
    return forecast_pb2.ImportHistoryRequest(
        model=windows[0].model,
        window_s=windows[0].window_s,
        windows=[
            forecast_pb2.HistoryWindow(
                start_unix_s=math.floor(window.start_s),
                window_s=window.window_s,
                actual=forecast_pb2.LoadSample(
                    mean_load=window.mean_load or 0.0,
                    peak_load=window.peak_load or 0.0,
                    request_rate=window.request_rate or 0.0,
                    prompt_tokens_per_s=window.prompt_tokens_per_s or 0.0,
                    output_tokens_per_s=window.output_tokens_per_s or 0.0,
                ),
            )
            for window in windows
        ],
    )


def _check_models(what: Import, windows: Sequence[Window], seen: set[str]) -> None:
    unknown = sorted(set(what.renaming.names) - seen - {""})
    if unknown:
        raise TraceError(f"{what.path} has no model {unknown[0]!r}: {nearest(unknown[0], seen)}")
    if not windows:
        raise TraceError(f"{what.path}: there is not one whole window of {length(what.window_s)} in it")
    for model in sorted({window.model for window in windows}):
        if not model:
            raise TraceError(f"{what.path} names no model: say --model NAME")
        try:
            check_model_name(model)
        except ValueError as error:
            raise TraceError(f"{error}; --model {model}=NAME gives it another") from error
    keys = {(window.model, window.start_s) for window in windows}
    if len(keys) < len(windows):
        models = ", ".join(sorted(seen)[:8])
        raise TraceError(
            f"{what.path} has several windows for the same model and time: windows of several models ({models}) cannot "
            "be made one's; choose with --model FROM=NAME"
        )


def _placed(what: Import, windows: list[Window], now_s: float) -> list[Window]:
    """In Unix time, so that they begin at multiples of their length and all of them have ended."""
    begin = min(window.start_s for window in windows)
    end = max(window.start_s + window.window_s for window in windows)
    shift = 0.0
    if what.shift_to_now:
        shift = math.floor(now_s / what.window_s) * what.window_s - end
    elif begin < _DATES_FROM_S:
        raise TraceError(f"the times of {what.path} count from its begin and are no dates: --shift-to-now ends it now")
    elif end > now_s:
        raise TraceError(
            f"{what.path} goes on until {spell_unix(end)}, which is still to come: --shift-to-now ends it now"
        )
    placed = []
    for window in windows:
        number = (window.start_s + shift) / window.window_s
        if abs(number - round(number)) * window.window_s > 1.0:
            raise TraceError(
                f"{what.path}: the window of {window.model} at {spell_unix(window.start_s + shift)} does not begin at "
                f"a multiple of its length, {length(window.window_s)}, as all must"
            )
        placed.append(replace(window, start_s=round(number) * window.window_s))
    return placed
