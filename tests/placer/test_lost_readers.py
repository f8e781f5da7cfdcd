"""What instances had taken that ended without a word is forgotten, and nothing else; over a real Redis."""

from __future__ import annotations

from redis.asyncio import Redis

from services.common.queues import QueueCounts, RequestQueue
from services.placer.lost_readers import LostReaders
from warmserve.cluster.keys import Keys
from warmserve.v1 import agent_pb2


async def test_a_lost_instances_entries_count_for_a_minute_at_most(redis: Redis, keys: Keys) -> None:
    queue = RequestQueue(redis, keys)
    await queue.take("m", "there", 1, 0)  # makes the group
    for name in ("a", "b", "c", "d"):
        await queue.put(agent_pb2.QueuedRequest(request_id=name, model="m"))
    await queue.take("m", "lost", 2, 0)
    await queue.take("m", "there", 1, 0)
    instances: set[str] | None = {"there"}
    lost = LostReaders(queue, lambda: ["m", "never asked for"], lambda: instances)
    await lost.look(0.0)
    await lost.look(59.0)
    assert (await queue.counts(["m"]))["m"] == QueueCounts(waiting=1, taken=3)
    instances = None  # etcd is away: nobody knows who is there
    await lost.look(61.0)
    instances = {"there"}
    await lost.look(62.0)
    await lost.look(121.0)
    assert (await queue.counts(["m"]))["m"] == QueueCounts(waiting=1, taken=3)
    await lost.look(122.0)
    assert (await queue.counts(["m"]))["m"] == QueueCounts(waiting=1, taken=1)
    assert await queue.readers(["m"]) == {"m": {"there"}}
    assert len(await queue.take("m", "there", 5, 0)) == 1


async def test_an_instance_that_is_back_keeps_what_it_holds(redis: Redis, keys: Keys) -> None:
    queue = RequestQueue(redis, keys)
    await queue.take("m", "i", 1, 0)
    await queue.put(agent_pb2.QueuedRequest(request_id="a", model="m"))
    await queue.take("m", "i", 1, 0)
    instances: set[str] = set()
    lost = LostReaders(queue, lambda: ["m"], lambda: instances)
    await lost.look(0.0)
    instances = {"i"}
    await lost.look(50.0)
    instances = set()
    await lost.look(100.0)
    await lost.look(159.0)
    assert len(await queue.held("m", ["i"])) == 1
