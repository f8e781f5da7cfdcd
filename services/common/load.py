"""Load counters in Redis: what routers count per model and window, and what the forecaster reads.

One hash per (model, window). Sums are added by every router; each router keeps its own peak, and their sum bounds the
true peak from above. Windows begin at multiples of their length in Unix time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from redis.asyncio import Redis

from warmserve.cluster.keys import Keys

KEEP_S = 2 * 86_400  # seconds that counters stay in Redis: a forecaster may be away for as long


def window_start(unix_s: float, window_s: float) -> int:
    """Begin of the window that holds a moment, in Unix seconds."""
    return math.floor(math.floor(unix_s / window_s) * window_s)


@dataclass
class LoadCounts:
    """What happened to one model in one window, at one router or at all."""

    arrivals: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    load_seconds: float = 0.0  # integral over the window of requests in progress
    peak: int = 0  # most requests in progress at any moment


class LoadCounters:
    """Reads and writes the counters. Methods raise redis.RedisError where Redis is away."""

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self._redis = redis
        self._keys = keys

    async def add(self, router_id: str, start_s: int, counts: Mapping[str, LoadCounts]) -> None:
        """Adds one router's counts since its last call, by model, to a window; `peak` is the window's so far.

        Said with no counts as well, it tells zero traffic from a gap.
        """
        async with self._redis.pipeline(transaction=True) as pipe:
            reporters = self._keys.load_reporters(start_s)
            pipe.sadd(reporters, router_id)
            pipe.expire(reporters, KEEP_S)
            for model, count in counts.items():
                key = self._keys.load(model, start_s)
                pipe.hincrby(key, "arrivals", count.arrivals)
                pipe.hincrby(key, "prompt_tokens", count.prompt_tokens)
                pipe.hincrby(key, "output_tokens", count.output_tokens)
                pipe.hincrbyfloat(key, "load_seconds", count.load_seconds)
                pipe.hset(key, f"peak:{router_id}", count.peak)
                pipe.expire(key, KEEP_S)
            await pipe.execute()

    async def read(self, models: Iterable[str], start_s: int) -> dict[str, LoadCounts] | None:
        """All routers' counts of a window by model; None where no router counted in it (a gap, not zero traffic)."""
        names = list(models)
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.exists(self._keys.load_reporters(start_s))
            for name in names:
                pipe.hgetall(self._keys.load(name, start_s))
            reported, *hashes = await pipe.execute()
        if not reported:
            return None
        return {name: _parse(fields) for name, fields in zip(names, hashes, strict=True)}


def _parse(fields: Mapping[bytes, bytes]) -> LoadCounts:
    return LoadCounts(
        arrivals=int(fields.get(b"arrivals", 0)),
        prompt_tokens=int(fields.get(b"prompt_tokens", 0)),
        output_tokens=int(fields.get(b"output_tokens", 0)),
        load_seconds=float(fields.get(b"load_seconds", 0.0)),
        peak=sum(int(value) for key, value in fields.items() if key.startswith(b"peak:")),
    )
