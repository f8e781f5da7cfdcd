"""Load as this router sees it, recorded per model and window for the forecaster."""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import dataclass, field

from services.common.load import LoadCounters, LoadCounts
from services.common.tasks import end_tasks
from services.common.telemetry import logger
from services.router.dispatch import REDIS_ERRORS

_log = logger(__name__)
_FLUSHES_PER_WINDOW = 10
_REDIS_S = 5.0
_KEEP_WINDOWS = 100  # windows kept in memory while Redis is away


@dataclass
class _ModelLoad:
    in_progress: int = 0
    counts: LoadCounts = field(default_factory=LoadCounts)  # since the last flush; the peak is the window's


class LoadRecorder:
    """Counts arrivals, tokens and requests in progress. Pure: every method is told the time, in Unix seconds."""

    def __init__(self, window_s: float, now: float) -> None:
        self._window_s = window_s
        self._models: dict[str, _ModelLoad] = {}
        self._at = now
        self._window = math.floor(now / window_s)
        self._closed: list[tuple[int, dict[str, LoadCounts]]] = []

    @property
    def window_end(self) -> float:
        """When the current window ends."""
        return (self._window + 1) * self._window_s

    @property
    def _start(self) -> int:
        return math.floor(self._window * self._window_s)  # as services.common.load.window_start has it

    def arrived(self, model: str, prompt_tokens: int, now: float) -> None:
        """A request was accepted; it is in progress until `ended`."""
        self._advance(now)
        load = self._models.setdefault(model, _ModelLoad())
        load.in_progress += 1
        load.counts.arrivals += 1
        load.counts.prompt_tokens += prompt_tokens
        load.counts.peak = max(load.counts.peak, load.in_progress)

    def generated(self, model: str, tokens: int, now: float) -> None:
        """Tokens came out."""
        self._advance(now)
        self._models[model].counts.output_tokens += tokens

    def ended(self, model: str, now: float) -> None:
        """A request is no longer in progress."""
        self._advance(now)
        self._models[model].in_progress -= 1

    def take(self, now: float) -> list[tuple[int, dict[str, LoadCounts]]]:
        """What was counted since the last call, by window begin, oldest first; the current window is always there."""
        self._advance(now)
        taken, self._closed = self._closed, []
        taken.append((self._start, self._cut()))
        return taken

    def give_back(self, taken: list[tuple[int, dict[str, LoadCounts]]]) -> None:
        """Keeps for the next call what could not be written. What has grown too old is dropped: a gap."""
        self._closed = (taken + self._closed)[-_KEEP_WINDOWS:]

    def _advance(self, now: float) -> None:
        while now >= self.window_end:
            self._integrate(self.window_end)
            self._closed = [*self._closed, (self._start, self._cut())][-_KEEP_WINDOWS:]
            self._window += 1
            for load in self._models.values():
                load.counts.peak = load.in_progress
            self._models = {model: load for model, load in self._models.items() if load.in_progress}
        self._integrate(now)

    def _integrate(self, until: float) -> None:
        passed = max(0.0, until - self._at)
        for load in self._models.values():
            load.counts.load_seconds += passed * load.in_progress
        self._at = max(self._at, until)

    def _cut(self) -> dict[str, LoadCounts]:
        cut = {}
        for model, load in self._models.items():
            cut[model] = load.counts
            load.counts = LoadCounts(peak=load.counts.peak)
        return cut


class LoadReporter:
    """Writes the recorder's counts to Redis: ten times a window, at its end, and at the router's end."""

    def __init__(self, router_id: str, recorder: LoadRecorder, counters: LoadCounters, window_s: float) -> None:
        self._router_id = router_id
        self._recorder = recorder
        self._counters = counters
        self._pause_s = window_s / _FLUSHES_PER_WINDOW
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
            await asyncio.sleep(min(self._pause_s, max(0.0, self._recorder.window_end - time.time()) + 0.001))

    async def flush(self) -> None:
        """Writes what was counted; what Redis does not take is kept."""
        taken = self._recorder.take(time.time())
        try:
            while taken:
                async with asyncio.timeout(_REDIS_S):
                    await self._counters.add(self._router_id, *taken[0])
                taken = taken[1:]
        except REDIS_ERRORS as error:
            _log.debug("load counts are kept until Redis answers", error=str(error))
        finally:
            self._recorder.give_back(taken)
