"""A whole agent on which running instances take KV pages back from warm models."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest
from prometheus_client import REGISTRY

from launcher.backing import Backing
from services.common.queues import RequestQueue
from services.gpu_agent.arena.weight_range import WeightRange
from tests.gpu_agent import checkpoints
from tests.gpu_agent.agent_process import REASON, RunningAgent, running_agent, status_of
from tests.gpu_agent.test_agent_service import PROMPT, Gate, expected
from warmserve.cluster.keys import Keys
from warmserve.v1 import agent_pb2, cluster_pb2, common_pb2

LONG = [3 + n % 500 for n in range(200)]


async def warm(agent: RunningAgent, spec: cluster_pb2.ModelSpec, score: float) -> None:
    reason = common_pb2.Reason(cause=common_pb2.CAUSE_FOUNDATION, text="a test asked for it", score=score)
    await agent.stub.WarmReplica(agent_pb2.WarmReplicaRequest(spec=spec, group=agent.group, reason=reason))
    await agent.until(spec.name, common_pb2.REPLICA_STATE_WARM)


def _taken_back(model: str) -> float:
    labels = {"model": model}
    return REGISTRY.get_sample_value("warmserve_gpu_agent_pages_taken_back_total", labels) or 0.0


async def test_requests_take_pages_of_the_least_valuable_model_which_then_loads_only_those(
    etcd: Backing, redis_server: Backing, keys: Keys, tmp_path: Path
) -> None:
    models = {name: checkpoints.llama(tmp_path / name, seed=seed) for seed, name in enumerate(("a", "dear", "cheap"))}
    async with running_agent(etcd.address, redis_server.address, keys.prefix, tmp_path, arena="2560KiB") as agent:
        specs = {name: await agent.prepare(name, tmp_path / name) for name in models}
        await warm(agent, specs["dear"], 2.0)
        await warm(agent, specs["cheap"], 1.0)
        before = agent.residency.items["g0"]
        assert before.pages_lent == before.pages_weights == sum(s.pages_resident for s in before.shards)
        assert [s.score for s in before.shards if s.model == "cheap"] == [1.0]
        counted, dear_counted = _taken_back("cheap"), _taken_back("dear")
        names = [f"r{n}" for n in range(8)]
        for name in names:
            await agent.submit("a", name, [int(name[1:]) + 3, *LONG], 40)
        await agent.wake(specs["a"])
        for name in names:
            await agent.relay.finished(name)
            assert agent.relay.tokens(name) == expected(models["a"], [int(name[1:]) + 3, *LONG], 40)

        def taken(items: object) -> bool:
            shard = agent.shard("cheap")
            return (shard.residency if shard else 0) < 1

        await asyncio.wait_for(agent.residency.wait_for(taken), 30)
        following = agent.node.events.follow(after="0")
        while (event := (await anext(following))[1]).kind != cluster_pb2.EVENT_KIND_EVICTED:
            pass
        await following.aclose()
        assert (event.model, event.reason.by_model, event.reason.cause) == ("cheap", "a", common_pb2.CAUSE_MADE_ROOM)
        assert event.bytes == 65536 * int(event.reason.text.split()[0])
        assert _taken_back("cheap") - counted >= event.bytes // 65536 > 0
        assert _taken_back("dear") == dear_counted
        dear = agent.shard("dear")
        assert dear is not None
        assert dear.residency == 1
        await agent.wake(specs["cheap"])
        await agent.submit("cheap", "again", PROMPT, 8)
        await agent.relay.finished("again")
        assert agent.relay.tokens("again") == expected(models["cheap"], PROMPT, 8)


async def test_a_forecast_keeps_pages_from_warming_but_not_from_a_wake(
    etcd: Backing, redis_server: Backing, keys: Keys, tmp_path: Path
) -> None:
    for seed, name in enumerate(("a", "b")):
        checkpoints.llama(tmp_path / name, seed=seed)
    async with running_agent(etcd.address, redis_server.address, keys.prefix, tmp_path, arena="2MiB") as agent:
        specs = [await agent.prepare(name, tmp_path / name) for name in ("a", "b")]
        await agent.wake(specs[0])
        forecast = cluster_pb2.Forecast(model="a")
        forecast.windows.add().peak_load.p90 = 100.0
        await agent.node.store.put(agent.node.keys.forecast("a"), forecast)
        await asyncio.wait_for(agent.residency.wait_for(lambda i: i["g0"].pages_promised == i["g0"].pages_free), 30)
        order = agent_pb2.WarmReplicaRequest(spec=specs[1], group=agent.group, reason=REASON)
        code, message = await status_of(agent.stub.WarmReplica(order))
        assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "of them kept for running instances" in message
        await agent.wake(specs[1])
        await agent.submit("b", "r0", PROMPT, 4)
        await agent.relay.finished("r0")


async def test_a_wake_takes_what_it_lacks_from_the_end_of_the_least_valuable_model(
    etcd: Backing, redis_server: Backing, keys: Keys, tmp_path: Path
) -> None:
    models = {name: checkpoints.llama(tmp_path / name, seed=seed) for seed, name in enumerate(("a", "dear", "cheap"))}
    async with running_agent(etcd.address, redis_server.address, keys.prefix, tmp_path, arena="1344KiB") as agent:
        specs = {name: await agent.prepare(name, tmp_path / name) for name in models}
        await warm(agent, specs["dear"], 2.0)
        await warm(agent, specs["cheap"], 1.0)
        lacking = specs["a"].facts.shard_bytes // 65536 + 1 - agent.residency.items["g0"].pages_free
        assert lacking > 0
        await agent.submit("a", "r0", PROMPT, 8)
        await agent.wake(specs["a"])
        await agent.relay.finished("r0")
        assert agent.relay.tokens("r0") == expected(models["a"], PROMPT, 8)
        dear, cheap = agent.shard("dear"), agent.shard("cheap")
        assert dear is not None
        assert cheap is not None
        assert (dear.residency, cheap.pages_resident) == (1, cheap.pages_total - lacking)


async def test_the_weights_of_a_model_that_wakes_are_nobodys_to_take(
    etcd: Backing, redis_server: Backing, keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even its own instance's, which would then wait for them for ever."""
    offers: list[str] = []
    own = WeightRange.offer

    def offer(weights: WeightRange, value: tuple[float, float]) -> None:
        offers.append(weights.name)
        own(weights, value)

    monkeypatch.setattr(WeightRange, "offer", offer)
    checkpoints.llama(tmp_path / "m")
    async with running_agent(etcd.address, redis_server.address, keys.prefix, tmp_path) as agent:
        spec = await agent.prepare("m", tmp_path / "m")
        await agent.wake(spec)
        assert offers == []
        gate = Gate(monkeypatch, RequestQueue, "release")  # the drain does not get on before the wake
        await agent.stub.DrainReplica(agent_pb2.DrainReplicaRequest(model="m", reason=REASON))
        await gate.reached()
        await agent.wake(spec)
        gate.open()
        await agent.submit("m", "r0", PROMPT, 4)
        await agent.relay.finished("r0")
        assert offers == []
        await agent.stub.DrainReplica(agent_pb2.DrainReplicaRequest(model="m", reason=REASON))
        await agent.until("m", common_pb2.REPLICA_STATE_WARM)
        assert offers[0] == "m"
        before = len(offers)
        await agent.wake(spec)
        assert len(offers) == before


@pytest.mark.parametrize("woken", [False, True])
async def test_a_model_that_lost_all_its_pages_is_cold(
    etcd: Backing, redis_server: Backing, keys: Keys, tmp_path: Path, woken: bool
) -> None:
    models = {name: checkpoints.llama(tmp_path / name, seed=seed) for seed, name in enumerate(("a", "b"))}
    async with running_agent(etcd.address, redis_server.address, keys.prefix, tmp_path, arena="1408KiB") as agent:
        specs = {name: await agent.prepare(name, tmp_path / name) for name in models}
        await warm(agent, specs["b"], 1.0)
        for n in range(8):
            await agent.submit("a", f"r{n}", [n + 3, *LONG], 40)
        await agent.wake(specs["a"])
        for n in range(8):
            await agent.relay.finished(f"r{n}")
        await agent.until("b", common_pb2.REPLICA_STATE_COLD)
        if woken:
            await agent.stub.DrainReplica(agent_pb2.DrainReplicaRequest(model="a", reason=REASON))
            await agent.until("a", common_pb2.REPLICA_STATE_WARM)
            await agent.wake(specs["b"])
            await agent.submit("b", "again", PROMPT, 8)
            await agent.relay.finished("again")
            assert agent.relay.tokens("again") == expected(models["b"], PROMPT, 8)
