"""A whole agent whose models take several pieces of preparation: who waits for it, and what ends it."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from launcher.backing import Backing
from services.gpu_agent.engine.host import HostProgram
from services.gpu_agent.loading import Loader
from tests.gpu_agent import checkpoints
from tests.gpu_agent.agent_process import REASON, RunningAgent, running_agent
from warmserve.cluster.keys import Keys
from warmserve.v1 import agent_pb2, cluster_pb2, common_pb2, inference_pb2

PROMPT = [5, 6, 7, 8, 9]


@dataclass
class Pieces:
    """Makes preparing on the CPU, where there is nothing to prepare, go on until a test ends it."""

    done: threading.Event = field(default_factory=threading.Event)
    finished: threading.Event = field(default_factory=threading.Event)  # a program was told so
    pieces: Counter[HostProgram] = field(default_factory=Counter)
    error: Exception | None = None

    def piece(self, program: HostProgram) -> bool:
        self.pieces[program] += 1
        if self.error:
            raise self.error
        if self.done.wait(0.002):
            self.finished.set()
            return False
        return True

    async def begun(self, programs: int) -> None:
        while len(self.pieces) < programs:
            await asyncio.sleep(0.002)


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> Pieces:
    pieces = Pieces()
    monkeypatch.setattr(HostProgram, "prepare", lambda program: pieces.piece(program))
    return pieces


@pytest.fixture
async def agent(
    etcd: Backing, redis_server: Backing, keys: Keys, tmp_path: Path, pieces: Pieces
) -> AsyncIterator[RunningAgent]:
    async with running_agent(etcd.address, redis_server.address, keys.prefix, tmp_path) as agent:
        yield agent


async def prepared(agent: RunningAgent, tmp_path: Path, name: str) -> cluster_pb2.ModelSpec:
    checkpoints.llama(tmp_path / name)
    return await agent.prepare(name, tmp_path / name)


async def order_warm(agent: RunningAgent, spec: cluster_pb2.ModelSpec) -> None:
    await agent.stub.WarmReplica(agent_pb2.WarmReplicaRequest(spec=spec, group=agent.group, reason=REASON))


async def evict(agent: RunningAgent, model: str, keep: float = 0.0) -> agent_pb2.EvictReplicaResponse:
    return await agent.stub.EvictReplica(agent_pb2.EvictReplicaRequest(model=model, keep_residency=keep, reason=REASON))


async def test_a_wake_waits_for_nobodys_preparing(agent: RunningAgent, tmp_path: Path, pieces: Pieces) -> None:
    """Neither for its own model's nor for another's, and both serve meanwhile."""
    first, second = await prepared(agent, tmp_path, "first"), await prepared(agent, tmp_path, "second")
    await order_warm(agent, first)
    await pieces.begun(1)
    await agent.wake(second)
    await agent.until("first", common_pb2.REPLICA_STATE_WARMING)
    await agent.wake(first)
    for name in ("first", "second"):
        await agent.submit(name, name, PROMPT, 5)
        assert (await agent.relay.finished(name)).finish_reason == inference_pb2.FINISH_REASON_LENGTH
    assert not pieces.finished.is_set()
    pieces.done.set()


async def test_an_eviction_waits_for_no_more_than_a_piece(agent: RunningAgent, tmp_path: Path, pieces: Pieces) -> None:
    spec = await prepared(agent, tmp_path, "m")
    await agent.wake(spec)
    await pieces.begun(1)
    await agent.stub.DrainReplica(agent_pb2.DrainReplicaRequest(model="m", reason=REASON))
    await agent.until("m", common_pb2.REPLICA_STATE_WARM)
    assert (await evict(agent, "m")).state == common_pb2.REPLICA_STATE_COLD
    before = pieces.pieces.total()
    await order_warm(agent, await prepared(agent, tmp_path, "other"))
    await pieces.begun(2)
    assert pieces.pieces.total() - before == [*pieces.pieces.values()][1]  # none of the evicted model's
    pieces.done.set()


async def test_a_model_woken_while_an_eviction_ends_its_preparing_does_not_serve_without_weights(
    agent: RunningAgent, tmp_path: Path, pieces: Pieces, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = await prepared(agent, tmp_path, "m")
    held, abandoned = threading.Event(), asyncio.Event()
    own, own_abandon = pieces.piece, Loader.abandon

    def piece(program: HostProgram) -> bool:
        more = own(program)
        held.wait(30)
        return more

    def abandon(loader: Loader, *order: object) -> None:
        own_abandon(loader, *order)  # type: ignore[arg-type]
        abandoned.set()

    monkeypatch.setattr(pieces, "piece", piece)
    monkeypatch.setattr(Loader, "abandon", abandon)
    await order_warm(agent, spec)
    await pieces.begun(1)
    woken = await agent.stub.WakeReplica(agent_pb2.WakeReplicaRequest(spec=spec, group=agent.group, reason=REASON))
    assert woken.state == common_pb2.REPLICA_STATE_WARMING
    eviction = asyncio.ensure_future(evict(agent, "m"))
    await abandoned.wait()
    held.set()
    assert (await eviction).state == common_pb2.REPLICA_STATE_COLD
    await agent.until("m", common_pb2.REPLICA_STATE_COLD)
    shown = agent.shard("m")
    assert shown is None or not shown.instance_id
    pieces.done.set()
    await agent.wake(spec)
    await agent.submit("m", "r0", PROMPT, 5)
    assert (await agent.relay.finished("r0")).finish_reason == inference_pb2.FINISH_REASON_LENGTH


async def test_preparing_that_was_cut_short_goes_on_with_the_next_wake(
    agent: RunningAgent, tmp_path: Path, pieces: Pieces
) -> None:
    spec = await prepared(agent, tmp_path, "m")
    await order_warm(agent, spec)
    await pieces.begun(1)
    assert (await evict(agent, "m", keep=1)).state == common_pb2.REPLICA_STATE_WARM  # an eviction that takes nothing
    assert not pieces.finished.is_set()
    await agent.wake(spec)
    pieces.done.set()
    assert await asyncio.to_thread(pieces.finished.wait, 30)


async def test_what_cannot_be_prepared_serves_all_the_same(agent: RunningAgent, tmp_path: Path, pieces: Pieces) -> None:
    spec = await prepared(agent, tmp_path, "m")
    pieces.error = RuntimeError("no graph today")
    await agent.wake(spec)
    await agent.submit("m", "r0", PROMPT, 5)
    assert (await agent.relay.finished("r0")).finish_reason == inference_pb2.FINISH_REASON_LENGTH
    await agent.residency.wait_for(lambda items: "no graph today" in items["g0"].shards[0].reason.text)
    shown = agent.shard("m")
    assert shown is not None
    assert shown.state == common_pb2.REPLICA_STATE_ACTIVE
