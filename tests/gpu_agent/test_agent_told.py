"""What a whole agent's record in etcd tells of its arena and of the tiers beside it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY
from redis.exceptions import RedisError

from launcher.backing import Backing, start_etcd, start_redis
from launcher.ports import free_port
from services.gpu_agent.weights.image import Image
from tests.gpu_agent import checkpoints
from tests.gpu_agent.agent_process import REASON, RunningAgent, running_agent
from tests.gpu_agent.test_agent_service import PROMPT, Gate, expected
from warmserve.cluster.events import EventStream
from warmserve.cluster.keys import Keys
from warmserve.v1 import agent_pb2, cluster_pb2, common_pb2

PAGE = 1 << 16


async def told(agent: RunningAgent, condition: Callable[[cluster_pb2.AgentResidency], bool]) -> None:
    """Returns once the agent's record fulfils a condition."""
    await asyncio.wait_for(agent.residency.wait_for(lambda items: condition(items["g0"])), 30)


def measured(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(f"warmserve_gpu_agent_{name}", labels)


async def test_the_record_tells_what_is_lent_and_what_the_disk_holds(
    etcd: Backing, redis_server: Backing, keys: Keys, tmp_path: Path
) -> None:
    checkpoints.llama(tmp_path / "m")
    async with running_agent(etcd.address, redis_server.address, keys.prefix, tmp_path) as agent:
        spec = await agent.prepare("m", tmp_path / "m")
        await told(agent, lambda record: len(record.disk.images) == 1)
        disk = agent.residency.items["g0"].disk
        assert disk.images[0].name.startswith(spec.facts.fingerprint[:32])
        assert disk.images[0].bytes == spec.facts.shard_bytes
        assert 0 < disk.free_bytes < disk.capacity_bytes
        await agent.warm(spec)
        await told(agent, lambda record: record.shards[0].pages_lent == spec.facts.shard_bytes // PAGE)
        await agent.wake(spec)
        await told(agent, lambda record: record.shards[0].pages_lent == 0)
        record = agent.residency.items["g0"]
        shown = {use: measured("pages", use=use) for use in ("free", "kv", "weights", "lent")}
        assert shown == {
            "free": record.pages_free,
            "kv": record.pages_kv,
            "weights": record.shards[0].pages_total,
            "lent": 0,
        }
        assert measured("outside_arena_bytes", what="grown") == 0


async def test_the_record_tells_how_far_an_image_is_on_its_way_into_memory(
    etcd: Backing, redis_server: Backing, keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints.llama(tmp_path / "m")
    gate = Gate(monkeypatch, Image, "fetch_page")
    tier = {"host_tier_bytes": "4MiB", "host_tier_dir": tmp_path / "tier"}
    async with running_agent(etcd.address, redis_server.address, keys.prefix, tmp_path, **tier) as agent:
        spec = await agent.prepare("m", tmp_path / "m")
        await gate.reached()
        await told(agent, lambda record: record.host_tier.filling.bytes_done > 0)
        filling = agent.residency.items["g0"].host_tier.filling
        assert filling.name.startswith(spec.facts.fingerprint[:32])
        assert filling.bytes_done < filling.bytes_total == spec.facts.shard_bytes
        gate.open()
        await told(agent, lambda record: len(record.host_tier.images) == 1 and not record.host_tier.HasField("filling"))


async def test_an_instance_tells_its_pace(etcd: Backing, redis_server: Backing, keys: Keys, tmp_path: Path) -> None:
    checkpoints.llama(tmp_path / "m")
    async with running_agent(etcd.address, redis_server.address, keys.prefix, tmp_path) as agent:
        spec = await agent.prepare("m", tmp_path / "m")
        names = [f"r{index}" for index in range(5)]
        for name in names:  # before it wakes, so that they run together
            await agent.submit("m", name, PROMPT, 100)
        began = time.monotonic()
        instance = await agent.wake(spec)
        await asyncio.wait_for(asyncio.gather(*map(agent.relay.finished, names)), 30)
        took_ms = (time.monotonic() - began) * 1e3
        await asyncio.wait_for(
            agent.instances.wait_for(lambda items: any(record.HasField("pace") for record in items.values())), 30
        )
        (record,) = agent.instances.items.values()
        assert record.id == instance
        assert record.slots >= len(names)
        one_ms = record.pace.base_ms + record.pace.per_sequence_ms
        assert 0 < 10 * one_ms < took_ms
        await agent.stub.DrainReplica(agent_pb2.DrainReplicaRequest(model="m", reason=REASON))
        await agent.until("m", common_pb2.REPLICA_STATE_WARM)
        # The next instance begins anew.
        assert await agent.wake(spec) != instance
        await asyncio.wait_for(agent.instances.wait_for(lambda items: instance not in str(items)), 30)
        (record,) = agent.instances.items.values()
        assert not record.HasField("pace")


async def test_events_of_a_time_without_redis_are_told_when_it_is_back(
    etcd: Backing, keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused, append = asyncio.Event(), EventStream.append

    async def noted(*arguments: Any) -> None:
        try:
            await append(*arguments)
        except RedisError:
            refused.set()
            raise

    monkeypatch.setattr(EventStream, "append", noted)
    checkpoints.llama(tmp_path / "m")
    port = free_port()
    server = start_redis(tmp_path / "one", tmp_path / "log", port)
    try:
        async with running_agent(etcd.address, server.address, keys.prefix, tmp_path) as agent:
            spec = await agent.prepare("m", tmp_path / "m")
            server.child.process.kill()
            server.child.process.wait()
            await agent.warm(spec)
            await agent.stub.EvictReplica(agent_pb2.EvictReplicaRequest(model="m", reason=REASON))
            await asyncio.wait_for(refused.wait(), 30)
            server = start_redis(tmp_path / "two", tmp_path / "log", port)
            following = agent.node.events.follow(after="0")
            kinds = [(await asyncio.wait_for(anext(following), 30))[1].kind for _ in range(3)]
            await following.aclose()
    finally:
        server.child.stop(5)
    assert kinds == [cluster_pb2.EVENT_KIND_WARMING, cluster_pb2.EVENT_KIND_WARMED, cluster_pb2.EVENT_KIND_EVICTED]


@pytest.mark.parametrize("comes_back", [True, False])
async def test_without_etcd_an_agent_serves_and_stops_and_registers_again_when_it_is_back(
    redis_server: Backing, keys: Keys, tmp_path: Path, comes_back: bool
) -> None:
    model = checkpoints.llama(tmp_path / "m")
    port = free_port()
    server = start_etcd(tmp_path / "one", tmp_path / "log", port)
    try:
        async with running_agent(server.address, redis_server.address, keys.prefix, tmp_path) as agent:
            spec = await agent.prepare("m", tmp_path / "m")
            await agent.warm(spec)
            server.child.process.kill()
            server.child.process.wait()
            order = agent_pb2.WakeReplicaRequest(spec=spec, group=agent.group, reason=REASON)
            assert (await agent.stub.WakeReplica(order)).state == common_pb2.REPLICA_STATE_ACTIVE
            await agent.submit("m", "r0", PROMPT, 8)
            await asyncio.wait_for(agent.relay.finished("r0"), 30)
            assert agent.relay.tokens("r0") == expected(model, PROMPT, 8)
            if comes_back:
                server = start_etcd(tmp_path / "two", tmp_path / "log", port)  # it knows nothing any more
                shard = await agent.until("m", common_pb2.REPLICA_STATE_ACTIVE)
                await asyncio.wait_for(agent.instances.wait_for(lambda items: len(items) == 1), 30)
                (record,) = agent.instances.items.values()
                assert record.id == shard.instance_id
                while not (await agent.node.store.snapshot(agent.node.keys.agents()))[0]:
                    await asyncio.sleep(0.01)
    finally:
        server.child.stop(5)
