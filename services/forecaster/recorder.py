"""From the routers' counters in Redis to the history on disk, window by window, also those missed while away."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from services.common.load import LoadCounters, LoadCounts, WindowCounts, keep_s, start_of, window_index
from services.common.telemetry import logger
from services.forecaster.history import History, Seen

_log = logger(__name__)
_LOOKED = 0.5  # of a window, at least, for its counts to tell what it was
_NOTHING = LoadCounts()


class Recorder:
    """Records windows that have ended, and records them again when a router reports late.

    A window that nobody looked at for half of it is a gap. So is one of which a router that is registered since before
    it has not reported, until it does: a part of the traffic is not the traffic. What was recorded is replaced only by
    what is at least as complete.
    """

    def __init__(self, history: History, counters: LoadCounters, window_s: float) -> None:
        self._history = history
        self._counters = counters
        self._window_s = window_s
        self._seen: dict[int, Seen] | None = None

    async def catch_up(self, deployed: Mapping[str, float], routers: Mapping[str, float], now_s: float) -> list[int]:
        """Records what is new of windows that ended before `now_s`, and returns their numbers.

        `deployed`: since when each model is there, and `routers`: since when each router, in Unix seconds. Where the
        clock has gone back, windows that have not ended by it wait until they have. Raises redis.RedisError.
        """
        if self._seen is None:
            self._seen = await asyncio.to_thread(self._history.seen)
        last = window_index(now_s, self._window_s) - 1
        oldest = last - int(keep_s(self._window_s) / self._window_s)
        recorded = []
        written = await self._counters.windows()
        for window in sorted(written):
            if not oldest <= window <= last:
                continue
            before = self._seen.get(window)
            if before is not None and before.times == written[window]:
                continue
            counts = await self._counters.read(window, self._window_s)
            if counts is not None and await self._record(window, counts, written[window], deployed, routers):
                recorded.append(window)
        if any(window < oldest for window in written):
            await self._counters.drop(oldest)
        if any(window < oldest for window in self._seen):
            self._seen = {window: seen for window, seen in self._seen.items() if window >= oldest}
            await asyncio.to_thread(self._history.forget_seen, oldest)
        return recorded

    async def _record(
        self, window: int, counts: WindowCounts, times: int, deployed: Mapping[str, float], routers: Mapping[str, float]
    ) -> bool:
        assert self._seen is not None
        before = self._seen.get(window, Seen(0, 0.0))
        begin, end = start_of(window, self._window_s), start_of(window + 1, self._window_s)
        expected = frozenset(router for router, started in routers.items() if started <= begin)
        # A router that never reported and is gone meanwhile is missing still.
        seen = Seen(times, max(counts.total_s, before.total_s), (expected | before.missing) - counts.routers)
        values: dict[str, tuple[float, ...]] = {}
        if seen.missing:
            _log.warning(
                "a window waits for routers that have not reported", window=begin, routers=sorted(seen.missing)
            )
        elif counts.total_s >= before.total_s and counts.seen_s >= _LOOKED * self._window_s:
            values = {name: _row(_NOTHING, counts.seen_s) for name, since in deployed.items() if since < end}
            values |= {name: _row(count, counts.seen_s) for name, count in counts.counts.items()}
        await asyncio.to_thread(self._history.record, window, values, seen)
        self._seen[window] = seen
        return bool(values)


def _row(count: LoadCounts, seconds: float) -> tuple[float, ...]:
    """In order of QUANTITIES."""
    return (
        count.load_seconds / seconds,
        float(count.peak),
        count.arrivals / seconds,
        count.prompt_tokens / seconds,
        count.output_tokens / seconds,
    )
