"""One agent and one router as processes of their own, with etcd and Redis; the placer's orders are the caller's."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.random_checkpoint import VOCABULARY
from launcher.backing import start_etcd, start_redis
from services.common.grpc_frame import channel
from warmserve.aio import AsyncClient
from warmserve.cluster.keys import Keys
from warmserve.cluster.mirror import Mirror
from warmserve.cluster.store import Store
from warmserve.types import TextDelta
from warmserve.v1 import agent_pb2, agent_pb2_grpc, cluster_pb2, common_pb2

PROMPT = 128
"""Tokens of each prompt."""
REASON = common_pb2.Reason(cause=common_pb2.CAUSE_OPERATOR, text="benchmark", score=1.0)


@dataclass
class Cluster:
    """One agent and one router."""

    agent: agent_pb2_grpc.AgentServiceAsyncStub
    group: common_pb2.Group
    residency: Mirror[cluster_pb2.AgentResidency]
    store: Store
    keys: Keys
    client: AsyncClient
    step_times: Path
    """When steps of the engine ended (see timed_agent.py)."""

    def shard(self, name: str) -> cluster_pb2.ResidentShard:
        """A model's shard as etcd shows it."""
        shown = self.residency.items.get("g0", cluster_pb2.AgentResidency()).shards
        return next((shard for shard in shown if shard.model == name), cluster_pb2.ResidentShard())

    async def until(self, name: str, state: common_pb2.ReplicaState.ValueType) -> cluster_pb2.ResidentShard:
        """Waits until a model is in a state."""
        cold = common_pb2.REPLICA_STATE_COLD
        await self.residency.wait_for(lambda _: (self.shard(name).state or cold) == state)
        return self.shard(name)

    async def deploy(self, name: str, source: Path) -> cluster_pb2.ModelSpec:
        """Prepares a model and makes it known, as the placer does."""
        spec = cluster_pb2.ModelSpec(
            name=name, source=str(source), tp=1, limits=cluster_pb2.ModelLimits(max_context_tokens=1024)
        )
        async for answer in self.agent.PrepareModel(agent_pb2.PrepareModelRequest(spec=spec)):
            if answer.HasField("facts"):
                spec.facts.CopyFrom(answer.facts)
        spec.deployed_unix_ms = int(time.time() * 1e3)
        await self.store.put(self.keys.model(name), spec)
        return spec

    async def wake(self, spec: cluster_pb2.ModelSpec) -> float:
        """Gives the order; returns how long the answer took, in ms."""
        began = time.perf_counter()
        await self.agent.WakeReplica(agent_pb2.WakeReplicaRequest(spec=spec, group=self.group, reason=REASON))
        took_ms = (time.perf_counter() - began) * 1e3
        await self.until(spec.name, common_pb2.REPLICA_STATE_ACTIVE)
        return took_ms

    async def warm(self, spec: cluster_pb2.ModelSpec) -> None:
        """Makes a model warm."""
        await self.agent.WarmReplica(agent_pb2.WarmReplicaRequest(spec=spec, group=self.group, reason=REASON))
        await self.until(spec.name, common_pb2.REPLICA_STATE_WARM)

    async def rest(self, name: str) -> None:
        """Drains a model; it is warm then."""
        await self.agent.DrainReplica(agent_pb2.DrainReplicaRequest(model=name, reason=REASON))
        await self.until(name, common_pb2.REPLICA_STATE_WARM)

    async def evict(self, name: str, keep: float = 0.0) -> float:
        """Evicts a warm model; returns how long that took, in ms."""
        began = time.perf_counter()
        await self.agent.EvictReplica(
            agent_pb2.EvictReplicaRequest(model=name, keep_residency=keep, reason=REASON), timeout=60
        )
        return (time.perf_counter() - began) * 1e3

    async def first_token(self, name: str, seed: int, tokens: int = 1) -> tuple[float, list[float]]:
        """A request's time to the first token, and the times between those after it, in ms."""
        generator = random.Random(seed)
        prompt = [generator.randrange(VOCABULARY) for _ in range(PROMPT)]
        began = time.perf_counter()
        times: list[float] = []
        async with self.client.stream_generate(name, prompt, max_tokens=tokens, min_tokens=tokens) as stream:
            async for event in stream:
                if isinstance(event, TextDelta):
                    times.append(time.perf_counter())
        gaps = [(after - before) * 1e3 for before, after in itertools.pairwise(times)]
        return (times[0] - began) * 1e3, gaps

    async def switch(self, spec: cluster_pb2.ModelSpec, seed: int) -> float:
        """The time to the first token of a request that comes while its model does not serve, in ms."""
        answer = asyncio.ensure_future(self.first_token(spec.name, seed))
        await asyncio.sleep(0)
        await self.wake(spec)
        return (await answer)[0]


@asynccontextmanager
async def running(arena: str, tier: str, folder: Path) -> AsyncIterator[Cluster]:
    """Starts everything, and stops it; checkpoints and images are in the folder above `folder`."""
    folder.mkdir(exist_ok=True)
    async with AsyncExitStack() as stack:
        etcd = start_etcd(folder / "etcd", folder / "etcd.log")
        stack.callback(etcd.child.stop, 5)
        redis = start_redis(folder / "redis", folder / "redis.log")
        stack.callback(redis.child.stop, 5)
        keys = Keys("switch")
        common = {"ETCD_ENDPOINTS": etcd.address, "REDIS_URL": f"redis://{redis.address}/0", "PREFIX": "switch"}
        tier_folder = tempfile.mkdtemp(prefix="warmserve-benchmark-", dir="/dev/shm")
        stack.callback(shutil.rmtree, tier_folder)
        agent = {
            "ID": "g0",
            "NODE": "n0",
            "ARENA_BYTES": arena,
            "MODEL_ROOTS": str(folder.parent),
            "IMAGE_DIR": str(folder.parent / "images"),
            "HOST_TIER_BYTES": tier,
            "HOST_TIER_DIR": tier_folder,
        }
        step_times = folder / "steps"
        for module, settings in (("benchmarks.timed_agent", agent), ("services.router", {"ID": "r0"})):
            process = _start(module, {**common, **settings}, step_times, folder / f"{module.partition('.')[2]}.log")
            stack.callback(process.wait)
            stack.callback(process.terminate)
        store = Store([etcd.address])
        stack.push_async_callback(store.close)
        agents = Mirror(store, keys.agents(), cluster_pb2.AgentRecord)
        routers = Mirror(store, keys.routers(), cluster_pb2.RouterRecord)
        residency = Mirror(store, keys.residencies(), cluster_pb2.AgentResidency)
        for mirror in (agents, routers, residency):
            await mirror.start()
            stack.push_async_callback(mirror.close)
        async with asyncio.timeout(120):
            await agents.wait_for(lambda items: "g0" in items)
            await routers.wait_for(lambda items: bool(items))
        connection = await stack.enter_async_context(channel(agents.items["g0"].address))
        client = await stack.enter_async_context(AsyncClient(routers.items["r0"].address))
        stub = agent_pb2_grpc.AgentServiceStub(connection)
        group = common_pb2.Group(agent_ids=["g0"], node="n0")
        yield Cluster(stub, group, residency, store, keys, client, step_times)


def _start(module: str, settings: dict[str, str], step_times: Path, log: Path) -> subprocess.Popen[bytes]:
    ours = {f"WARMSERVE_{name}": value for name, value in settings.items()}
    environment = {**os.environ, **ours, "STEP_TIMES": str(step_times)}
    with log.open("wb") as file:
        return subprocess.Popen([sys.executable, "-m", module], env=environment, stderr=file)
