"""Reading the event stream in Redis."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from redis.asyncio import Redis
from redis.exceptions import RedisError

from warmserve.admin.target import CommandError, Target, warn
from warmserve.cluster.events import EventStream
from warmserve.v1 import cluster_pb2

_PAGE = 1000

Item = tuple[str, cluster_pb2.Event]


@asynccontextmanager
async def open_events(target: Target) -> AsyncIterator[EventStream]:
    """The event stream. Raises CommandError where the URL is none of Redis."""
    try:
        redis = Redis.from_url(target.redis_url, socket_connect_timeout=3)
    except ValueError as error:
        raise CommandError(f"{target.redis_url!r} is not a Redis URL such as redis://host:6379/0: {error}") from error
    try:
        yield EventStream(redis, target.keys)
    finally:
        await redis.aclose()


async def newest(events: EventStream, count: int, model: str | None) -> tuple[list[Item], str]:
    """The newest `count` events, oldest first, of one model or of all; and the id after which later ones come.

    Raises redis.RedisError where Redis does not answer.
    """
    page = await events.newest(_PAGE if model else max(count, 1))
    last = page[-1][0] if page else "0-0"
    found: list[Item] = []
    while page:
        found = [item for item in page if model in (None, item[1].model)] + found
        if len(found) >= count:
            break
        page = await events.newest(_PAGE, f"({page[0][0]}")
    return found[len(found) - count :] if len(found) > count else found, last


async def latest_about(target: Target, model: str, count: int) -> list[cluster_pb2.Event] | None:
    """The newest events about a model, oldest first; where Redis does not answer it says so, and there are None."""
    try:
        async with open_events(target) as stream:
            items, _ = await newest(stream, count, model)
    except RedisError as error:
        warn(f"events are left out, as Redis at {target.redis_url} does not answer: {error}")
        return None
    return [event for _, event in items]
