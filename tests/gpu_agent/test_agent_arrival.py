"""A whole agent that is woken while weights are missing: what it serves behind the copy, and what ends that."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from launcher.backing import Backing
from services.gpu_agent.engine.arrival import Behind
from services.gpu_agent.instance_server import InstanceServer
from services.gpu_agent.weights.image import Image
from tests.gpu_agent import checkpoints
from tests.gpu_agent.agent_process import REASON, RunningAgent, running_agent
from tests.gpu_agent.test_agent_service import PROMPT, expected
from warmserve.cluster.keys import Keys
from warmserve.v1 import agent_pb2, cluster_pb2, common_pb2, inference_pb2


@dataclass
class Halt:
    """Stops loads before a page, until a test lets them go on."""

    at: int
    go_on: threading.Event = field(default_factory=threading.Event)
    error: OSError | None = None
    pages: list[int] = field(default_factory=list)


@pytest.fixture
def halt(monkeypatch: pytest.MonkeyPatch) -> Halt:
    halt, own = Halt(at=3), Image.read_page

    def read_page(image: Image, index: int, into: torch.Tensor) -> None:
        if index == halt.at:
            assert halt.go_on.wait(60)
            if halt.error:
                raise halt.error
        halt.pages.append(index)
        own(image, index, into)

    monkeypatch.setattr(Image, "read_page", read_page)
    return halt


@pytest.fixture
async def agent(
    etcd: Backing, redis_server: Backing, keys: Keys, tmp_path: Path, halt: Halt
) -> AsyncIterator[RunningAgent]:
    async with running_agent(etcd.address, redis_server.address, keys.prefix, tmp_path) as agent:
        yield agent
        halt.go_on.set()


async def order_wake(agent: RunningAgent, spec: cluster_pb2.ModelSpec) -> agent_pb2.WakeReplicaResponse:
    return await agent.stub.WakeReplica(
        agent_pb2.WakeReplicaRequest(spec=spec, group=agent.group, reason=REASON), timeout=30
    )


async def taken(agent: RunningAgent, name: str) -> None:
    """Returns when an instance has taken the request."""
    async with agent.relay.changed:
        await asyncio.wait_for(agent.relay.changed.wait_for(lambda: agent.relay.updates[name]), 30)


async def begun(agent: RunningAgent, tmp_path: Path) -> tuple[cluster_pb2.ModelSpec, torch.nn.Module]:
    """A model whose load stands still, and a request that it has taken."""
    model = checkpoints.llama(tmp_path / "m")
    spec = await agent.prepare("m", tmp_path / "m")
    await agent.submit("m", "r0", PROMPT, 8)
    assert (await order_wake(agent, spec)).state == common_pb2.REPLICA_STATE_WARMING
    await taken(agent, "r0")
    return spec, model


async def test_a_request_is_taken_before_the_last_weights_are_there(
    agent: RunningAgent, tmp_path: Path, halt: Halt
) -> None:
    spec, model = await begun(agent, tmp_path)
    shard = await agent.until("m", common_pb2.REPLICA_STATE_WARMING)
    assert (await order_wake(agent, spec)).state == common_pb2.REPLICA_STATE_WARMING  # two wakes are one
    await asyncio.wait_for(agent.instances.wait_for(lambda items: len(items) == 1), 30)
    assert agent.relay.tokens("r0") == []
    halt.go_on.set()
    shard = await agent.until("m", common_pb2.REPLICA_STATE_ACTIVE)
    end = await agent.relay.finished("r0")
    assert (end.finish_reason, end.instance_id) == (inference_pb2.FINISH_REASON_LENGTH, shard.instance_id)
    assert agent.relay.tokens("r0") == expected(model, PROMPT, 8)


async def test_a_partial_wake_copies_only_what_is_missing(agent: RunningAgent, tmp_path: Path, halt: Halt) -> None:
    halt.go_on.set()
    model = checkpoints.llama(tmp_path / "m")
    spec = await agent.prepare("m", tmp_path / "m")
    await agent.warm(spec)
    evict = agent_pb2.EvictReplicaRequest(model="m", keep_residency=0.5, reason=REASON)
    kept = round((await agent.until("m", common_pb2.REPLICA_STATE_WARM)).pages_total)
    kept -= (await agent.stub.EvictReplica(evict)).pages_freed
    halt.pages.clear()
    await agent.submit("m", "r0", PROMPT, 8)
    await agent.wake(spec)
    await agent.relay.finished("r0")
    assert agent.relay.tokens("r0") == expected(model, PROMPT, 8)
    assert halt.pages[0] == kept > 0


async def test_others_serve_while_a_wake_waits_for_its_weights(agent: RunningAgent, tmp_path: Path, halt: Halt) -> None:
    other = checkpoints.checkpoint("qwen3", tmp_path / "other")
    halt.at = 10_000
    await agent.wake(await agent.prepare("other", tmp_path / "other"))
    halt.at = 3
    await begun(agent, tmp_path)
    await agent.submit("other", "r1", PROMPT, 20)
    await asyncio.wait_for(agent.relay.finished("r1"), 30)
    assert agent.relay.tokens("r1") == expected(other, PROMPT, 20)
    assert agent.relay.tokens("r0") == []
    halt.go_on.set()
    await agent.relay.finished("r0")


async def test_a_cancelled_wake_finishes_what_it_has_taken_and_takes_no_more(
    agent: RunningAgent, tmp_path: Path, halt: Halt
) -> None:
    spec, model = await begun(agent, tmp_path)
    drain = agent_pb2.DrainReplicaRequest(model="m", reason=REASON)
    assert (await agent.stub.DrainReplica(drain)).state == common_pb2.REPLICA_STATE_WARMING
    halt.go_on.set()
    await agent.relay.finished("r0")
    assert agent.relay.tokens("r0") == expected(model, PROMPT, 8)
    assert (await agent.until("m", common_pb2.REPLICA_STATE_WARM)).residency == 1
    await asyncio.wait_for(agent.instances.wait_for(lambda items: not items), 30)
    await agent.submit("m", "r1", PROMPT, 4)
    await agent.wake(spec)
    await agent.relay.finished("r1")


async def test_a_wake_that_is_cancelled_and_asked_for_again_serves(
    agent: RunningAgent, tmp_path: Path, halt: Halt
) -> None:
    spec, _ = await begun(agent, tmp_path)
    await agent.stub.DrainReplica(agent_pb2.DrainReplicaRequest(model="m", reason=REASON))
    await order_wake(agent, spec)
    halt.go_on.set()
    await agent.until("m", common_pb2.REPLICA_STATE_ACTIVE)
    await agent.submit("m", "r1", PROMPT, 4)
    for name in ("r0", "r1"):
        await asyncio.wait_for(agent.relay.finished(name), 30)


async def test_an_eviction_hands_over_what_a_wake_has_taken(agent: RunningAgent, tmp_path: Path, halt: Halt) -> None:
    spec, model = await begun(agent, tmp_path)
    evicting = asyncio.ensure_future(agent.stub.EvictReplica(agent_pb2.EvictReplicaRequest(model="m", reason=REASON)))
    await asyncio.wait({evicting}, timeout=0.05)
    halt.go_on.set()
    assert (await evicting).state == common_pb2.REPLICA_STATE_COLD
    end = await agent.relay.finished("r0")
    assert end.finish_reason == inference_pb2.FINISH_REASON_ERROR  # its router puts it back
    await agent.residency.wait_for(lambda items: items["g0"].pages_kv == items["g0"].pages_weights == 0)
    await asyncio.wait_for(agent.instances.wait_for(lambda items: not items), 30)
    await agent.submit("m", "r0", PROMPT, 8, attempt=1)
    await agent.wake(spec)
    await agent.relay.finished("r0", attempt=1)
    tokens = [t for u in agent.relay.updates["r0"] if u.attempt == 1 for t in u.token_ids]
    assert tokens == expected(model, PROMPT, 8)


async def test_a_disk_that_fails_under_a_wake_hands_over_what_it_has_taken(
    agent: RunningAgent, tmp_path: Path, halt: Halt
) -> None:
    spec, _ = await begun(agent, tmp_path)
    halt.error = OSError("the disk failed")
    halt.go_on.set()
    assert (await agent.relay.finished("r0")).finish_reason == inference_pb2.FINISH_REASON_ERROR
    shard = await agent.until("m", common_pb2.REPLICA_STATE_WARM)
    assert "the disk failed" in shard.reason.text
    assert not shard.instance_id
    halt.error = None
    await agent.submit("m", "r0", PROMPT, 8, attempt=1)
    await agent.wake(spec)
    assert (await agent.relay.finished("r0", attempt=1)).finish_reason == inference_pb2.FINISH_REASON_LENGTH


async def test_an_instance_that_fails_behind_the_copy_takes_no_more(
    agent: RunningAgent, tmp_path: Path, halt: Halt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All it took would fail at once, and a request that fails a few times is given up."""
    stopped, stop_pulling = asyncio.Event(), InstanceServer.stop_pulling

    async def stopping(server: InstanceServer) -> None:
        await stop_pulling(server)
        stopped.set()

    def broken(behind: Behind) -> bool:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(InstanceServer, "stop_pulling", stopping)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Behind, "advance", broken)
        spec, model = await begun(agent, tmp_path)
        assert (await agent.relay.finished("r0")).finish_reason == inference_pb2.FINISH_REASON_ERROR
    await asyncio.wait_for(stopped.wait(), 30)
    await agent.submit("m", "r1", PROMPT, 8)
    halt.go_on.set()
    assert "failed" in (await agent.until("m", common_pb2.REPLICA_STATE_WARM)).reason.text
    await agent.wake(spec)
    assert (await agent.relay.finished("r1")).finish_reason == inference_pb2.FINISH_REASON_LENGTH
    assert agent.relay.tokens("r1") == expected(model, PROMPT, 8)
