"""Load as this router sees it, recorded per model and window for the forecaster."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from services.common.load import LoadCounters, LoadCounts, reporter_name, window_index
from services.common.tasks import end_tasks
from services.common.telemetry import logger
from services.router.dispatch import REDIS_ERRORS

_log = logger(__name__)
_FLUSHES_PER_WINDOW = 10
_FLUSH_S = 1.0  # what a router that is killed has not yet written is lost
_REDIS_S = 5.0
_KEEP_WINDOWS = 100  # windows kept in memory, to be written (again) where Redis was away or has lost them
_STILL_S = 60.0


@dataclass
class Window:
    """What was counted in one window, so far. A clock that was set back makes another one of the same number."""

    index: int
    life: int = 0  # goes up when the clock is set back
    seen_s: float = 0.0  # seconds counted in
    counts: dict[str, LoadCounts] = field(default_factory=dict)
    written: bool = False  # as it is now


class LoadRecorder:
    """Counts arrivals, tokens and requests in progress. Pure: every method is told the time, in Unix seconds.

    Where the clock leaps ahead, or the process stood still, by two windows and a minute at least, nobody looked
    meanwhile: windows between are gaps. Where it is set back, counting goes on in the window that it shows.
    """

    def __init__(self, window_s: float, now: float) -> None:
        self._window_s = window_s
        self._in_progress: dict[str, int] = {}
        self._at = now
        self._current = Window(window_index(now, window_s))
        self._closed: deque[Window] = deque(maxlen=_KEEP_WINDOWS)

    @property
    def window_end(self) -> float:
        """When the current window ends."""
        return (self._current.index + 1) * self._window_s

    def arrived(self, model: str, prompt_tokens: int, now: float) -> None:
        """A request was accepted; it is in progress until `ended`."""
        self._advance(now)
        self._in_progress[model] = self._in_progress.get(model, 0) + 1
        counts = self._counts(model)
        counts.arrivals += 1
        counts.prompt_tokens += prompt_tokens
        counts.peak = max(counts.peak, self._in_progress[model])

    def generated(self, model: str, tokens: int, now: float) -> None:
        """Tokens came out."""
        self._advance(now)
        self._counts(model).output_tokens += tokens

    def ended(self, model: str, now: float) -> None:
        """A request is no longer in progress."""
        self._advance(now)
        self._in_progress[model] -= 1
        if not self._in_progress[model]:
            del self._in_progress[model]

    def unwritten(self, now: float) -> list[Window]:
        """Windows to write, oldest first; the current one, so far, is always there. Mark what is written."""
        self._advance(now)
        return [*(window for window in self._closed if not window.written), self._current]

    def last_written(self) -> Window | None:
        """The newest window of which something was written."""
        return next((window for window in (self._current, *reversed(self._closed)) if window.written), None)

    def write_again(self) -> None:
        """Has all that is kept written again, for it was lost."""
        for window in (*self._closed, self._current):
            window.written = False

    def _counts(self, model: str) -> LoadCounts:
        return self._current.counts.setdefault(model, LoadCounts())

    def _advance(self, now: float) -> None:
        index = window_index(now, self._window_s)
        if index < self._current.index:
            self._begin(Window(index, self._current.life + 1))
            self._at = now
        elif now - self._at > 2 * self._window_s + _STILL_S:
            self._begin(Window(index, self._current.life))
            self._at = now
        while index > self._current.index:
            self._integrate(self.window_end)
            self._begin(Window(self._current.index + 1, self._current.life))
        self._integrate(now)

    def _begin(self, window: Window) -> None:
        self._current.written = False  # its last counts are not
        self._closed.append(self._current)
        self._current = window
        for model, number in self._in_progress.items():
            window.counts[model] = LoadCounts(peak=number)

    def _integrate(self, until: float) -> None:
        passed = max(0.0, until - self._at)
        self._current.seen_s += passed
        for model, number in self._in_progress.items():
            self._current.counts[model].load_seconds += passed * number
        self._at = until


class LoadReporter:
    """Writes the recorder's windows to Redis: every second (ten times in a shorter window), at each window's end, and
    at the router's end."""

    def __init__(
        self,
        router_id: str,
        recorder: LoadRecorder,
        counters: LoadCounters,
        window_s: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._router_id = router_id
        self._process = uuid.uuid4().hex[:8]
        self._recorder = recorder
        self._counters = counters
        self._window_s = window_s
        self._clock = clock
        self._pause_s = min(window_s / _FLUSHES_PER_WINDOW, _FLUSH_S)
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to write."""
        self._task = asyncio.create_task(self._run(), name="load reporter")

    async def close(self) -> None:
        """Writes the rest."""
        await end_tasks([self._task])
        await self.flush()

    async def _run(self) -> None:
        while True:
            await self.flush()
            # Just after the window's end, so that the forecaster finds it complete.
            await asyncio.sleep(min(self._pause_s, max(0.0, self._recorder.window_end - self._clock()) + 0.001))

    async def flush(self) -> None:
        """Writes what was counted; what Redis does not take is kept, and what it has lost is written again."""
        try:
            async with asyncio.timeout(_REDIS_S):
                last = self._recorder.last_written()
                if last and not await self._counters.holds(self._name(last), last.index):
                    self._recorder.write_again()
            for window in self._recorder.unwritten(self._clock()):
                await self._write(window)
        except REDIS_ERRORS as error:
            _log.debug("load counts are kept until Redis answers", error=str(error))

    async def _write(self, window: Window) -> None:
        window.written = True  # until it changes: what is counted from here on is not in the report
        try:
            async with asyncio.timeout(_REDIS_S):
                await self._counters.report(
                    self._name(window), window.index, self._window_s, window.seen_s, window.counts
                )
        except BaseException:
            window.written = False
            raise

    def _name(self, window: Window) -> str:
        return reporter_name(self._router_id, self._process, window.life)
