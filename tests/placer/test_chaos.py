"""The placer where orders and answers are lost, agents die, and leaders are killed or stand still: after that, order.

Placers are processes, so that they can be killed and stopped; agents are peers that speak the real RPCs; etcd and Redis
are real. What happens is drawn from a seed.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import grpc
import pytest

from services.common.grpc_frame import channel
from tests.placer.peers import ACTIVE, COLD, PAGE, WARM, AgentPeer, Cluster, Fault, Peers, Watch
from warmserve.cluster.keys import Keys
from warmserve.cluster.store import Store
from warmserve.v1 import cluster_pb2, placement_pb2, placement_pb2_grpc

MODELS = {"a": (16, 1), "b": (24, 1), "c": (40, 1), "d": (12, 2), "e": (30, 2)}  # shard pages, tp
AGENTS = ("g0", "g1", "g2", "g3")
STEPS = 40


@dataclass
class Placers:
    """Placer processes of one cluster."""

    cluster: Cluster
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    count: int = 0

    def add(self) -> None:
        """Starts one more."""
        name = f"p{self.count}"
        self.count += 1
        cluster = self.cluster
        settings = {
            "ETCD_ENDPOINTS": cluster.etcd.address,
            "REDIS_URL": f"redis://{cluster.redis.address}/0",
            "PREFIX": cluster.keys.prefix,
            "ID": name,
            "LEASE_TTL_S": "2",
            "TICK_S": "0.2",
            "ORDER_TIMEOUT_S": "0.5",
            "MIN_STAY_S": "0.1",
            "LOG_LEVEL": "warning",
        }
        self.running[name] = subprocess.Popen(
            [sys.executable, "-m", "services.placer"],
            env={**os.environ, **{f"WARMSERVE_{key}": value for key, value in settings.items()}},
            stderr=subprocess.DEVNULL,
        )

    def kill(self, name: str) -> None:
        """One ends without a word."""
        process = self.running.pop(name)
        process.send_signal(signal.SIGKILL)
        process.wait()

    def signal(self, name: str, number: signal.Signals) -> None:
        """Stops one where it stands, or lets it go on as if nothing had been."""
        self.running[name].send_signal(number)

    def close(self) -> None:
        """Ends all."""
        for name in list(self.running):
            self.kill(name)


@pytest.fixture
def placers(cluster: Cluster) -> Iterator[Placers]:
    """Two placers."""
    placers = Placers(cluster)
    placers.add()
    placers.add()
    yield placers
    placers.close()


@dataclass
class Chaos:
    """What may happen, step by step."""

    chance: random.Random
    cluster: Cluster
    store: Store
    peers: Peers
    placers: Placers
    watch: Watch
    paused: set[str] = field(default_factory=set)
    trouble: float = 0.3  # chance that an order meets a fault

    async def add_agent(self, name: str) -> None:
        """An agent joins, behind a bad network."""
        peer = await self.peers.add(name)
        peer.network = self._fault

    def _fault(self) -> Fault:
        if self.chance.random() >= self.trouble:
            return Fault.NONE
        return self.chance.choice((Fault.LOST, Fault.SILENT, Fault.ANSWER_LOST))

    async def step(self) -> None:
        """Something happens."""
        happening = self.chance.choice(
            [self.forecast] * 4 + [self.wake] * 6 + [self.agent] * 2 + [self.leader] * 2 + [self.cordon, self.minimum]
        )
        await happening()

    async def forecast(self) -> None:
        """A forecast changes."""
        name = self.chance.choice(list(MODELS))
        await self.store.put(self.cluster.keys.forecast(name), forecast(name, self.chance.choice((0.0, 1.0, 5.0))))

    async def minimum(self) -> None:
        """An operator wants an instance, or no longer."""
        name = self.chance.choice(list(MODELS))
        await self.store.put(self.cluster.keys.model(name), spec(name, self.chance.randrange(2)))

    async def wake(self) -> None:
        """A router asks whoever leads; what becomes of the call is its own."""
        await ask(self.watch, self.chance.choice(list(MODELS)))

    async def agent(self) -> None:
        """An agent dies, or one comes (back)."""
        name = self.chance.choice(AGENTS)
        if name not in self.peers.agents:
            await self.add_agent(name)
        elif len(self.peers.agents) > 1:
            await self.peers.lose(name)

    async def leader(self) -> None:
        """A placer dies and another starts, or stands still for longer than its lease lives."""
        name = self.chance.choice(sorted(self.placers.running))
        if name in self.paused:
            self.paused.discard(name)
            self.placers.signal(name, signal.SIGCONT)
        elif self.chance.random() < 0.5:
            self.placers.kill(name)
            self.placers.add()
        elif not self.paused:
            self.paused.add(name)
            self.placers.signal(name, signal.SIGSTOP)

    async def cordon(self) -> None:
        """An operator drains an agent, or takes it back."""
        name = self.chance.choice(AGENTS)
        key = self.cluster.keys.control(name)
        if not await self.store.delete(key):
            await self.store.put(key, cluster_pb2.AgentControl(cordoned=True, drained=self.chance.random() < 0.5))

    async def calm(self) -> None:
        """From now on all goes well: every agent is there and open, and nobody stands still."""
        self.trouble = 0
        for name in sorted(self.paused):
            self.placers.signal(name, signal.SIGCONT)
        self.paused.clear()
        for name in AGENTS:
            await self.store.delete(self.cluster.keys.control(name))
            if name not in self.peers.agents:
                await self.add_agent(name)


async def ask(watch: Watch, model: str) -> None:
    """A call of WakeModel, which may fail."""
    leader = watch.leader.items.get("")
    if leader is None:
        return
    async with channel(leader.address) as open_channel:
        stub = placement_pb2_grpc.PlacementServiceStub(open_channel)
        try:
            await stub.WakeModel(placement_pb2.WakeModelRequest(model=model, waiting_requests=1), timeout=0.5)
        except grpc.aio.AioRpcError:
            return  # a router would ask again


def spec(name: str, minimum: int = 0) -> cluster_pb2.ModelSpec:
    pages, tp = MODELS[name]
    facts = cluster_pb2.ModelFacts(shard_bytes=pages * PAGE)
    return cluster_pb2.ModelSpec(name=name, source=f"/m/{name}-{pages}", tp=tp, facts=facts, min_replicas=minimum)


def forecast(name: str, mean: float) -> cluster_pb2.Forecast:
    load = cluster_pb2.Quantiles(p50=mean, p90=mean, p99=mean)
    window = cluster_pb2.WindowForecast(start_unix_s=0, mean_load=load, peak_load=load)
    return cluster_pb2.Forecast(model=name, window_s=1e10, windows=[window])


def whole_replicas(agents: dict[str, AgentPeer]) -> dict[tuple[str, tuple[str, ...]], int] | None:
    """The state of every replica; None where the shards of one differ, or one is not loaded wholly."""
    shards = defaultdict(dict)
    for name, agent in agents.items():
        for model, shard in agent.shards.items():
            if shard.state == COLD:
                continue  # an order for it was refused
            shards[model, tuple(shard.group.agent_ids)][name] = shard
    states = {}
    for (model, group), parts in shards.items():
        found = {shard.state for shard in parts.values()}
        if set(parts) != set(group) or len(found) != 1 or not found <= {WARM, ACTIVE}:
            return None
        states[model, group] = found.pop()
    return states


@pytest.mark.parametrize("seed", range(3))
async def test_after_any_trouble_the_cluster_becomes_what_the_plan_says(
    cluster: Cluster, keys: Keys, store: Store, peers: Peers, placers: Placers, watch: Watch, seed: int
) -> None:
    chaos = Chaos(random.Random(seed), cluster, store, peers, placers, watch)
    for name in MODELS:
        await store.put(keys.model(name), spec(name))
    for name in AGENTS:
        await chaos.add_agent(name)
    await watch.leader.wait_for(lambda items: bool(items))
    for _ in range(STEPS):
        await chaos.step()
        await asyncio.sleep(chaos.chance.random() * 0.2)  # the pace of the trouble; nothing is expected of it
    await chaos.calm()
    for name in MODELS:  # c has to be active somewhere, a is wanted, the others are not
        await store.put(keys.model(name), spec(name, minimum=int(name == "c")))
        await store.put(keys.forecast(name), forecast(name, 2.0 if name in ("a", "c") else 0.0))

    def settled() -> bool:
        states = whole_replicas(peers.agents)
        if states is None:
            return False
        active = Counter(model for (model, _), state in states.items() if state == ACTIVE)
        plan = watch.plan.items[""]
        told = {outlook.model: outlook.active_replicas for outlook in plan.outlooks if outlook.active_replicas}
        # Idle instances that nobody has to give way to may stay.
        return active["c"] >= 1 and "a" in {model for model, _ in states} and not plan.actions and told == active

    while not settled():
        await asyncio.sleep(0.05)
    for agent in peers.agents.values():
        assert sum(shard.pages_resident for shard in agent.shards.values()) < agent.pages
