"""A whole agent's transitions: each asked for twice, cancelled in the middle, crossed by another; and what is told."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY

from launcher.backing import Backing
from services.common.queues import RequestQueue
from services.gpu_agent.arena.weight_range import Filling
from services.gpu_agent.copy_lane import CopyLane
from services.gpu_agent.engine import host
from services.gpu_agent.instance_server import InstanceServer
from services.gpu_agent.loading import Loader
from tests.gpu_agent import checkpoints
from tests.gpu_agent.agent_process import RunningAgent, running_agent
from tests.gpu_agent.test_agent_service import Gate
from warmserve.cluster.keys import Keys
from warmserve.v1 import agent_pb2, cluster_pb2, common_pb2

PAGE = 1 << 16
COLD = common_pb2.REPLICA_STATE_COLD
WARMING = common_pb2.REPLICA_STATE_WARMING
WARM = common_pb2.REPLICA_STATE_WARM
ACTIVE = common_pb2.REPLICA_STATE_ACTIVE
DRAINING = common_pb2.REPLICA_STATE_DRAINING


@pytest.fixture
async def agent(etcd: Backing, redis_server: Backing, keys: Keys, tmp_path: Path) -> AsyncIterator[RunningAgent]:
    async with running_agent(etcd.address, redis_server.address, keys.prefix, tmp_path) as agent:
        yield agent


def because(text: str) -> common_pb2.Reason:
    return common_pb2.Reason(cause=common_pb2.CAUSE_OPERATOR, text=text)


class Orders:
    """Orders about one model, each with its reason; and what was told of it."""

    def __init__(self, agent: RunningAgent, spec: cluster_pb2.ModelSpec) -> None:
        self._agent = agent
        self._spec = spec
        self._seen = 0

    async def warm(self, why: str) -> common_pb2.ReplicaState.ValueType:
        order = agent_pb2.WarmReplicaRequest(spec=self._spec, group=self._agent.group, reason=because(why))
        return (await self._agent.stub.WarmReplica(order)).state

    async def wake(self, why: str) -> common_pb2.ReplicaState.ValueType:
        order = agent_pb2.WakeReplicaRequest(spec=self._spec, group=self._agent.group, reason=because(why))
        return (await self._agent.stub.WakeReplica(order)).state

    async def drain(self, why: str) -> common_pb2.ReplicaState.ValueType:
        order = agent_pb2.DrainReplicaRequest(model=self._spec.name, reason=because(why))
        return (await self._agent.stub.DrainReplica(order)).state

    async def evict(self, why: str, keep: float = 0.0) -> agent_pb2.EvictReplicaResponse:
        order = agent_pb2.EvictReplicaRequest(model=self._spec.name, keep_residency=keep, reason=because(why))
        return await self._agent.stub.EvictReplica(order)

    async def recorded(self, state: common_pb2.ReplicaState.ValueType, why: str) -> cluster_pb2.ResidentShard:
        """The record in etcd, once it shows the state for that reason."""

        def shown(_: object) -> bool:
            shard = self._agent.shard(self._spec.name)
            return shard is not None and (shard.state, shard.reason.text) == (state, why)

        await asyncio.wait_for(self._agent.residency.wait_for(shown), 30)
        shard = self._agent.shard(self._spec.name)
        assert shard is not None
        return shard

    async def told(self, count: int) -> list[cluster_pb2.Event]:
        """The next `count` events, of which there are no more."""
        following = self._agent.node.events.follow(after="0")
        found = [(await asyncio.wait_for(anext(following), 30))[1] for _ in range(self._seen + count)]
        await following.aclose()
        assert len(await self._agent.node.events.newest(1000)) == self._seen + count
        self._seen += count
        return found[self._seen - count :]


def said(event: cluster_pb2.Event) -> tuple[str, int, int, str]:
    """An event's kind, the states before and after, and its reason."""
    kind = cluster_pb2.EventKind.Name(event.kind).removeprefix("EVENT_KIND_").lower()
    return kind, event.from_state, event.to_state, event.reason.text


async def events(agent: RunningAgent, kind: str, count: int) -> list[cluster_pb2.Event]:
    """All events of a kind, once there are so many: etcd may show what happened before Redis does."""
    while True:
        found = [event for _, event in await agent.node.events.newest(100) if said(event)[0] == kind]
        if len(found) >= count:
            return found
        await asyncio.sleep(0.01)


@pytest.fixture
async def orders(agent: RunningAgent, tmp_path: Path) -> Orders:
    checkpoints.llama(tmp_path / "m")
    return Orders(agent, await agent.prepare("m", tmp_path / "m"))


class Copying:
    """Holds each load up before a page is resident, until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, page: int = 0, model: str = "m") -> None:
        """`page`: which one of the model's, counted from 0."""
        self._entered, self._opened = threading.Event(), threading.Event()
        self._cancelled = asyncio.Event()
        done, abandon = Filling.done, Loader.abandon

        def held(filling: Filling, n: int) -> bool:
            if filling._weights.name == model and filling._weights.resident_pages >= page:
                self._entered.set()
                assert self._opened.wait(30)
            return done(filling, n)

        def abandoned(*arguments: Any) -> None:
            abandon(*arguments)
            self._cancelled.set()

        monkeypatch.setattr(Filling, "done", held)
        monkeypatch.setattr(Loader, "abandon", abandoned)

    async def reached(self) -> None:
        assert await asyncio.to_thread(self._entered.wait, 30)

    async def cancelled(self) -> None:
        """Returns once the agent has said that the load is to end."""
        await asyncio.wait_for(self._cancelled.wait(), 30)

    def open(self) -> None:
        self._opened.set()


@pytest.fixture
def copying(monkeypatch: pytest.MonkeyPatch) -> Copying:
    return Copying(monkeypatch)


def count(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(f"warmserve_gpu_agent_{name}", labels) or 0.0


async def test_each_order_given_twice_is_one_transition(agent: RunningAgent, orders: Orders) -> None:
    await orders.warm("warm")
    warm = await orders.recorded(WARM, "warm")
    assert await orders.warm("again") == WARM
    await orders.wake("wake")
    active = await orders.recorded(ACTIVE, "wake")
    assert await orders.wake("again") == ACTIVE
    await orders.drain("drain")
    await orders.recorded(WARM, "drain")
    assert await orders.drain("again") == WARM
    half = await orders.evict("half", keep=0.5)
    kept = await orders.recorded(WARM, "half")
    assert (await orders.evict("again", keep=0.5)).pages_freed == 0
    assert (await orders.evict("again", keep=1.0)).pages_freed == 0
    rest = await orders.evict("last")
    assert half.pages_freed + rest.pages_freed == warm.pages_total
    await orders.recorded(COLD, "last")
    assert (await orders.evict("again")).state == COLD
    assert kept.pages_resident == warm.pages_total - half.pages_freed
    assert active.since_unix_ms >= warm.since_unix_ms
    told = await orders.told(7)
    assert [said(event) for event in told] == [
        ("warming", COLD, WARMING, "warm"),
        ("warmed", WARMING, WARM, "warm"),
        ("woken", WARM, ACTIVE, "wake"),
        ("draining", ACTIVE, DRAINING, "drain"),
        ("drained", DRAINING, WARM, "drain"),
        ("evicted", WARM, WARM, "half"),
        ("evicted", WARM, COLD, "last"),
    ]
    assert all(list(event.agent_ids) == ["g0"] and event.model == "m" for event in told)
    assert [event.bytes for event in told] == [
        *(0, warm.pages_total * PAGE, 0, 0, 0),
        *(half.pages_freed * PAGE, rest.pages_freed * PAGE),
    ]
    warmed = told[1]
    assert (warmed.tier, 0 < warmed.copy_ms <= warmed.duration_ms) == (common_pb2.TIER_DISK, True)
    assert [event.duration_ms > 0 for event in told] == [False, True, True, False, True, True, True]


async def test_two_warmings_of_one_model_are_one(orders: Orders, copying: Copying) -> None:
    assert await orders.warm("first") == WARMING
    await copying.reached()
    assert await orders.warm("again") == WARMING
    copying.open()
    await orders.recorded(WARM, "first")
    assert [said(event)[0] for event in await orders.told(2)] == ["warming", "warmed"]


async def test_two_wakes_of_one_model_are_one(agent: RunningAgent, orders: Orders, copying: Copying) -> None:
    assert [await orders.wake("first"), await orders.wake("again")] == [WARMING, WARMING]
    await copying.reached()
    assert await orders.wake("once more") == WARMING
    copying.open()
    await orders.recorded(ACTIVE, "first")
    assert [said(event)[0] for event in await orders.told(3)] == ["warming", "warmed", "woken"]
    assert len(agent.instances.items) == 1


async def test_a_wake_during_warming_goes_on_from_there(agent: RunningAgent, orders: Orders, copying: Copying) -> None:
    await orders.warm("the forecast")
    await copying.reached()
    assert await orders.wake("requests wait") == WARMING
    await orders.recorded(WARMING, "requests wait")
    copying.open()
    shard = await orders.recorded(ACTIVE, "requests wait")
    told = await orders.told(3)
    assert [said(event) for event in told] == [
        ("warming", COLD, WARMING, "the forecast"),
        ("warmed", WARMING, WARM, "requests wait"),
        ("woken", WARM, ACTIVE, "requests wait"),
    ]
    assert told[1].bytes == shard.pages_total * PAGE  # each page once


async def test_warming_asked_during_a_wake_changes_nothing(orders: Orders, copying: Copying) -> None:
    await orders.wake("requests wait")
    await copying.reached()
    assert await orders.warm("the forecast") == WARMING
    copying.open()
    await orders.recorded(ACTIVE, "requests wait")


@pytest.mark.parametrize("woken", [False, True])
async def test_an_eviction_during_a_copy_ends_it_and_is_the_reason(
    agent: RunningAgent, orders: Orders, copying: Copying, woken: bool
) -> None:
    await (orders.wake if woken else orders.warm)("wanted")
    await copying.reached()
    evicting = asyncio.create_task(orders.evict("worth more elsewhere"))
    await copying.cancelled()
    copying.open()
    answer = await evicting
    assert (answer.state, answer.pages_freed) == (COLD, 1)  # the page that was being copied
    await orders.recorded(COLD, "worth more elsewhere")
    told = await orders.told(3)
    assert [said(event) for event in told] == [
        ("warming", COLD, WARMING, "wanted"),
        ("cancelled", WARMING, WARM, "worth more elsewhere"),
        ("evicted", WARM, COLD, "worth more elsewhere"),
    ]
    assert [event.bytes for event in told] == [0, PAGE, PAGE]
    assert not agent.instances.items
    await orders.wake("again")
    await orders.recorded(ACTIVE, "again")


async def test_an_eviction_before_anything_is_copied_is_recorded_too(
    orders: Orders, monkeypatch: pytest.MonkeyPatch
) -> None:
    copying, building = Copying(monkeypatch), Gate(monkeypatch, host, "build_model")
    await orders.warm("wanted")
    await building.reached()
    evicting = asyncio.create_task(orders.evict("worth more elsewhere"))
    await copying.cancelled()
    building.open()
    assert (await evicting).state == COLD
    await orders.recorded(COLD, "worth more elsewhere")
    assert [said(event) for event in await orders.told(2)] == [
        ("warming", COLD, WARMING, "wanted"),
        ("cancelled", WARMING, COLD, "worth more elsewhere"),
    ]


async def test_a_wake_asked_while_an_eviction_ends_warming_comes_after_both(orders: Orders, copying: Copying) -> None:
    await orders.warm("the forecast")
    await copying.reached()
    evicting = asyncio.create_task(orders.evict("worth more elsewhere"))
    await copying.cancelled()
    waking = asyncio.create_task(orders.wake("requests wait"))
    copying.open()
    assert ((await evicting).state, await waking) == (COLD, WARMING)
    await orders.recorded(ACTIVE, "requests wait")


async def test_an_agent_that_stops_ends_warming_and_says_so(
    etcd: Backing, redis_server: Backing, keys: Keys, tmp_path: Path, copying: Copying
) -> None:
    checkpoints.llama(tmp_path / "m")
    async with running_agent(etcd.address, redis_server.address, keys.prefix, tmp_path) as agent:
        orders = Orders(agent, await agent.prepare("m", tmp_path / "m"))
        await orders.warm("wanted")
        await copying.reached()
        agent.node.stop.set()
        await copying.cancelled()
        copying.open()
        assert [said(event) for event in await orders.told(2)] == [
            ("warming", COLD, WARMING, "wanted"),
            ("cancelled", WARMING, WARM, "agent g0 is stopping"),
        ]


async def test_a_drain_cancels_a_wake_in_progress_and_warming_goes_on(
    agent: RunningAgent, orders: Orders, copying: Copying
) -> None:
    await orders.wake("requests wait")
    await copying.reached()
    assert await orders.drain("nobody waits any more") == WARMING
    assert await orders.drain("again") == WARMING
    await orders.recorded(WARMING, "nobody waits any more")
    copying.open()
    await orders.recorded(WARM, "nobody waits any more")
    assert [said(event) for event in await orders.told(3)] == [
        ("warming", COLD, WARMING, "requests wait"),
        ("cancelled", WARMING, WARMING, "nobody waits any more"),
        ("warmed", WARMING, WARM, "nobody waits any more"),
    ]
    assert not agent.instances.items


async def test_a_wake_goes_before_one_that_was_cancelled(
    agent: RunningAgent, orders: Orders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was a wake is warming like any other: it gives back the pages that it had claimed, and makes way."""
    checkpoints.llama(tmp_path / "urgent", seed=1)
    urgent = Orders(agent, await agent.prepare("urgent", tmp_path / "urgent"))
    copying, waits, go_on = Copying(monkeypatch, page=3), asyncio.Event(), CopyLane._go_on

    def noted(lane: CopyLane) -> None:
        go_on(lane)
        if lane._current is not None and any(turn.urgent for turn in lane._waiting):
            waits.set()

    monkeypatch.setattr(CopyLane, "_go_on", noted)
    await orders.wake("requests wait")
    await copying.reached()
    assert await orders.drain("nobody waits any more") == WARMING
    await urgent.wake("others wait")
    await asyncio.wait_for(waits.wait(), 30)
    copying.open()
    await orders.recorded(WARM, "nobody waits any more")
    assert [event.model for event in await events(agent, "warmed", 2)] == ["urgent", "m"]


async def test_a_wake_cancels_a_drain_and_two_are_one(
    agent: RunningAgent, orders: Orders, monkeypatch: pytest.MonkeyPatch
) -> None:
    await orders.wake("requests wait")
    active = await orders.recorded(ACTIVE, "requests wait")
    gate = Gate(monkeypatch, RequestQueue, "release")  # the drain does not get on
    assert [await orders.drain("low load"), await orders.drain("again")] == [DRAINING, DRAINING]
    await orders.recorded(DRAINING, "low load")

    def draining(items: Mapping[str, cluster_pb2.InstanceRecord]) -> bool:
        return [record.state for record in items.values()] == [DRAINING]

    await asyncio.wait_for(agent.instances.wait_for(draining), 30)
    [record] = agent.instances.items.values()
    assert record.started_unix_ms <= active.since_unix_ms  # it began before
    assert [await orders.wake("a burst"), await orders.wake("again")] == [ACTIVE, ACTIVE]
    gate.open()
    assert (await orders.recorded(ACTIVE, "a burst")).instance_id == active.instance_id
    assert [said(event) for event in (await orders.told(5))[3:]] == [
        ("draining", ACTIVE, DRAINING, "low load"),
        ("woken", DRAINING, ACTIVE, "a burst"),
    ]


async def test_a_wake_goes_before_another_models_warming(
    agent: RunningAgent, orders: Orders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints.llama(tmp_path / "urgent", seed=1)
    urgent = Orders(agent, await agent.prepare("urgent", tmp_path / "urgent"))
    copying, preempted, preempt = Copying(monkeypatch, page=3), asyncio.Event(), CopyLane._go_on

    def noted(lane: CopyLane) -> None:
        preempt(lane)
        if lane._current is not None and lane._current.cancel.is_set():
            preempted.set()

    monkeypatch.setattr(CopyLane, "_go_on", noted)
    await orders.warm("the forecast")
    await copying.reached()
    await urgent.wake("requests wait")
    await asyncio.wait_for(preempted.wait(), 30)
    copying.open()
    shard = await orders.recorded(WARM, "the forecast")
    assert shard.residency == 1
    told = [(event.model, said(event)[0], event.bytes // PAGE) for event in await orders.told(5)]
    total = shard.pages_total
    assert told[:4] == [
        ("m", "warming", 0),
        ("urgent", "warming", 0),
        ("urgent", "warmed", total),
        ("urgent", "woken", 0),
    ]
    assert told[4] == ("m", "warmed", total)


async def test_what_warming_was_worth_is_counted_on_a_real_agent(
    agent: RunningAgent, orders: Orders, tmp_path: Path
) -> None:
    def worth() -> dict[str, float]:
        saved = {f: count("prewarmed_bytes_used_total", model="m", found=f) for f in ("all", "some", "none")}
        wakes = {f"wakes {f}": count("wakes_total", model="m", found=f) for f in ("all", "some", "none")}
        return {**saved, **wakes, "wasted": count("prewarmed_bytes_wasted_total", model="m")}

    def events() -> dict[str, float]:
        kinds = ("warming", "warmed", "woken", "draining", "drained", "evicted")
        return {kind: count("transitions_total", event=kind) for kind in kinds}

    before, begun = worth(), events()
    timed = count("transition_seconds_count", event="warmed")
    moved = count("transition_bytes_total", event="warmed")
    copies = count("copy_bytes_per_second_count", tier="disk")
    await orders.warm("")
    shard = await orders.recorded(WARM, "")
    total = shard.pages_total
    half = (await orders.evict("half", keep=0.5)).pages_freed  # never used: wasted
    await orders.wake("finds some")
    await orders.recorded(ACTIVE, "finds some")
    await orders.drain("rest")
    await orders.recorded(WARM, "rest")
    await orders.wake("finds all")
    await orders.recorded(ACTIVE, "finds all")
    await orders.drain("rest again")
    await orders.recorded(WARM, "rest again")
    await orders.evict("all")  # it has served: no waste
    await orders.wake("finds none")
    await orders.recorded(ACTIVE, "finds none")
    assert {name: value - before[name] for name, value in worth().items()} == {
        "all": total * PAGE,
        "some": (total - half) * PAGE,
        "none": 0,
        "wakes all": 1,
        "wakes some": 1,
        "wakes none": 1,
        "wasted": half * PAGE,
    }
    assert {kind: value - begun[kind] for kind, value in events().items()} == {
        "warming": 3,
        "warmed": 3,
        "woken": 3,
        "draining": 2,
        "drained": 2,
        "evicted": 2,
    }
    assert count("transition_seconds_count", event="warmed") - timed == 3
    assert count("transition_bytes_total", event="warmed") - moved == (total + half + total) * PAGE
    assert count("copy_bytes_per_second_count", tier="disk") - copies == 3


async def test_what_a_cancelled_warming_copied_is_wasted(orders: Orders, monkeypatch: pytest.MonkeyPatch) -> None:
    copying = Copying(monkeypatch, page=3)
    before = count("prewarmed_bytes_wasted_total", model="m")
    await orders.warm("the forecast")
    await copying.reached()
    evicting = asyncio.create_task(orders.evict("worth more elsewhere"))
    await copying.cancelled()
    copying.open()
    assert (await evicting).pages_freed == 4
    assert count("prewarmed_bytes_wasted_total", model="m") - before == 4 * PAGE


async def test_two_wakes_while_a_drain_ends_are_one(orders: Orders, monkeypatch: pytest.MonkeyPatch) -> None:
    await orders.wake("requests wait")
    await orders.recorded(ACTIVE, "requests wait")
    gate = Gate(monkeypatch, InstanceServer, "flush")  # the instance is being given up already
    await orders.drain("low load")
    await gate.reached()
    assert [await orders.wake("a burst"), await orders.wake("again")] == [DRAINING, DRAINING]
    gate.open()
    await orders.recorded(ACTIVE, "a burst")
    assert [said(event) for event in (await orders.told(6))[3:]] == [
        ("draining", ACTIVE, DRAINING, "low load"),
        ("drained", DRAINING, WARM, "low load"),
        ("woken", WARM, ACTIVE, "a burst"),
    ]


async def test_kv_that_needs_the_pages_ends_warming_and_is_the_reason(
    etcd: Backing, redis_server: Backing, keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed, name in enumerate(("busy", "m")):
        checkpoints.llama(tmp_path / name, seed=seed)
    async with running_agent(etcd.address, redis_server.address, keys.prefix, tmp_path, arena="1600KiB") as agent:
        await agent.wake(await agent.prepare("busy", tmp_path / "busy"))
        copying = Copying(monkeypatch, page=5)
        orders = Orders(agent, await agent.prepare("m", tmp_path / "m"))
        await orders.warm("the forecast")
        await copying.reached()
        names = [f"r{n}" for n in range(8)]
        for n, name in enumerate(names):
            await agent.submit("busy", name, [n + 3, *(3 + i % 500 for i in range(200))], 40)
        for name in names:  # nothing waits for the copy
            assert len((await agent.relay.finished(name)).error) == 0
        copying.open()

        def ended(_: object) -> bool:
            shard = agent.shard("m")
            return shard is not None and shard.state in (WARM, COLD)

        await asyncio.wait_for(agent.residency.wait_for(ended), 30)
        shard = agent.shard("m")
        assert shard is not None
        assert shard.reason.cause == common_pb2.CAUSE_MADE_ROOM
        assert "running instances need the memory for KV" in shard.reason.text
        [event] = await events(agent, "cancelled", 1)
        assert (event.from_state, event.reason) == (WARMING, shard.reason)
