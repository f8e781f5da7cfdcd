"""The event stream: a capped Redis stream that keeps each model's timeline (warmed, woken, evicted by whom and why)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from redis.asyncio import Redis

from warmserve.cluster.keys import Keys
from warmserve.cluster.store import decode, encode
from warmserve.v1 import cluster_pb2

_KEEP = 100_000


class EventStream:
    """Appends to and reads the event stream."""

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self._redis = redis
        self._key = keys.events()

    async def append(self, event: cluster_pb2.Event) -> None:
        """Adds an event at the end. Raises redis.RedisError where Redis is away."""
        await self._redis.xadd(self._key, {"event": encode(event)}, maxlen=_KEEP, approximate=True)

    async def newest(self, count: int, before: str = "+") -> list[tuple[str, cluster_pb2.Event]]:
        """The newest `count` events, oldest first, each with its id; "(ID" as `before` takes only those before ID."""
        found: Any = await self._redis.xrevrange(self._key, max=before, count=count)
        return [_parse(item) for item in reversed(found)]

    async def follow(self, after: str = "$") -> AsyncIterator[tuple[str, cluster_pb2.Event]]:
        """Events later than id `after` as they come; "$" stands for now."""
        while True:
            answer: Any = await self._redis.xread({self._key: after}, count=100, block=1000)
            _heed_cancellation()
            for item in stream_items(answer).get(self._key.encode(), []):
                after, event = _parse(item)
                yield after, event


def _heed_cancellation() -> None:
    """Raises CancelledError where redis-py (8.1) has swallowed one, as it does with one pending when a call begins."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


def stream_items(answer: Any) -> dict[bytes, list[tuple[bytes, dict[bytes, bytes]]]]:
    """The answer of XREAD or XREADGROUP as entries by stream, in either version of Redis's protocol."""
    if isinstance(answer, dict):  # RESP3 nests the entries once more
        return {stream: [entry for batch in batches for entry in batch] for stream, batches in answer.items()}
    return dict(answer or [])


def _parse(item: tuple[bytes, dict[bytes, bytes]]) -> tuple[str, cluster_pb2.Event]:
    identifier, fields = item
    return identifier.decode(), decode(fields[b"event"], cluster_pb2.Event)
