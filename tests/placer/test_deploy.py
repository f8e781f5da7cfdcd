"""Deploying: every node accepts, or nothing is written."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from redis.asyncio import Redis

from services.common.grpc_frame import StatusError
from tests.placer.peers import PAGE, Cluster, Peers, Placer, Watch, running_placer
from warmserve.cluster.events import EventStream
from warmserve.cluster.store import Store
from warmserve.v1 import cluster_pb2, placement_pb2


def spec(name: str = "a", **more) -> cluster_pb2.ModelSpec:
    return cluster_pb2.ModelSpec(**({"name": name, "source": f"/m/{name}-16"} | more))


async def deploy(placer: Placer, wanted: cluster_pb2.ModelSpec) -> list[placement_pb2.DeployModelResponse]:
    request = placement_pb2.DeployModelRequest(spec=wanted)
    return [response async for response in placer.stub.DeployModel(request)]


async def deployed_or_none(
    placer: Placer, wanted: cluster_pb2.ModelSpec
) -> list[placement_pb2.DeployModelResponse] | None:
    try:
        return await deploy(placer, wanted)
    except grpc.aio.AioRpcError as error:
        if "being deployed by another call" in (error.details() or ""):
            return None
        raise


async def refusal(placer: Placer, wanted: cluster_pb2.ModelSpec) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await deploy(placer, wanted)
    return refused.value.code(), refused.value.details() or ""


async def test_one_agent_of_each_node_prepares_and_progress_is_forwarded(
    cluster: Cluster, peers: Peers, watch: Watch, redis: Redis
) -> None:
    agents = [await peers.add(name, machine) for name, machine in (("g0", "n0"), ("g1", "n0"), ("g2", "n1"))]
    async with running_placer(cluster) as placer:
        await watch.led_by("p0")
        answers = await deploy(placer, spec(deployed_unix_ms=5, facts=cluster_pb2.ModelFacts(parameters=7)))
        assert [len(agent.prepared) for agent in agents] == [1, 0, 1]
        assert "writing" in answers[0].stage
        assert [a.bytes_done for a in answers] == sorted(a.bytes_done for a in answers)
        assert answers[-1].bytes_done == answers[-1].bytes_total == 2 * 16 * PAGE
        assert not any(a.HasField("spec") for a in answers[:-1])
        deployed = answers[-1].spec
        assert deployed.tp == 1
        assert deployed.facts.shard_bytes == 16 * PAGE
        assert deployed.facts.parameters == 0  # what the caller said of facts is ignored
        assert deployed.deployed_unix_ms > 5
        await watch.models.wait_for(lambda items: items.get("a") == deployed)
        stream = EventStream(redis, cluster.keys)
        while not (events := await stream.newest(1)):
            await asyncio.sleep(0.01)
        assert (events[0][1].kind, events[0][1].model) == (cluster_pb2.EVENT_KIND_DEPLOYED, "a")
        assert await refusal(placer, spec()) == (
            grpc.StatusCode.ALREADY_EXISTS,
            "a model named a is deployed already; undeploy it first, or take another name",
        )


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        (spec("no spaces"), "model name 'no spaces' is not allowed"),
        (spec(source=""), "source is empty"),
        (spec(tp=3), "tp is 3: it must be a power of two"),
        (spec(priority=-1), "priority is -1.0"),
        (spec(min_replicas=2, max_replicas=1), "min_replicas is 2, more than max_replicas, which is 1"),
    ],
)
async def test_nonsense_is_refused_before_any_agent_is_asked(
    cluster: Cluster, peers: Peers, watch: Watch, wanted: cluster_pb2.ModelSpec, text: str
) -> None:
    agent = await peers.add("g0")
    async with running_placer(cluster) as placer:
        await watch.led_by("p0")
        code, details = await refusal(placer, wanted)
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert text in details
    assert agent.prepared == []
    assert not watch.models.items


async def test_without_agents_and_without_room_for_a_group(cluster: Cluster, peers: Peers, watch: Watch) -> None:
    async with running_placer(cluster) as placer:
        await watch.led_by("p0")
        code, details = await refusal(placer, spec())
        assert code == grpc.StatusCode.UNAVAILABLE
        assert "no agent is registered" in details
        await peers.add("g0")
        while (await refusal(placer, spec(tp=2)))[0] != grpc.StatusCode.RESOURCE_EXHAUSTED:
            await asyncio.sleep(0.01)
        assert "at most 1 agent" in (await refusal(placer, spec(tp=2)))[1]


async def test_one_nodes_refusal_is_passed_on_and_nothing_is_written(
    cluster: Cluster, peers: Peers, watch: Watch, store: Store
) -> None:
    good, bad = await peers.add("g0", "n0"), await peers.add("g1", "n1")
    bad.refusal = StatusError(grpc.StatusCode.INVALID_ARGUMENT, "model-00002.safetensors is missing")
    good.prepares.clear()  # it never ends by itself: the refusal must end the whole
    async with running_placer(cluster) as placer:
        await watch.led_by("p0")
        assert await refusal(placer, spec()) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            "node n1: model-00002.safetensors is missing",
        )
        assert await store.get(cluster.keys.model("a"), cluster_pb2.ModelSpec) is None
        # The name is free again.
        bad.refusal = None
        good.prepares.set()
        assert (await deploy(placer, spec()))[-1].spec.name == "a"


async def test_an_agent_lost_while_preparing(cluster: Cluster, peers: Peers, watch: Watch, store: Store) -> None:
    agent = await peers.add("g0")
    agent.prepares.clear()
    async with running_placer(cluster) as placer:
        await watch.led_by("p0")
        call = asyncio.create_task(refusal(placer, spec()))
        while not agent.prepared:
            await asyncio.sleep(0.01)
        await agent.node.server.stop(0)
        code, details = await call
    assert code == grpc.StatusCode.UNAVAILABLE
    assert "agent g0 on node n0 was lost while it prepared the model" in details
    assert await store.get(cluster.keys.model("a"), cluster_pb2.ModelSpec) is None


async def test_of_two_deploys_of_one_name_one_wins(cluster: Cluster, peers: Peers, watch: Watch) -> None:
    await peers.add("g0")
    async with running_placer(cluster) as placer:
        await watch.led_by("p0")
        results = await asyncio.gather(
            *(deploy(placer, spec(source=f"/m/other{i}-16")) for i in range(4)), return_exceptions=True
        )
        won = [r[-1].spec for r in results if isinstance(r, list)]
        lost = [r for r in results if isinstance(r, grpc.aio.AioRpcError)]
        assert len(won) == 1
        assert {error.code() for error in lost} == {grpc.StatusCode.ALREADY_EXISTS}
        await watch.models.wait_for(lambda items: items.get("a") == won[0])


async def test_a_model_that_appears_meanwhile_is_not_written_over(
    cluster: Cluster, peers: Peers, watch: Watch, store: Store
) -> None:
    agent = await peers.add("g0")
    agent.prepares.clear()
    async with running_placer(cluster) as placer:
        await watch.led_by("p0")
        call = asyncio.create_task(refusal(placer, spec()))
        while not agent.prepared:
            await asyncio.sleep(0.01)
        await store.put(cluster.keys.model("a"), spec(source="/m/first-1"))
        agent.prepares.set()
        assert (await call)[0] == grpc.StatusCode.ALREADY_EXISTS
    entry = await store.get(cluster.keys.model("a"), cluster_pb2.ModelSpec)
    assert entry is not None
    assert entry.value.source == "/m/first-1"


async def test_a_caller_that_goes_away_leaves_nothing_behind(
    cluster: Cluster, peers: Peers, watch: Watch, store: Store
) -> None:
    agent = await peers.add("g0")
    agent.prepares.clear()
    async with running_placer(cluster) as placer:
        await watch.led_by("p0")
        call = placer.stub.DeployModel(placement_pb2.DeployModelRequest(spec=spec()))
        assert "writing" in (await call.read()).stage
        call.cancel()
        agent.prepares.set()
        again = spec(source="/m/second-16")
        while (answers := await deployed_or_none(placer, again)) is None:
            await asyncio.sleep(0.01)  # the name is free as soon as the placer has seen the caller go
        assert answers[-1].spec.source == "/m/second-16"


async def test_nodes_with_different_checkpoints_are_told_apart(cluster: Cluster, peers: Peers, watch: Watch) -> None:
    await peers.add("g0", "n0")
    (await peers.add("g1", "n1")).fingerprint = "another"
    async with running_placer(cluster) as placer:
        await watch.led_by("p0")
        code, details = await refusal(placer, spec())
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert "n0 and n1 have different checkpoints" in details
