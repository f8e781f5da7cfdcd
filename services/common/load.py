"""Load counters in Redis: what routers count per model and window, and what the forecaster reads.

Each process of a router is a reporter of its own, and writes what it has counted of a window so far as a whole: writing
it again, after an answer that was lost, changes nothing. Windows begin at multiples of their length in Unix time.

Keys: a hash per window and reporter (model: its counts); a hash per window (reporter: seconds that it looked); and one
hash over all (window: how often it was written), by which a reader knows what is new.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field
from typing import Any

from redis.asyncio import Redis

from warmserve.cluster.keys import Keys

_KEEP_S = 2 * 86_400
_KEEP_WINDOWS = 2_000


def keep_s(window_s: float) -> int:
    """Seconds that counters stay in Redis, for a forecaster that is away: two days, but 2,000 windows at most."""
    return math.ceil(min(_KEEP_S, _KEEP_WINDOWS * window_s))


def window_index(unix_s: float, window_s: float) -> int:
    """The number of the window that holds a moment, counted from 1970."""
    return math.floor(unix_s / window_s)


def start_of(index: int, window_s: float) -> int:
    """Begin of a window by its number, in Unix seconds."""
    return math.floor(index * window_s)


def reporter_name(router_id: str, process: str, life: int) -> str:
    """Who counts: a router's process, until its clock is set back; then its next life."""
    return f"{router_id}:{process}.{life}"


@dataclass
class LoadCounts:
    """What happened to one model in one window, at one router or at all."""

    arrivals: float = 0
    prompt_tokens: float = 0
    output_tokens: float = 0
    load_seconds: float = 0.0  # integral over the window of requests in progress
    peak: int = 0  # most requests in progress at any moment


@dataclass
class WindowCounts:
    """What all routers counted in one window."""

    seen_s: float
    """How long at least one router looked: the longest, or the window's length at most."""
    total_s: float
    """The sum over all routers: the more, the more complete."""
    routers: frozenset[str]
    """Ids of the routers that reported."""
    counts: dict[str, LoadCounts] = field(default_factory=dict)
    """By model; a model without traffic may be missing. Sums over routers, of the peaks too: so theirs is an upper
    bound."""


class LoadCounters:
    """Reads and writes the counters. Methods raise redis.RedisError where Redis is away."""

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self._redis = redis
        self._keys = keys

    async def report(
        self, reporter: str, index: int, window_s: float, seen_s: float, counts: Mapping[str, LoadCounts]
    ) -> None:
        """Writes all that one life of a router has counted of a window so far, in the `seen_s` seconds that it looked.

        `reporter`: see `reporter_name`. Said with no counts as well, it tells zero traffic from a gap.
        """
        keep = keep_s(window_s)
        values: Any = {model: json.dumps(astuple(count)) for model, count in counts.items()}
        async with self._redis.pipeline(transaction=True) as pipe:
            if values:
                key = self._keys.load(index, reporter)
                pipe.hset(key, mapping=values)
                pipe.expire(key, keep)
            pipe.hset(self._keys.load_reporters(index), reporter, seen_s)
            pipe.expire(self._keys.load_reporters(index), keep)
            pipe.hincrby(self._keys.load_windows(), str(index), 1)
            pipe.expire(self._keys.load_windows(), keep)
            await pipe.execute()

    async def holds(self, reporter: str, index: int) -> bool:
        """Whether a report is there; False where Redis has lost it."""
        return bool(await self._redis.hexists(self._keys.load_reporters(index), reporter))

    async def windows(self) -> dict[int, int]:
        """How often each window was written, by its number: what has changed since the last look is new."""
        found: Any = await self._redis.hgetall(self._keys.load_windows())
        return {int(index): int(times) for index, times in found.items()}

    async def drop(self, before: int) -> None:
        """Forgets of which windows before a number there were counts; those themselves expire."""
        old = [str(index) for index in await self.windows() if index < before]
        if old:
            await self._redis.hdel(self._keys.load_windows(), *old)

    async def read(self, index: int, window_s: float) -> WindowCounts | None:
        """All routers' counts of a window; None where no router counted in it (a gap, not zero traffic)."""
        seen: Any = await self._redis.hgetall(self._keys.load_reporters(index))
        if not seen:
            return None
        async with self._redis.pipeline(transaction=False) as pipe:
            for reporter in seen:
                pipe.hgetall(self._keys.load(index, reporter.decode()))
            hashes: Any = await pipe.execute()
        reports = [
            (reporter.decode(), float(seconds), fields)
            for (reporter, seconds), fields in zip(seen.items(), hashes, strict=True)
        ]
        return _merged(reports, window_s)


def _merged(reports: list[tuple[str, float, dict[bytes, bytes]]], window_s: float) -> WindowCounts:
    by_process: dict[str, float] = defaultdict(float)
    by_router: dict[str, float] = defaultdict(float)
    for reporter, seconds, _ in reports:
        by_process[_process(reporter)] += seconds
        by_router[_router(reporter)] += seconds
    counts: dict[str, LoadCounts] = {}
    peaks: dict[tuple[str, str], int] = defaultdict(int)
    for reporter, _, fields in reports:
        looked = by_process[_process(reporter)]
        # A clock that was set back goes through a window twice: then both times count by half.
        share = min(1.0, window_s / looked) if looked else 1.0
        for name, value in fields.items():
            model = name.decode()
            arrivals, prompt_tokens, output_tokens, load_seconds, peak = json.loads(value)
            total = counts.setdefault(model, LoadCounts())
            total.arrivals += arrivals * share
            total.prompt_tokens += prompt_tokens * share
            total.output_tokens += output_tokens * share
            total.load_seconds += load_seconds * share
            # Of a router's lives, one follows the other.
            peaks[model, _router(reporter)] = max(peaks[model, _router(reporter)], peak)
    for (model, _), peak in peaks.items():
        counts[model].peak += peak
    longest = min(window_s, max(by_router.values()))
    return WindowCounts(longest, sum(by_router.values()), frozenset(by_router), counts)


def _process(reporter: str) -> str:
    return reporter.rpartition(".")[0]


def _router(reporter: str) -> str:
    return reporter.rpartition(":")[0]
