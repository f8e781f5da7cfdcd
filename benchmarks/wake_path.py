"""How long a wake request takes to become a wake order: from the call of WakeModel to WakeReplica's arrival.

    python -m benchmarks.wake_path [--json FILE] [--wakes 320]

A leading placer in a process of its own, over a real etcd, Redis and gRPC; one server per agent, all in this process,
that answer orders at once and write their residency as agents do, but hold no weights. Every model has a forecast, so
that whole plans are made all the while: each wake changes what etcd shows, and each change makes a plan. Measured from
before the caller sends, so the hop to the leader is in it, and waits for processors that all of this shares; "in the
leader" is from the call's arrival there until the orders are on their way, by the placer's own metric. "Room is made
first": the model is cold and its agents full, so that an eviction is ordered and answered before. The parts' times are
this process's processor time, of the same records again and again: the cluster as the leader sees it at each wake, and
the decision; between wakes the leader's caches have been used by others, and there they take twice as long. "Processor
of the placer" is all that its process used for each wake, without the process that makes whole plans.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import uvloop
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.report import Row, report
from launcher.backing import start_etcd, start_redis
from launcher.ports import free_port
from services.common.grpc_frame import channel
from services.common.queues import QueueCounts
from services.placer import planner
from services.placer import records as convert
from services.placer.memory import Memory
from services.placer.mirrors import Mirrors
from services.placer.snapshot import Rules
from warmserve.cluster.keys import Keys
from warmserve.cluster.mirror import Mirror
from warmserve.cluster.store import Store
from warmserve.v1 import agent_pb2, agent_pb2_grpc, cluster_pb2, common_pb2, placement_pb2, placement_pb2_grpc

PAGE = 16 << 20
PAGES = 64
SHARD_PAGES = 16  # three fit on an agent, beside KV
TARGET_MS = 5.0
SEED = 5
_REPEATS = 200
_LOOK_S = 0.05  # between looks at the plan
_SEEN_S = 20.0  # after which a plan that does not come is an error
BATCH = 16
COLD = common_pb2.REPLICA_STATE_COLD
WARM = common_pb2.REPLICA_STATE_WARM
ACTIVE = common_pb2.REPLICA_STATE_ACTIVE


@dataclass(frozen=True)
class Kind:
    """A kind of wake."""

    what: str
    cold: bool = False  # and agents are full
    at_once: int = 1


KINDS = (
    Kind("warm model"),
    Kind("8 warm models at once", at_once=8),
    Kind("cold model, room is made first", cold=True),
)


@dataclass
class Agent(agent_pb2_grpc.AgentServiceServicer):
    """An agent without weights: each order is carried out at once."""

    name: str
    store: Store
    keys: Keys
    arrived: Callable[[str], None]
    shards: dict[str, cluster_pb2.ResidentShard] = field(default_factory=dict)
    writing: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def report(self) -> None:
        """Writes residency; one after another, so that the newest is what stays."""
        async with self.writing:
            held = sum(shard.pages_resident for shard in self.shards.values())
            residency = cluster_pb2.AgentResidency(
                agent_id=self.name, pages_free=PAGES - held, pages_weights=held, shards=self.shards.values()
            )
            await self.store.put(self.keys.residency(self.name), residency)

    def put(self, model: str, state: common_pb2.ReplicaState.ValueType, score: float | None = None) -> None:
        """Sets a replica's state. It keeps the score that it was told last, else it would be told again and again."""
        known = self.shards.get(model)
        self.shards[model] = cluster_pb2.ResidentShard(
            model=model,
            group=common_pb2.Group(agent_ids=[self.name], node=node_of(self.name)),
            state=state,
            pages_resident=SHARD_PAGES,
            pages_total=SHARD_PAGES,
            residency=1,
            score=score if score is not None else known.score if known is not None else 0.0,
        )

    def PrepareModel(self, request: agent_pb2.PrepareModelRequest, context: Any) -> Any:
        raise AssertionError("no model is deployed here by way of the placer")

    async def WakeReplica(self, request: agent_pb2.WakeReplicaRequest, context: Any) -> Any:
        self.arrived(request.spec.name)
        self.put(request.spec.name, ACTIVE)
        await self.report()
        return agent_pb2.WakeReplicaResponse(state=ACTIVE)

    async def WarmReplica(self, request: agent_pb2.WarmReplicaRequest, context: Any) -> Any:
        known = self.shards.get(request.spec.name)
        self.put(request.spec.name, known.state if known is not None else WARM, request.reason.score)
        await self.report()
        return agent_pb2.WarmReplicaResponse(state=WARM)

    async def DrainReplica(self, request: agent_pb2.DrainReplicaRequest, context: Any) -> Any:
        if request.model in self.shards:
            self.put(request.model, WARM)
            await self.report()
        return agent_pb2.DrainReplicaResponse(state=WARM)

    async def EvictReplica(self, request: agent_pb2.EvictReplicaRequest, context: Any) -> Any:
        self.shards.pop(request.model, None)
        await self.report()
        return agent_pb2.EvictReplicaResponse(state=COLD)


def node_of(agent: str) -> str:
    """Eight agents share a node."""
    return f"n{int(agent[1:]) // 8}"


@dataclass
class Cluster:
    """A running cluster of agents, with a placer that leads."""

    store: Store
    keys: Keys
    stub: placement_pb2_grpc.PlacementServiceStub
    agents: list[Agent]
    arrivals: dict[str, float]  # when WakeReplica came, by model
    placer: int  # its process
    metrics: str  # its address

    async def plan(self) -> cluster_pb2.Plan:
        """The newest plan. It is asked for between wakes: to follow all would take time of those measured."""
        found = await self.store.get(self.keys.plan(), cluster_pb2.Plan)
        return found.value if found is not None else cluster_pb2.Plan()

    async def see(self, models: Sequence[str], active: bool) -> None:
        """Waits for a plan that knows that these models have an instance, or that they have none."""
        deadline = time.monotonic() + _SEEN_S
        while other := [
            f"{o.model}: {o.reason.text}"
            for o in (await self.plan()).outlooks
            if o.model in models and (o.active_replicas > 0) is not active
        ]:
            if time.monotonic() > deadline:
                there = [f"{a.name}: {m} {s.state}" for a in self.agents for m, s in a.shards.items() if m in models]
                raise RuntimeError(f"the placer's plan never showed {active=}: {other}; agents: {there}")
            await asyncio.sleep(_LOOK_S)


@asynccontextmanager
async def running(agents: int, models: int, resident: int) -> AsyncIterator[Cluster]:
    """A cluster whose first `resident` models are warm."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        etcd = await asyncio.to_thread(start_etcd, folder / "etcd", folder / "etcd.log")
        stack.callback(etcd.child.stop, 5)
        redis = await asyncio.to_thread(start_redis, folder / "redis", folder / "redis.log")
        stack.callback(redis.child.stop, 5)
        store, keys = Store([etcd.address]), Keys(f"bench-{uuid.uuid4().hex}")
        stack.push_async_callback(store.close)
        arrivals: dict[str, float] = {}

        def arrived(model: str) -> None:
            arrivals[model] = time.perf_counter()

        peers = [Agent(f"g{index}", store, keys, arrived) for index in range(agents)]
        for index, peer in enumerate(peers):
            server = await serve(peer, index, store, keys)
            stack.push_async_callback(server.stop, 0)
        for index in range(models):
            await deploy(f"m{index:03}", store, keys)
        for index in range(resident):
            peers[index % agents].put(f"m{index:03}", WARM)
        for peer in peers:
            await peer.report()
        metrics = free_port()
        placer = start_placer(etcd.address, redis.address, keys.prefix, metrics, folder / "placer.log")
        stack.callback(placer.wait)
        stack.callback(placer.terminate)
        leaders = Mirror(store, keys.placer_leader(), cluster_pb2.LeaderRecord)
        await leaders.start()
        stack.push_async_callback(leaders.close)
        await leaders.wait_for(lambda items: bool(items))
        open_channel = await stack.enter_async_context(channel(leaders.items[""].address))
        cluster = Cluster(
            store,
            keys,
            placement_pb2_grpc.PlacementServiceStub(open_channel),
            peers,
            arrivals,
            placer.pid,
            f"http://127.0.0.1:{metrics}/metrics",
        )
        plans = Mirror(store, keys.plan(), cluster_pb2.Plan)
        await plans.start()
        await plans.wait_for(lambda items: any(len(plan.outlooks) == models for plan in items.values()))
        await plans.close()
        yield cluster


def start_placer(etcd: str, redis: str, prefix: str, metrics: int, log: Path) -> subprocess.Popen[bytes]:
    """A placer as a process."""
    settings = {"ETCD_ENDPOINTS": etcd, "REDIS_URL": f"redis://{redis}/0", "PREFIX": prefix, "ID": "p0"}
    settings["METRICS_PORT"] = str(metrics)
    settings["MIN_STAY_S"] = "3600"  # instances rest when the benchmark says so
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "services.placer"],
            env={**os.environ, **{f"WARMSERVE_{name}": value for name, value in settings.items()}},
            stderr=file,
        )


async def serve(peer: Agent, index: int, store: Store, keys: Keys) -> grpc.aio.Server:
    """Serves one agent and registers it."""
    pings = [("grpc.keepalive_permit_without_calls", 1), ("grpc.http2.min_ping_interval_without_data_ms", 5_000)]
    server = grpc.aio.server(options=pings)  # as agents have it
    agent_pb2_grpc.add_AgentServiceServicer_to_server(peer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    record = cluster_pb2.AgentRecord(
        id=peer.name,
        address=f"127.0.0.1:{port}",
        node=node_of(peer.name),
        device_index=index % 8,
        page_bytes=PAGE,
        pages_total=PAGES,
    )
    await store.put(keys.agent(peer.name), record)
    return server


async def deploy(name: str, store: Store, keys: Keys) -> None:
    """A model whose forecast makes the planner think, and gives each the same small worth."""
    facts = cluster_pb2.ModelFacts(shard_bytes=SHARD_PAGES * PAGE, kv_bytes_per_token=1 << 17)
    await store.put(keys.model(name), cluster_pb2.ModelSpec(name=name, source=f"/m/{name}", tp=1, facts=facts))
    start = int(time.time()) // 300 * 300
    windows = [
        cluster_pb2.WindowForecast(
            start_unix_s=start + 300 * ahead,
            mean_load=cluster_pb2.Quantiles(p50=0.02, p90=0.05, p99=0.09),
            peak_load=cluster_pb2.Quantiles(p50=1, p90=2, p99=4),
        )
        for ahead in range(12)
    ]
    forecast = cluster_pb2.Forecast(model=name, window_s=300, predictor="published", windows=windows)
    await store.put(keys.forecast(name), forecast)


async def wake(cluster: Cluster, model: str) -> float:
    """Milliseconds from the call to the order's arrival."""
    cluster.arrivals.pop(model, None)
    began = time.perf_counter()
    call: Any = cluster.stub.WakeModel(placement_pb2.WakeModelRequest(model=model, waiting_requests=1))
    answer = await call
    if model not in cluster.arrivals:
        await arrival(cluster, model, answer)
    return (cluster.arrivals[model] - began) * 1e3


async def arrival(cluster: Cluster, model: str, answer: placement_pb2.WakeModelResponse) -> None:
    """Waits for the order. Raises RuntimeError where none comes."""
    deadline = time.perf_counter() + 5
    while model not in cluster.arrivals:
        if time.perf_counter() > deadline:
            raise RuntimeError(f"{model} was never woken: {answer.reason.text}")
        await asyncio.sleep(0.0005)


async def rest(cluster: Cluster, models: Sequence[str]) -> None:
    """The instances are warm replicas again, and the placer knows it."""
    await cluster.see(models, active=True)
    for agent in cluster.agents:
        for model in agent.shards.keys() & set(models):
            agent.put(model, WARM)
        await agent.report()
    await cluster.see(models, active=False)


async def wakes_of(cluster: Cluster, wakes: int, kind: Kind) -> list[float]:
    """Milliseconds of so many wakes. Those of a batch are of different models, which rest together afterwards."""
    taken: list[float] = []
    while len(taken) < wakes:
        warm = {name for agent in cluster.agents for name in agent.shards}
        models = {outlook.model for outlook in (await cluster.plan()).outlooks}
        chosen = random.sample(sorted(models - warm if kind.cold else warm), BATCH)
        for first in range(0, BATCH, kind.at_once):
            together = chosen[first : first + kind.at_once]
            taken += await asyncio.gather(*(wake(cluster, model) for model in together))
        await rest(cluster, chosen)
    return taken


def rows(what: str, taken: Sequence[float]) -> list[Row]:
    """The median and the 99th percentile."""
    ordered = sorted(taken)
    p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    return [
        Row(f"{what}, p50", statistics.median(ordered), "ms"),
        Row(f"{what}, p99", p99, "ms", target=TARGET_MS),
    ]


def in_leader(cluster: Cluster) -> dict[float, float]:
    """How many wakes so far took at most so many seconds in the leader."""
    with urllib.request.urlopen(cluster.metrics, timeout=5) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    [found] = [family for family in families if family.name == "warmserve_placer_wake_seconds"]
    return {float(s.labels["le"]): s.value for s in found.samples if s.name.endswith("_bucket")}


def in_leader_rows(what: str, before: dict[float, float], after: dict[float, float]) -> list[Row]:
    """How many of the wakes between took longer there than they may, and within what 99 of 100 were decided."""
    counts = {most: after[most] - before[most] for most in sorted(after)}
    every = counts[math.inf]
    p99 = next(most for most, count in counts.items() if count >= 0.99 * every)
    late = 1 - counts[TARGET_MS / 1e3] / every
    return [
        Row(f"{what}, in the leader, p99, at most", p99 * 1e3, "ms", target=TARGET_MS),
        Row(f"{what}, in the leader, later than {TARGET_MS:g} ms", 100 * late, "%"),
    ]


def used_s(process: int) -> float:
    """Processor seconds that a process has used so far."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def parts(cluster: Cluster, what: str, kind: Kind) -> list[Row]:
    """Processor time of what a wake of a kind waits for in the leader, over the records as they are now."""
    mirrors = Mirrors(cluster.store, cluster.keys)
    await mirrors.start()
    try:
        view, memory, rules = convert.View(), Memory(), Rules()
        resident = {name for agent in cluster.agents for name in agent.shards}
        models = sorted(mirrors.models.items.keys() - resident if kind.cold else resident)
        spent = {"records": 0.0, "replicas": 0.0, "snapshot": 0.0, "decision": 0.0}
        for repeat in range(_REPEATS):
            model = models[repeat % len(models)]
            counts = {model: QueueCounts(1, 0)}
            at = [time.process_time()]
            records = mirrors.records()
            at.append(time.process_time())
            seen = view.see(records)
            at.append(time.process_time())
            now = time.monotonic()
            snapshot = memory.snapshot(records, seen.agents, seen.replicas.values(), counts, rules, now, time.time())
            at.append(time.process_time())
            planner.wake(snapshot, model)
            at.append(time.process_time())
            for name, first, last in zip(spent, at, at[1:], strict=False):
                spent[name] += last - first
        return [Row(f"{what}, {name}, processor", s / _REPEATS * 1e3, "ms") for name, s in spent.items()]
    finally:
        await mirrors.close()


async def measure(wakes: int) -> list[Row]:
    """All rows."""
    found = []
    for agents, models in ((16, 60), (64, 60)):
        for kind in KINDS:
            random.seed(SEED)
            resident = 3 * agents if kind.cold else min(models, 3 * agents)
            async with running(agents, resident + models // 2 if kind.cold else models, resident) as cluster:
                await wakes_of(cluster, 2 * BATCH, kind)  # connections, caches
                what, before = f"{agents} GPUs, {kind.what}", used_s(cluster.placer)
                decided = in_leader(cluster)
                taken = await wakes_of(cluster, wakes, kind)
                found += in_leader_rows(what, decided, in_leader(cluster))
                found += rows(what, taken)
                used_ms = (used_s(cluster.placer) - before) / len(taken) * 1e3
                print(f"{what}: {found[-2].value:.2f} ms, p99 {found[-1].value:.2f} ms", file=sys.stderr)
                found.append(Row(f"{what}, processor of the placer for each", used_ms, "ms"))
                if kind.at_once == 1:
                    found += await parts(cluster, what, kind)
    return found


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the result there")
    parser.add_argument("--wakes", type=int, default=320, help="wakes of each kind")
    arguments = parser.parse_args()
    report("wake_path", uvloop.run(measure(arguments.wakes)), arguments.json)


if __name__ == "__main__":
    main()
