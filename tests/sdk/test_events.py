"""The event stream's reader, over a real Redis."""

from __future__ import annotations

import asyncio

import pytest
from redis.asyncio import Redis

from tests.sdk.cluster_state import write_events
from warmserve.cluster.keys import Keys


async def test_newest_goes_back_in_pages(redis: Redis, keys: Keys) -> None:
    stream = await write_events(redis, keys)
    everything = await stream.newest(100)
    assert len(everything) == 32
    newest = await stream.newest(10)
    assert newest == everything[-10:]
    assert await stream.newest(10, f"({newest[0][0]}") == everything[-20:-10]


async def test_follow_ends_also_when_cancelled_between_two_reads(redis: Redis, keys: Keys) -> None:
    stream = await write_events(redis, keys)

    async def follow() -> None:
        task = asyncio.current_task()
        assert task is not None
        async for _ in stream.follow("0"):
            if not task.cancelling():
                task.cancel()  # as Ctrl-C does while this runs: pending when the next read begins

    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(follow(), 30)
