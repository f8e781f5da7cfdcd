"""A wake that is cancelled, and whose pages go to another model before its weights are there."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest
import torch

from launcher.backing import Backing
from services.gpu_agent.copy_lane import CopyLane
from services.gpu_agent.weights.image import Image
from tests.gpu_agent import checkpoints
from tests.gpu_agent.agent_process import REASON, running_agent
from tests.gpu_agent.test_agent_service import PROMPT
from warmserve.cluster.keys import Keys
from warmserve.v1 import agent_pb2, cluster_pb2, common_pb2


class Steps:
    """Lets the copy of one image go on from certain pages only when it is told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, pages: tuple[int, ...]) -> None:
        self.fingerprint = "none yet"
        self.reached = {page: threading.Event() for page in pages}
        self.go_on = {page: threading.Event() for page in pages}
        own = Image.read_page

        def read_page(image: Image, index: int, into: torch.Tensor) -> None:
            if self.fingerprint in str(image.path) and index in self.go_on:
                self.reached[index].set()
                assert self.go_on[index].wait(60)
            own(image, index, into)

        monkeypatch.setattr(Image, "read_page", read_page)


async def test_its_instance_ends_and_what_it_had_taken_is_given_back(
    etcd: Backing, redis_server: Backing, keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, waits, go_on = Steps(monkeypatch, (3, 5)), asyncio.Event(), CopyLane._go_on

    def noted(lane: CopyLane) -> None:
        go_on(lane)
        if lane._current is not None and any(turn.urgent for turn in lane._waiting):
            waits.set()

    monkeypatch.setattr(CopyLane, "_go_on", noted)
    checkpoints.llama(tmp_path / "m")
    checkpoints.checkpoint("qwen3", tmp_path / "b")
    async with running_agent(etcd.address, redis_server.address, keys.prefix, tmp_path, arena="1344KiB") as agent:
        m = await agent.prepare("m", tmp_path / "m")
        b = await agent.prepare("b", tmp_path / "b")
        steps.fingerprint = m.facts.fingerprint[:32]

        async def wake(spec: cluster_pb2.ModelSpec) -> None:
            order = agent_pb2.WakeReplicaRequest(spec=spec, group=agent.group, reason=REASON)
            await agent.stub.WakeReplica(order, timeout=30)

        await agent.submit("m", "r0", PROMPT, 8)
        await wake(m)
        async with asyncio.timeout(60), agent.relay.changed:
            await agent.relay.changed.wait_for(lambda: agent.relay.updates["r0"])  # taken, before the weights are there
        await agent.stub.DrainReplica(agent_pb2.DrainReplicaRequest(model="m", reason=REASON))
        steps.go_on[3].set()
        assert await asyncio.to_thread(steps.reached[5].wait, 60)
        await wake(b)  # claims what m, which is not wanted any more, would have needed
        await asyncio.wait_for(waits.wait(), 60)
        steps.go_on[5].set()
        await agent.until("b", common_pb2.REPLICA_STATE_ACTIVE)
        async with asyncio.timeout(60):
            async with agent.relay.changed:
                await agent.relay.changed.wait_for(lambda: agent.relay.updates["r0"][-1].finish_reason)
            await agent.instances.wait_for(lambda items: {record.model for record in items.values()} == {"b"})
        assert "gave its memory to others" in agent.relay.updates["r0"][-1].error
        await agent.until("m", common_pb2.REPLICA_STATE_WARM)
