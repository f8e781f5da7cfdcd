"""What a process keeps in etcd, and knows of it, when an endpoint stands still or a write fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

import warmserve.cluster.store as store_module
from launcher.backing import Backing
from services.common.session import Election, Session
from services.common.tasks import begin_task, end_tasks
from warmserve.cluster.keys import Keys
from warmserve.cluster.mirror import Mirror
from warmserve.cluster.store import Store, StoreUnavailableError
from warmserve.v1 import cluster_pb2


class Proxy:
    """A way to etcd that can stand still: connections stay open, and nothing comes through."""

    def __init__(self, target: str) -> None:
        self.address = ""
        self._host, _, self._port = target.rpartition(":")
        self._going = asyncio.Event()
        self._going.set()

    def hang(self) -> None:
        self._going.clear()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Proxy]:
        tasks: set[asyncio.Task[None]] = set()

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            tasks.add(task)
            from_etcd, to_etcd = await asyncio.open_connection(self._host, int(self._port))
            try:
                await asyncio.gather(self._pump(reader, to_etcd), self._pump(from_etcd, writer))
            finally:
                to_etcd.close()
                writer.close()

        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()
        self.address = f"{host}:{port}"
        try:
            yield self
        finally:
            server.close()
            await end_tasks(tasks)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1 << 16):
                await self._going.wait()
                writer.write(data)
                await writer.drain()
            writer.close()
        except ConnectionError:
            return


async def test_everything_goes_on_with_the_next_endpoint_when_one_stands_still(
    etcd: Backing, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first call to give up closes the connection that others wait on, which must not take them for cancelled."""
    monkeypatch.setattr(store_module, "_CALL_TIMEOUT_S", 1)
    async with Proxy(etcd.address).running() as proxy:
        store, direct = Store([proxy.address, etcd.address]), Store([etcd.address])
        session = Session(store, 3)
        await session.start()
        await session.put(keys.agent("g0"), cluster_pb2.AgentRecord(id="g0"))
        agents = Mirror(store, keys.agents(), cluster_pb2.AgentRecord)
        models = Mirror(store, keys.models(), cluster_pb2.ModelSpec)
        for mirror in (agents, models):
            await mirror.start()
        proxy.hang()
        calls = [begin_task(store.get(keys.model("a"), cluster_pb2.ModelSpec), f"call {number}") for number in range(3)]
        assert await asyncio.gather(*calls) == [None] * 3
        await direct.put(keys.model("a"), cluster_pb2.ModelSpec(name="a"))
        await direct.put(keys.agent("g1"), cluster_pb2.AgentRecord(id="g1"))
        async with asyncio.timeout(30):
            await models.wait_for(lambda items: "a" in items)
            await agents.wait_for(lambda items: {"g0", "g1"} <= set(items))
            while session.lost.is_set():
                await asyncio.sleep(0.05)
        assert await direct.get(keys.agent("g0"), cluster_pb2.AgentRecord) is not None
        await session.close()
        for mirror in (agents, models):
            await mirror.close()
        await store.close()
        await direct.close()


async def test_registering_again_shows_nobody_a_record_go(
    store: Store, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A router that saw an agent's record go would have all that runs there begun anew elsewhere."""
    session = Session(store, 5)
    await session.start()
    await session.put(keys.agent("g0"), cluster_pb2.AgentRecord(id="g0"))
    await session.put(keys.agent("going"), cluster_pb2.AgentRecord(id="going"))
    seen: list[tuple[str, bool]] = []
    mirror = Mirror(store, keys.agents(), cluster_pb2.AgentRecord)
    mirror.on_change(lambda key, old, new: seen.append((key, new is not None)))
    await mirror.start()
    seen.clear()

    lease, delete = session.lease, store.delete

    async def failing(key: str) -> bool:
        monkeypatch.setattr(store, "delete", delete)
        raise StoreUnavailableError("for this once")

    monkeypatch.setattr(store, "delete", failing)
    await session.delete(keys.agent("going"))
    async with asyncio.timeout(20):
        await mirror.wait_for(lambda items: "going" not in items)
        while session.lost.is_set():
            await asyncio.sleep(0.01)
    assert session.lease != lease
    assert seen == [("going", False)]
    await session.close()
    await mirror.wait_for(lambda items: not items)
    await mirror.close()


async def test_who_has_lost_its_lease_asks_etcd_for_nothing_while_nobody_leads(
    store: Store, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(store, 5)
    await session.start()
    session.lost.set()  # and not yet seen by what takes another
    asked = 0

    async def counting(prefix: str) -> tuple[list[store_module.Change], int]:
        nonlocal asked
        asked += 1
        return [], 0

    await end_tasks([session._task])
    monkeypatch.setattr(store, "snapshot", counting)
    campaign = begin_task(Election(session, keys.placer_leader(), cluster_pb2.LeaderRecord()).campaign(), "campaign")
    for _ in range(20):
        await asyncio.sleep(0)  # enough for as many questions
    assert asked == 0
    session.lost.clear()
    async with asyncio.timeout(10):
        assert await campaign > 0
    await session.close()
