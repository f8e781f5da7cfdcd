"""The leader over real etcd, Redis and gRPC."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import grpc
import pytest
from redis.asyncio import Redis

from launcher.backing import Backing, start_etcd, start_redis
from launcher.ports import free_port
from services.common.queues import RequestQueue
from services.placer import planner
from tests.placer.peers import (
    ACTIVE,
    DRAINING,
    PAGE,
    WARM,
    WARMING,
    Cluster,
    Fault,
    Peers,
    Watch,
    running_placer,
    watching,
)
from warmserve.cluster.events import EventStream
from warmserve.cluster.keys import Keys
from warmserve.cluster.store import Store
from warmserve.v1 import agent_pb2, cluster_pb2, common_pb2, placement_pb2

COLD = common_pb2.REPLICA_STATE_COLD


def spec(name: str, pages: int = 16, **more) -> cluster_pb2.ModelSpec:
    return cluster_pb2.ModelSpec(
        name=name, source=f"/m/{name}-{pages}", tp=1, facts=cluster_pb2.ModelFacts(shard_bytes=pages * PAGE), **more
    )


def forecast(name: str, mean: float, peak: float = 0.0) -> cluster_pb2.Forecast:
    window = cluster_pb2.WindowForecast(
        start_unix_s=0,
        mean_load=cluster_pb2.Quantiles(p50=mean),
        peak_load=cluster_pb2.Quantiles(p50=mean, p90=max(mean, peak)),
    )
    return cluster_pb2.Forecast(model=name, window_s=1e10, windows=[window])


async def queue_requests(redis: Redis, keys: Keys, model: str, count: int) -> None:
    queue = RequestQueue(redis, keys)
    for i in range(count):
        await queue.put(agent_pb2.QueuedRequest(request_id=f"{model}-{i}", model=model, token_ids=[1]))


async def until(condition) -> None:
    while not condition():
        await asyncio.sleep(0.01)


def wake(placer, model: str, waiting: int = 1):
    return placer.stub.WakeModel(placement_pb2.WakeModelRequest(model=model, waiting_requests=waiting))


async def status(call) -> grpc.StatusCode:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


async def details(call) -> str:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.details() or ""
    return ""


async def test_a_cold_model_is_woken_once_however_many_ask(
    cluster: Cluster, peers: Peers, watch: Watch, store: Store
) -> None:
    agent = await peers.add("g0")
    await store.put(cluster.keys.model("a"), spec("a"))
    agent.loads.clear()
    async with running_placer(cluster) as placer:
        await watch.led_by("p0")
        answers = await asyncio.gather(*(wake(placer, "a", i) for i in range(20)))
        assert {a.state for a in answers} == {WARMING}
        assert list(answers[0].group.agent_ids) == ["g0"]
        assert answers[0].group.node == "n0"
        assert any("nothing of it is resident" in a.reason.text for a in answers)
        assert all(a.reason.text for a in answers)
        await until(lambda: agent.orders)
        answer = await wake(placer, "a")
        assert answer.state == WARMING
        assert "being woken on g0" in answer.reason.text
        agent.loads.set()
        await watch.active("a")
        while (answer := await wake(placer, "a")).state != ACTIVE:
            await asyncio.sleep(0.01)
        assert answer.estimated_ms == 0
        assert agent.orders == [("wake", "a")]


async def test_a_wake_of_which_only_the_answer_is_lost_is_not_ordered_elsewhere(
    cluster: Cluster, peers: Peers, watch: Watch, store: Store, redis: Redis, keys: Keys
) -> None:
    agents = [await peers.add(name) for name in ("g0", "g1")]
    await store.put(cluster.keys.model("a"), spec("a"))
    for agent in agents:
        agent.loads.clear()
        agent.network = lambda: Fault.ANSWER_LOST
    async with running_placer(cluster) as placer:
        await watch.led_by("p0")
        await queue_requests(redis, keys, "a", 1)
        await wake(placer, "a")
        await until(lambda: any(agent.orders for agent in agents))
        for agent in agents:
            agent.network = lambda: Fault.NONE
        for _ in range(5):  # the last of which comes after the answer was missed
            await asyncio.sleep(0.1)
            assert (await wake(placer, "a")).state == WARMING
        assert [order for agent in agents for order in agent.orders] == [("wake", "a")]
        for agent in agents:
            agent.loads.set()
        await watch.active("a")


async def test_models_that_are_asked_for_together_are_each_woken_and_told_of(
    cluster: Cluster, peers: Peers, watch: Watch, store: Store
) -> None:
    names = [f"m{i}" for i in range(6)]
    for index, name in enumerate(names):
        await peers.add(f"g{index}")
        await store.put(cluster.keys.model(name), spec(name, 40))
    async with running_placer(cluster) as placer:
        await watch.led_by("p0")
        answers = await asyncio.gather(*(wake(placer, name) for name in names))
        assert {answer.state for answer in answers} == {WARMING}
        assert len({tuple(answer.group.agent_ids) for answer in answers}) == len(names)
        await watch.active(*names)
        for name, answer in zip(names, answers, strict=True):
            [agent] = answer.group.agent_ids
            assert peers.agents[agent].orders == [("wake", name)]


async def test_requests_in_redis_alone_wake_their_model(
    cluster: Cluster, peers: Peers, watch: Watch, store: Store, redis: Redis
) -> None:
    await peers.add("g0")
    await store.put(cluster.keys.model("a"), spec("a"))
    async with running_placer(cluster):
        await queue_requests(redis, cluster.keys, "a", 3)
        await watch.active("a")
        await watch.outlook("a", lambda o: o.active_replicas == 1)


async def test_an_idle_instance_gives_way_and_its_model_comes_back(
    cluster: Cluster, peers: Peers, watch: Watch, store: Store
) -> None:
    agent = await peers.add("g0")
    for name in ("a", "b"):
        await store.put(cluster.keys.model(name), spec(name, 40))
        await store.put(cluster.keys.forecast(name), forecast(name, 1.0))  # keeps an idle instance active
    async with running_placer(cluster, min_stay_s=0.2) as placer:
        await watch.led_by("p0")
        for name in ("a", "b", "a"):
            while (await wake(placer, name)).state != ACTIVE:
                await asyncio.sleep(0.02)
            await watch.active(name)
    kinds = [order for order in agent.orders if order[0] != "warm"]
    before_b = kinds[: kinds.index(("wake", "b"))]
    assert ("drain", "a") in before_b
    assert ("evict", "a") in before_b
    assert kinds[-1] == ("wake", "a")


async def test_a_busy_instance_finishes_first_after_the_wait_limit(
    cluster: Cluster, peers: Peers, watch: Watch, store: Store, redis: Redis
) -> None:
    agent = await peers.add("g0")
    for name in ("a", "b"):
        await store.put(cluster.keys.model(name), spec(name, 40))
    async with running_placer(cluster, min_stay_s=0.0, max_wait_s=1.0) as placer:
        await watch.led_by("p0")
        await wake(placer, "a")
        await watch.active("a")
        await agent.runs("a", 2)
        await queue_requests(redis, cluster.keys, "b", 1)
        await watch.outlook("b", lambda o: "may be drained after 1 s of waiting" in o.reason.text)
        assert (await wake(placer, "b")).state == COLD
        assert agent.shards["a"].state == ACTIVE
        await until(lambda: agent.shards["a"].state == DRAINING)
        answer = await wake(placer, "b")
        assert (answer.state, list(answer.group.agent_ids)) == (WARMING, ["g0"])
        assert "as soon as a (2 requests running) has drained" in answer.reason.text
        assert ("evict", "a") not in agent.orders
        await agent.runs("a", 0)
        await watch.active("b")


async def test_the_forecast_warms_and_the_plan_says_why(
    cluster: Cluster, peers: Peers, watch: Watch, store: Store
) -> None:
    agent = await peers.add("g0")
    await store.put(cluster.keys.model("a"), spec("a"))
    await store.put(cluster.keys.forecast("a"), forecast("a", 3.2))
    async with running_placer(cluster):
        await watch.outlook("a", lambda o: o.reason.text == "mean load 3.2 needs 1 instance; 1 is warm on g0")
        assert agent.shards["a"].state == WARM
        assert agent.shards["a"].reason.cause == common_pb2.CAUSE_FOUNDATION
        plan = watch.plan.items[""]
        assert (plan.planner, plan.placer_id) == (planner.RULE, "p0")
        assert plan.fence > 0
        assert plan.made_unix_ms > 0


async def test_a_load_that_fails_is_not_repeated_at_once_and_the_cause_is_told(
    cluster: Cluster, peers: Peers, watch: Watch, store: Store
) -> None:
    agent = await peers.add("g0")
    agent.load_fails = "loading failed: page 3 is damaged"
    await store.put(cluster.keys.model("a"), spec("a"))
    async with running_placer(cluster) as placer:
        await watch.led_by("p0")
        while (answer := await wake(placer, "a")).reason.cause != common_pb2.CAUSE_FAILURE:
            await asyncio.sleep(0.01)
        assert answer.state == COLD
        assert "page 3 is damaged" in answer.reason.text
        agent.load_fails = ""
        while (await wake(placer, "a")).state != ACTIVE:
            await asyncio.sleep(0.05)
        assert agent.orders.count(("wake", "a")) < 8


async def test_an_undeployed_model_is_evicted_and_its_queue_dropped(
    cluster: Cluster, peers: Peers, watch: Watch, store: Store, redis: Redis
) -> None:
    agent = await peers.add("g0")
    await store.put(cluster.keys.model("a"), spec("a"))
    async with running_placer(cluster) as placer:
        await watch.led_by("p0")
        await wake(placer, "a")
        await watch.active("a")
        await agent.runs("a", 1)
        await queue_requests(redis, cluster.keys, "a", 2)
        await store.delete(cluster.keys.model("a"))
        await until(lambda: agent.shards["a"].state == DRAINING)
        assert await redis.exists(cluster.keys.queue("a", "normal"))
        await agent.runs("a", 0)
        await until(lambda: "a" not in agent.shards)
        while await redis.exists(cluster.keys.queue("a", "normal")):
            await asyncio.sleep(0.01)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await wake(placer, "a")
        assert refused.value.code() == grpc.StatusCode.NOT_FOUND
    events = [event for _, event in await EventStream(redis, cluster.keys).newest(10)]
    assert [(e.kind, e.model) for e in events] == [(cluster_pb2.EVENT_KIND_UNDEPLOYED, "a")]


async def test_a_drained_agent_is_emptied_and_the_model_moves(
    cluster: Cluster, peers: Peers, watch: Watch, store: Store, redis: Redis
) -> None:
    first = await peers.add("g0")
    await store.put(cluster.keys.model("a"), spec("a"))
    async with running_placer(cluster) as placer:
        await watch.led_by("p0")
        await wake(placer, "a")
        await watch.active("a")
        second = await peers.add("g1")
        await store.put(cluster.keys.control("g0"), cluster_pb2.AgentControl(drained=True))
        await until(lambda: not first.shards)
        await queue_requests(redis, cluster.keys, "a", 1)
        await watch.active("a")
        assert second.shards["a"].state == ACTIVE


async def test_a_lost_agents_model_is_woken_elsewhere_and_the_timeline_tells(
    cluster: Cluster, peers: Peers, watch: Watch, store: Store, redis: Redis
) -> None:
    await peers.add("g0")
    await store.put(cluster.keys.model("a"), spec("a"))
    async with running_placer(cluster) as placer:
        await watch.led_by("p0")
        await wake(placer, "a")
        await watch.active("a")
        second = await peers.add("g1")
        await peers.lose("g0")
        await queue_requests(redis, cluster.keys, "a", 1)
        await until(lambda: "a" in second.shards and second.shards["a"].state == ACTIVE)
        stream = EventStream(redis, cluster.keys)
        while len(events := await stream.newest(10)) < 2:
            await asyncio.sleep(0.01)
    assert [(e.kind, list(e.agent_ids)) for _, e in events] == [
        (cluster_pb2.EVENT_KIND_AGENT_JOINED, ["g1"]),
        (cluster_pb2.EVENT_KIND_AGENT_LEFT, ["g0"]),
    ]
    assert events[1][1].reason.cause == common_pb2.CAUSE_AGENT_LOST


async def test_tensor_parallel_replicas_are_ordered_on_every_agent_of_the_group(
    cluster: Cluster, peers: Peers, watch: Watch, store: Store
) -> None:
    agents = [await peers.add(name) for name in ("g0", "g1")]
    wide = spec("a")
    wide.tp = 2
    await store.put(cluster.keys.model("a"), wide)
    async with running_placer(cluster) as placer:
        await watch.led_by("p0")
        assert list((await wake(placer, "a")).group.agent_ids) == ["g0", "g1"]
        await until(lambda: all("a" in a.shards and a.shards["a"].state == ACTIVE for a in agents))
        assert [a.shards["a"].shard for a in agents] == [0, 1]


async def test_a_standby_names_the_leader_and_takes_over_with_a_higher_fence(
    cluster: Cluster, peers: Peers, watch: Watch, store: Store
) -> None:
    agent = await peers.add("g0")
    for name in ("a", "b"):
        await store.put(cluster.keys.model(name), spec(name))
    async with running_placer(cluster, "p1") as standby:
        await watch.led_by("p1")
        async with running_placer(cluster, "p2") as second:
            address = standby.node.server.address
            for call in (
                wake(second, "a"),
                second.stub.DeployModel(placement_pb2.DeployModelRequest(spec=spec("c"))).read(),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await call
                assert refused.value.code() == grpc.StatusCode.FAILED_PRECONDITION
                assert refused.value.details() == f"not the leader; the leader is {address}"
            await wake(standby, "a")
            await watch.active("a")
            standby.node.stop.set()
            await watch.led_by("p2")
            await until(lambda: standby.task.done())
            await wake(second, "b")
            await until(lambda: "b" in agent.shards and agent.shards["b"].state == ACTIVE)
            assert agent.fences == sorted(agent.fences)
            assert agent.fences[-1] > agent.fences[0]


async def test_a_leader_that_lost_its_lease_leads_again_with_a_new_fence(
    cluster: Cluster, peers: Peers, watch: Watch, store: Store
) -> None:
    agent = await peers.add("g0")
    for name in ("a", "b"):
        await store.put(cluster.keys.model(name), spec(name))
    async with running_placer(cluster) as placer:
        await watch.led_by("p0")
        await wake(placer, "a")
        await watch.active("a")
        await store.revoke_lease(placer.node.session.lease)  # as after a long pause of the process
        await watch.leader.wait_for(lambda items: not items)
        await watch.led_by("p0")
        while await status(wake(placer, "b")) == grpc.StatusCode.FAILED_PRECONDITION:
            await asyncio.sleep(0.01)
        await until(lambda: "b" in agent.shards and agent.shards["b"].state == ACTIVE)
        assert len(set(agent.fences)) == 2


async def test_orders_of_an_old_leader_are_refused_and_it_steps_down(
    cluster: Cluster, peers: Peers, watch: Watch, store: Store
) -> None:
    agent = await peers.add("g0")
    await store.put(cluster.keys.model("a"), spec("a"))
    async with running_placer(cluster) as placer:
        await watch.led_by("p0")
        agent.fences.append(1 << 60)  # a newer leader has spoken
        answer = await wake(placer, "a")
        while "another placer leads" not in answer.reason.text:
            answer = await wake(placer, "a")
            await asyncio.sleep(0.01)
        assert agent.orders == []
        # Another's key in etcd: this one's plan is not written, and it no longer answers as leader.
        await store.delete(cluster.keys.placer_leader())
        other = cluster_pb2.LeaderRecord(id="other", address="10.0.0.9:1")
        while await store.create(cluster.keys.placer_leader(), other) is None:
            await store.delete(cluster.keys.placer_leader())
        mean = 1.0
        while "not the leader; the leader is 10.0.0.9:1" not in await details(wake(placer, "a")):
            mean += 1  # a new plan to write
            await store.put(cluster.keys.forecast("a"), forecast("a", mean))


async def test_an_unknown_model_gets_the_nearest_names(cluster: Cluster, watch: Watch, store: Store) -> None:
    await store.put(cluster.keys.model("llama-8b"), spec("llama-8b"))
    async with running_placer(cluster) as placer:
        await watch.led_by("p0")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await wake(placer, "lama-8b")
        assert refused.value.code() == grpc.StatusCode.NOT_FOUND
        assert "did you mean llama-8b?" in (refused.value.details() or "")
        answer = await wake(placer, "llama-8b", 2)
        assert answer.state == COLD
        assert answer.reason.cause == common_pb2.CAUSE_NO_AGENT
        assert not answer.HasField("group")


async def test_while_etcd_is_away_nothing_is_placed_and_afterwards_it_goes_on(
    tmp_path: Path, redis_server: Backing, keys: Keys
) -> None:
    port = free_port()
    etcd = start_etcd(tmp_path / "data", tmp_path / "log", port)
    cluster = Cluster(etcd, redis_server, keys)
    store = Store([etcd.address])
    peers = Peers(cluster)
    agent = await peers.add("g0")
    for name in ("a", "b"):
        await store.put(keys.model(name), spec(name))
    async with running_placer(cluster) as placer, watching(store, keys) as watch:
        await watch.led_by("p0")
        await wake(placer, "a")
        await watch.active("a")
        etcd.child.process.send_signal(signal.SIGKILL)
        etcd.child.process.wait()
        while await status(wake(placer, "b")) == grpc.StatusCode.OK:
            await asyncio.sleep(0.01)  # it has not noticed yet
        assert agent.shards["a"].state == ACTIVE
        orders = list(agent.orders)
        assert await status(wake(placer, "b")) in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.FAILED_PRECONDITION)
        assert agent.orders == orders
        etcd = start_etcd(tmp_path / "data", tmp_path / "log", port)
        while not ("b" in agent.shards and agent.shards["b"].state == ACTIVE):
            # Again and again, as routers do: its agent may not be back yet, and no request is in Redis.
            await status(wake(placer, "b"))
            await asyncio.sleep(0.05)
    await peers.close()
    await store.close()
    etcd.child.stop(5)


async def test_shards_that_have_come_apart_are_taken_away(
    cluster: Cluster, peers: Peers, watch: Watch, store: Store
) -> None:
    first, second = [await peers.add(name) for name in ("g0", "g1")]
    wide = spec("a")
    wide.tp = 2
    await store.put(cluster.keys.model("a"), wide)
    second.network = lambda: Fault.LOST
    async with running_placer(cluster) as placer:
        await watch.led_by("p0")
        await wake(placer, "a")
        await until(lambda: "a" in first.shards and first.shards["a"].state == ACTIVE)
        second.network = lambda: Fault.NONE
        # Taken away, or joined by the other shard.
        await until(lambda: not first.shards or (second.shards and second.shards["a"].state == first.shards["a"].state))


async def test_a_wake_waits_neither_for_redis_nor_for_the_agents_answer(
    tmp_path: Path, etcd: Backing, keys: Keys, store: Store
) -> None:
    redis_server = start_redis(tmp_path / "data", tmp_path / "log")
    cluster = Cluster(etcd, redis_server, keys)
    peers = Peers(cluster)
    agent = await peers.add("g0")
    for name in ("a", "b"):
        await store.put(keys.model(name), spec(name))
    async with running_placer(cluster) as placer, watching(store, keys) as watch:
        await watch.led_by("p0")
        await watch.outlook("b", lambda o: True)
        redis_server.child.process.send_signal(signal.SIGSTOP)  # it takes calls and never answers
        agent.network = lambda: Fault.SILENT
        assert (await wake(placer, "a")).state == WARMING
        agent.network = lambda: Fault.NONE
        await wake(placer, "b")
        await until(lambda: ("wake", "b") in agent.orders)
        redis_server.child.process.send_signal(signal.SIGCONT)
        async with Redis.from_url(f"redis://{redis_server.address}/0") as redis:
            await queue_requests(redis, keys, "a", 1)  # that was told of; else Redis says that nobody waits any more
        await until(lambda: "a" in agent.shards and agent.shards["a"].state == ACTIVE)  # its order was lost
    await peers.close()
    redis_server.child.stop(5)


async def test_advisory_plans_are_shown_and_not_carried_out(
    cluster: Cluster, peers: Peers, watch: Watch, store: Store
) -> None:
    agent = await peers.add("g0")
    for name in ("a", "b"):
        await store.put(cluster.keys.model(name), spec(name))
    await store.put(cluster.keys.placer_mode(), cluster_pb2.PlacerMode(advisory=True))
    await store.put(cluster.keys.forecast("a"), forecast("a", 3.2))
    async with running_placer(cluster) as placer:
        await watch.plan.wait_for(lambda items: any(plan.actions for plan in items.values()))
        plan = watch.plan.items[""]
        assert plan.advisory
        assert [(a.kind, a.model) for a in plan.actions] == [(cluster_pb2.ACTION_KIND_WARM, "a")]
        answer = await wake(placer, "b")
        assert (answer.state, answer.reason.cause) == (COLD, common_pb2.CAUSE_OPERATOR)
        assert "the placer only advises" in answer.reason.text
        assert "1 request waits and no instance is active" in answer.reason.text
        assert agent.orders == []
        await store.put(cluster.keys.placer_mode(), cluster_pb2.PlacerMode(advisory=False))
        await until(lambda: ("warm", "a") in agent.orders)
        while (await wake(placer, "b")).state != ACTIVE:
            await asyncio.sleep(0.01)
        await watch.plan.wait_for(lambda items: not any(plan.advisory for plan in items.values()))
        await store.put(cluster.keys.placer_mode(), cluster_pb2.PlacerMode(advisory=True))
        await watch.plan.wait_for(lambda items: all(plan.advisory for plan in items.values()))
        assert (await wake(placer, "b")).state == ACTIVE  # what is there serves


async def test_a_placer_started_as_advisory_orders_nothing(
    cluster: Cluster, peers: Peers, watch: Watch, store: Store
) -> None:
    agent = await peers.add("g0")
    await store.put(cluster.keys.model("a"), spec("a", min_replicas=1))
    async with running_placer(cluster, advisory=True):
        await watch.plan.wait_for(lambda items: any(plan.advisory and plan.actions for plan in items.values()))
    assert agent.orders == []


async def test_pinned_models_are_warm_without_a_forecast(
    cluster: Cluster, peers: Peers, watch: Watch, store: Store
) -> None:
    agent = await peers.add("g0")
    await store.put(cluster.keys.model("a"), spec("a", pinned_replicas=1))
    async with running_placer(cluster):
        await until(lambda: "a" in agent.shards and agent.shards["a"].state == WARM)


async def test_capacity_is_what_instances_report_and_the_plan_says_where_it_is_from(
    cluster: Cluster, peers: Peers, watch: Watch, store: Store
) -> None:
    agent = await peers.add("g0")
    agent.slots = 5
    await store.put(cluster.keys.model("a"), spec("a"))
    async with running_placer(cluster) as placer:
        await watch.outlook("a", lambda o: o.capacity_source.startswith("assumed"))
        await wake(placer, "a")
        await watch.outlook("a", lambda o: o.capacity == 5 and "report" in o.capacity_source)


async def test_what_cannot_be_is_told_in_words(cluster: Cluster, peers: Peers, watch: Watch, store: Store) -> None:
    await peers.add("g0", pages=64)
    await peers.add("g1", pages=32)
    await store.put(cluster.keys.model("many"), spec("many", min_replicas=3))
    await store.put(cluster.keys.model("large"), spec("large", 64, min_replicas=1))
    wide = spec("wide", 8, min_replicas=1)
    wide.tp = 4
    await store.put(cluster.keys.model("wide"), wide)
    await store.put(cluster.keys.model("odd"), spec("odd"))
    await store.put(cluster.keys.forecast("odd"), forecast("odd", float("nan")))
    async with running_placer(cluster):
        await watch.outlook("many", lambda o: "3" in o.reason.text and o.active_replicas == 2)
        await watch.outlook("large", lambda o: o.reason.cause == common_pb2.CAUSE_NO_CAPACITY and "64" in o.reason.text)
        await watch.outlook("wide", lambda o: o.reason.cause == common_pb2.CAUSE_NO_CAPACITY and "4" in o.reason.text)
        await watch.outlook("odd", lambda o: "holds no usable number" in o.reason.text)
