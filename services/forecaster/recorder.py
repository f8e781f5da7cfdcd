"""From the routers' counters in Redis to the history on disk, window by window, also those missed while away."""

from __future__ import annotations

import asyncio
from collections.abc import Collection

from services.common.load import KEEP_S, LoadCounters, window_start
from services.forecaster.history import History


class Recorder:
    """Records whole windows. The newest recorded one is read again, for a router may have reported late."""

    def __init__(self, history: History, counters: LoadCounters, window_s: float, retention_s: float) -> None:
        self._history = history
        self._counters = counters
        self._window_s = window_s
        self._retention_s = retention_s

    async def catch_up(self, models: Collection[str], now_s: float) -> int:
        """Records all windows that ended before `now_s`, and returns the begin of the last one.

        Where the clock has gone back, nothing new is recorded until it has caught up. Raises redis.RedisError.
        """
        last = window_start(window_start(now_s, self._window_s) - self._window_s / 2, self._window_s)
        newest = await asyncio.to_thread(self._history.newest)
        if newest is None:
            newest = last
        oldest = window_start(last - KEEP_S, self._window_s)  # what is older is not in Redis any more
        start = max(newest, oldest)
        while start <= last:
            counts = await self._counters.read(models, start)
            await asyncio.to_thread(self._history.record, start, counts)
            start = window_start(start + self._window_s * 1.5, self._window_s)
        await asyncio.to_thread(self._history.trim, last - self._retention_s)
        return last
