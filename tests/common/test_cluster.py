"""Cluster state over a real etcd, and queues over a real Redis."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import grpc
import pytest
from redis.asyncio import Redis

import warmserve.cluster.store as store_module
from launcher.backing import start_etcd
from launcher.ports import free_port
from services.common.load import (
    LoadCounters,
    LoadCounts,
    WindowCounts,
    reporter_name,
    start_of,
    window_index,
)
from services.common.queues import QueueCounts, RequestQueue
from services.common.session import Election, Session
from warmserve.cluster.events import EventStream
from warmserve.cluster.keys import Keys, check_model_name
from warmserve.cluster.mirror import Mirror
from warmserve.cluster.store import Store, StoreUnavailableError, encode
from warmserve.v1 import agent_pb2, cluster_pb2, common_pb2


def spec(name: str, tp: int = 1) -> cluster_pb2.ModelSpec:
    return cluster_pb2.ModelSpec(name=name, source=f"/models/{name}", tp=tp)


async def test_create_writes_once_and_recognises_its_own_value(store: Store, keys: Keys) -> None:
    first = await store.create(keys.model("a"), spec("a"))
    assert first is not None
    assert await store.create(keys.model("a"), spec("a", tp=2)) is None
    assert await store.create(keys.model("a"), spec("a")) == first
    entry = await store.get(keys.model("a"), cluster_pb2.ModelSpec)
    assert entry is not None
    assert entry.value == spec("a")
    assert entry.create_revision == first


async def test_values_are_json_that_people_can_read(store: Store, keys: Keys) -> None:
    await store.put(keys.model("a"), spec("a", tp=2))
    [change], _ = await store.snapshot(keys.models())
    assert b'"source": "/models/a"' in (change.value or b"")


async def test_a_prefix_larger_than_a_message_of_grpc_is_read_whole(store: Store, keys: Keys) -> None:
    large = cluster_pb2.ModelSpec(source="x" * 1_000_000)
    for index in range(6):
        await store.put(keys.model(f"m{index}"), large)
    entries = await store.get_all(keys.models(), cluster_pb2.ModelSpec)
    assert [entry.value.source for entry in entries] == [large.source] * 6


async def test_etcd_keeps_a_connection_on_which_nothing_happens(etcd, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pings of an idle connection, which etcd forbids, would end it ("too_many_pings")."""
    often = {"grpc.keepalive_time_ms": 1_000, "grpc.http2.max_pings_without_data": 0}
    monkeypatch.setattr(store_module, "_CHANNEL_OPTIONS", store_module._CHANNEL_OPTIONS | often)
    store = Store([etcd.address])
    await store.ping()
    channel = (await store._connected()).channel
    with pytest.raises(TimeoutError):  # it would be closed after three pings
        async with asyncio.timeout(6):
            await channel.wait_for_state_change(grpc.ChannelConnectivity.READY)
    await store.close()


async def test_store_moves_on_to_an_endpoint_that_answers(etcd, keys: Keys) -> None:
    store = Store([f"127.0.0.1:{free_port()}", etcd.address])
    await store.put(keys.model("a"), spec("a"))
    assert await store.get(keys.model("a"), cluster_pb2.ModelSpec) is not None
    await store.close()


async def test_no_endpoint_answers() -> None:
    store = Store([f"127.0.0.1:{free_port()}"])
    with pytest.raises(StoreUnavailableError, match="etcd does not answer"):
        await store.get("x", cluster_pb2.ModelSpec)
    await store.close()


async def test_mirror_follows_changes_and_keeps_state_while_etcd_is_away(tmp_path: Path, keys: Keys) -> None:
    port = free_port()
    etcd = start_etcd(tmp_path / "data", tmp_path / "log", port)
    store = Store([etcd.address])
    await store.put(keys.model("old"), spec("old"))
    mirror = Mirror(store, keys.models(), cluster_pb2.ModelSpec)
    await mirror.start()
    assert set(mirror.items) == {"old"}
    await store.put(keys.model("new"), spec("new"))
    await mirror.wait_for(lambda items: set(items) == {"old", "new"})
    await store.delete(keys.model("old"))
    await mirror.wait_for(lambda items: set(items) == {"new"})

    etcd.child.process.send_signal(signal.SIGKILL)
    etcd.child.process.wait()
    while mirror.connected:
        await asyncio.sleep(0.01)
    assert set(mirror.items) == {"new"}

    etcd = start_etcd(tmp_path / "data", tmp_path / "log", port)
    other = Store([etcd.address])
    await other.put(keys.model("later"), spec("later"))
    await mirror.wait_for(lambda items: set(items) == {"new", "later"})
    await mirror.close()
    await other.close()
    await store.close()
    etcd.child.stop(5)


async def test_session_writes_its_records_again_after_the_lease_ended(store: Store, keys: Keys) -> None:
    session = Session(store, 2)
    await session.start()
    await session.put(keys.agent("g0"), cluster_pb2.AgentRecord(id="g0"))
    lease = session.lease
    await store.revoke_lease(lease)  # as after a long pause of this process
    mirror = Mirror(store, keys.agents(), cluster_pb2.AgentRecord)
    await mirror.start()
    await mirror.wait_for(lambda items: "g0" in items)
    assert session.lease != lease
    await session.close()
    await mirror.wait_for(lambda items: not items)
    await mirror.close()


async def test_a_record_deleted_while_all_are_written_again_stays_deleted(
    store: Store, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(store, 2)
    await session.start()
    for name in ("g0", "g1"):
        await session.put(keys.agent(name), cluster_pb2.AgentRecord(id=name))
    put, reached, go_on = store.put, asyncio.Event(), asyncio.Event()

    async def held(key: str, message: cluster_pb2.AgentRecord, lease: int | None = None) -> None:
        reached.set()
        await go_on.wait()
        await put(key, message, lease=lease)

    monkeypatch.setattr(store, "put", held)
    await store.revoke_lease(session.lease)
    await reached.wait()
    for name in ("g0", "g1"):  # one is being written, one is still to be
        await session.delete(keys.agent(name))
    monkeypatch.undo()
    go_on.set()
    while session.lost.is_set():
        await asyncio.sleep(0.01)
    assert await store.get_all(keys.agents(), cluster_pb2.AgentRecord) == []
    await session.close()


async def test_what_etcd_refuses_is_not_taken_for_a_lost_lease(store: Store, keys: Keys) -> None:
    huge = cluster_pb2.ModelSpec(name="x" * 4_000_000)
    with pytest.raises(StoreUnavailableError, match="etcd refused"):
        await store.put(keys.model("m"), huge)
    with pytest.raises(LookupError, match="lease not found"):
        await store.put(keys.model("m"), spec("m"), lease=12345)


async def test_one_leader_at_a_time_and_fences_rise(store: Store, keys: Keys) -> None:
    sessions = [Session(store, 2), Session(store, 2)]
    for session in sessions:
        await session.start()
    elections = [
        Election(session, keys.placer_leader(), cluster_pb2.LeaderRecord(id=str(i)))
        for i, session in enumerate(sessions)
    ]
    first = await elections[0].campaign()
    waiting = asyncio.create_task(elections[1].campaign())
    await store.put(keys.model("x"), spec("x"))
    assert not waiting.done()
    assert await store.put_if_held(keys.plan(), encode(cluster_pb2.Plan(fence=first)), keys.placer_leader(), first)
    await sessions[0].close()
    second = await waiting
    assert second > first
    assert not await store.put_if_held(keys.plan(), encode(cluster_pb2.Plan(fence=first)), keys.placer_leader(), first)
    await sessions[1].close()


def queued(name: str, priority: common_pb2.Priority = common_pb2.PRIORITY_NORMAL) -> agent_pb2.QueuedRequest:
    return agent_pb2.QueuedRequest(request_id=name, model="m", token_ids=[1, 2, 3], priority=priority)


async def test_urgent_requests_are_taken_first_and_done_ones_are_forgotten(redis: Redis, keys: Keys) -> None:
    queue = RequestQueue(redis, keys)
    assert await queue.take("m", "i0", 4, 0) == []
    await queue.put(queued("late", common_pb2.PRIORITY_LOW))
    await queue.put(queued("normal"))
    await queue.put(queued("urgent", common_pb2.PRIORITY_HIGH))
    assert await queue.waiting("m") == 3
    taken = await queue.take("m", "i0", 2, 0)
    assert [item.request.request_id for item in taken] == ["urgent", "normal"]
    assert await queue.waiting("m") == 1
    assert len(await queue.held("m", ["i0", "i1"])) == 2
    for item in taken:
        await queue.done(item.ticket)
    assert await queue.missing([taken[0].ticket]) == {taken[0].ticket}
    assert await queue.held("m", ["i0"]) == []


async def test_all_queues_are_counted_however_many_there_are(redis: Redis, keys: Keys) -> None:
    queue = RequestQueue(redis, keys)
    names = [f"m{number}" for number in range(70)]
    for position, name in enumerate(names[::10]):
        for _ in range(position + 1):
            await queue.put(agent_pb2.QueuedRequest(request_id="r", model=name, priority=common_pb2.PRIORITY_LOW))
        await queue.take(name, "i", 1, block_ms=0)
    counts = await queue.counts(names)
    assert [(name, count.waiting, count.taken) for name, count in counts.items() if count.taken] == [
        (name, position, 1) for position, name in enumerate(names[::10])
    ]
    assert list(counts) == names
    assert all(count == QueueCounts() for name, count in counts.items() if name not in names[::10])
    assert await queue.counts([]) == {}


async def test_what_a_cut_off_reader_took_is_put_back(redis: Redis, keys: Keys) -> None:
    queue = RequestQueue(redis, keys)
    await queue.take("m", "i0", 1, 0)
    for name in ("a", "b"):
        await queue.put(queued(name))
    taken = await queue.take("m", "i0", 2, 0)
    assert await queue.release("m", "i0", keep={taken[0].ticket}) == 1
    again = await queue.take("m", "i1", 5, 0)
    assert [item.request.request_id for item in again] == ["b"]


async def test_an_entry_that_is_no_request_is_dropped(redis: Redis, keys: Keys) -> None:
    queue = RequestQueue(redis, keys)
    await queue.take("m", "i0", 1, 0)
    for fields in ({"request": b"\xff\xff"}, {"other": b"x"}):
        await redis.xadd(keys.queue("m", "normal"), fields)
    await queue.put(queued("a"))
    assert [item.request.request_id for item in await queue.take("m", "i0", 5, 0)] == ["a"]
    assert len(await queue.held("m", ["i0"])) == 1


async def test_an_instance_that_ended_leaves_the_group_unless_something_is_still_its(redis: Redis, keys: Keys) -> None:
    queue = RequestQueue(redis, keys)
    for instance_id in ("i0", "i1"):
        await queue.take("m", instance_id, 1, 0)
        await queue.take("m", instance_id, 1, 0)
    await queue.put(queued("a"))
    await queue.take("m", "i1", 1, 0)
    for instance_id in ("i0", "i1"):
        await queue.leave("m", instance_id)
    consumers = await redis.xinfo_consumers(keys.queue("m", "normal"), "instances")
    assert [consumer["name"] for consumer in consumers] == [b"i1"]
    assert len(await queue.held("m", ["i1"])) == 1


async def test_a_blocked_reader_wakes_when_a_request_comes(redis: Redis, keys: Keys) -> None:
    queue = RequestQueue(redis, keys)
    await queue.take("m", "i0", 1, 0)
    reader = asyncio.create_task(queue.take("m", "i0", 1, 4000))
    await queue.put(queued("a"))
    assert [item.request.request_id for item in await reader] == ["a"]


async def test_load_counters_add_up_over_routers_and_tell_a_gap_from_silence(redis: Redis, keys: Keys) -> None:
    counters = LoadCounters(redis, keys)
    index = window_index(1_700_000_123.4, 300)
    assert start_of(index, 300) == 1_700_000_100
    assert await counters.read(index, 300) is None
    await counters.report("r0:a.0", index, 300, 200, {"m": LoadCounts(2, 10, 4, 1.5, 3)})
    await counters.report("r1:b.0", index, 300, 300, {"m": LoadCounts(1, 5, 2, 0.5, 1)})
    await counters.report("r0:a.0", index, 300, 300, {"m": LoadCounts(3, 15, 6, 2.0, 4)})  # all that it has counted
    assert await counters.windows() == {index: 3}
    read = await counters.read(index, 300)
    assert read == WindowCounts(300, 600, frozenset({"r0", "r1"}), {"m": LoadCounts(4, 20, 8, 2.5, 5)})
    await counters.report("r2:c.0", index + 1, 300, 300, {})  # silence
    assert await counters.read(index + 1, 300) == WindowCounts(300, 300, frozenset({"r2"}), {})


async def test_a_clock_that_goes_through_a_window_twice_counts_half_each_time(redis: Redis, keys: Keys) -> None:
    counters = LoadCounters(redis, keys)
    for life in (0, 1):
        await counters.report(reporter_name("r0", "a", life), 5, 300, 300, {"m": LoadCounts(2, 10, 4, 60.0, 3)})
    read = await counters.read(5, 300)
    assert read == WindowCounts(300, 600, frozenset({"r0"}), {"m": LoadCounts(2, 10, 4, 60.0, 3)})


async def test_events_are_kept_in_order(redis: Redis, keys: Keys) -> None:
    stream = EventStream(redis, keys)
    for model in ("a", "b"):
        await stream.append(cluster_pb2.Event(kind=cluster_pb2.EVENT_KIND_WARMED, model=model))
    newest = await stream.newest(5)
    assert [event.model for _, event in newest] == ["a", "b"]
    following = stream.follow(after=newest[0][0])
    _, event = await anext(following)
    assert event.model == "b"
    await following.aclose()


@pytest.mark.parametrize("name", ["", "-a", "a b", "a//b", "x" * 129, "ä", "a/"])
def test_model_names_that_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="is not allowed"):
        check_model_name(name)


@pytest.mark.parametrize("name", ["a", "meta/Llama-3.1_8B"])
def test_model_names_that_are_taken(name: str) -> None:
    check_model_name(name)
