"""A placer in this process over real etcd, Redis and gRPC, and agents that speak the real RPCs but load no weights."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import grpc

from launcher.backing import Backing
from services.common.grpc_frame import StatusError, channel
from services.common.process import Node, make_node
from services.common.settings import ServiceSettings
from services.common.tasks import end_tasks
from services.placer.__main__ import serve
from services.placer.settings import PlacerSettings
from warmserve.cluster.keys import Keys
from warmserve.cluster.mirror import Mirror
from warmserve.cluster.store import Store
from warmserve.v1 import agent_pb2, agent_pb2_grpc, cluster_pb2, common_pb2, placement_pb2_grpc

PAGE = 4096
COLD = common_pb2.REPLICA_STATE_COLD
WARMING = common_pb2.REPLICA_STATE_WARMING
WARM = common_pb2.REPLICA_STATE_WARM
ACTIVE = common_pb2.REPLICA_STATE_ACTIVE
DRAINING = common_pb2.REPLICA_STATE_DRAINING


@dataclass
class Cluster:
    """The servers and keys of one test."""

    etcd: Backing
    redis: Backing
    keys: Keys

    def settings(self, kind: type[Any], name: str, **more: Any) -> Any:
        """Settings of one service."""
        return kind(
            etcd_endpoints=[self.etcd.address],
            redis_url=f"redis://{self.redis.address}/0",
            prefix=self.keys.prefix,
            id=name,
            lease_ttl_s=2,
            grace_s=0,
            **more,
        )


@dataclass
class Placer:
    """A running placer."""

    node: Node
    stub: placement_pb2_grpc.PlacementServiceStub
    task: asyncio.Task[None]


@asynccontextmanager
async def running_placer(cluster: Cluster, name: str = "p0", **more: Any) -> AsyncIterator[Placer]:
    """A placer that serves; it may not lead yet."""
    settings = cluster.settings(PlacerSettings, name, **({"tick_s": 0.1} | more))
    node = make_node(settings, asyncio.Event())
    await node.session.start()
    task = asyncio.create_task(serve(settings, node))
    while not node.server.address and not task.done():
        await asyncio.sleep(0.01)
    try:
        async with channel(node.server.address) as open_channel:
            yield Placer(node, placement_pb2_grpc.PlacementServiceStub(open_channel), task)
        node.stop.set()
        await task
    finally:  # also where the test failed
        await end_tasks([task])
        await node.close()


@dataclass
class Watch:
    """What etcd shows."""

    models: Mirror[cluster_pb2.ModelSpec]
    instances: Mirror[cluster_pb2.InstanceRecord]
    residency: Mirror[cluster_pb2.AgentResidency]
    plan: Mirror[cluster_pb2.Plan]
    leader: Mirror[cluster_pb2.LeaderRecord]

    async def outlook(self, model: str, condition: Callable[[cluster_pb2.ModelOutlook], bool]) -> None:
        """Waits for a plan with such an outlook on the model."""
        await self.plan.wait_for(
            lambda items: any(condition(o) for plan in items.values() for o in plan.outlooks if o.model == model)
        )

    async def active(self, *models: str) -> None:
        """Waits until exactly these models have an instance."""
        await self.instances.wait_for(lambda items: sorted(r.model for r in items.values()) == sorted(models))

    async def led_by(self, name: str) -> None:
        """Waits until a placer leads."""
        await self.leader.wait_for(lambda items: [r.id for r in items.values()] == [name])


@asynccontextmanager
async def watching(store: Store, keys: Keys) -> AsyncIterator[Watch]:
    """Mirrors of what tests look at."""
    watch = Watch(
        Mirror(store, keys.models(), cluster_pb2.ModelSpec),
        Mirror(store, keys.instances(), cluster_pb2.InstanceRecord),
        Mirror(store, keys.residencies(), cluster_pb2.AgentResidency),
        Mirror(store, keys.plan(), cluster_pb2.Plan),
        Mirror(store, keys.placer_leader(), cluster_pb2.LeaderRecord),
    )
    mirrors: list[Mirror[Any]] = [watch.models, watch.instances, watch.residency, watch.plan, watch.leader]
    await asyncio.gather(*(mirror.start() for mirror in mirrors))
    yield watch
    await asyncio.gather(*(mirror.close() for mirror in mirrors))


class Fault(Enum):
    """What becomes of an order on its way."""

    NONE = "none"
    LOST = "lost"
    SILENT = "silent"
    ANSWER_LOST = "answer lost"


class AgentPeer(agent_pb2_grpc.AgentServiceServicer):
    """An agent whose loads take no time unless held, and whose instances run what tests say."""

    def __init__(self, node: Node, name: str, machine: str, device_index: int, pages: int) -> None:
        self.node = node
        self.name = name
        self.machine = machine
        self.device_index = device_index
        self.pages = pages
        self.shards: dict[str, cluster_pb2.ResidentShard] = {}
        self.orders: list[tuple[str, str]] = []
        self.fences: list[int] = []
        self.loads = asyncio.Event()  # cleared: loads take for ever
        self.loads.set()
        self.prepares = asyncio.Event()  # cleared: preparing takes for ever
        self.prepares.set()
        self.refusal: StatusError | None = None  # of the next PrepareModel
        self.load_fails = ""  # the words with which loads fail
        self.prepared: list[str] = []
        self.fingerprint = "one"
        self.slots = 8  # of its instances
        self.network: Callable[[], Fault] = lambda: Fault.NONE  # what becomes of the next order
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Serves and registers."""
        descriptor = agent_pb2.DESCRIPTOR.services_by_name["AgentService"]
        self.node.server.add(agent_pb2_grpc.add_AgentServiceServicer_to_server, self, descriptor)
        address = await self.node.server.start()
        record = cluster_pb2.AgentRecord(
            id=self.name,
            address=address,
            node=self.machine,
            device_index=self.device_index,
            page_bytes=PAGE,
            pages_total=self.pages,
        )
        await self.report()
        await self.node.session.put(self.node.keys.agent(self.name), record)

    async def report(self) -> None:
        """Writes residency."""
        held = sum(shard.pages_resident for shard in self.shards.values())
        residency = cluster_pb2.AgentResidency(
            agent_id=self.name, pages_free=self.pages - held, pages_weights=held, shards=self.shards.values()
        )
        await self.node.session.put(self.node.keys.residency(self.name), residency)

    async def runs(self, model: str, running: int) -> None:
        """An instance has so many requests now; at none, a draining one becomes warm."""
        shard = self.shards[model]
        shard.running = running
        if not running and shard.state == DRAINING:
            await self._retire(shard)
        await self.report()

    async def PrepareModel(self, request: agent_pb2.PrepareModelRequest, context: Any) -> AsyncIterator[Any]:
        self.prepared.append(request.spec.name)
        pages = int(request.spec.source.rpartition("-")[2])  # tests name folders after the pages they take
        yield agent_pb2.PrepareModelResponse(stage="writing", bytes_done=PAGE, bytes_total=pages * PAGE)
        await self.prepares.wait()
        if self.refusal is not None:
            raise self.refusal
        facts = cluster_pb2.ModelFacts(shard_bytes=pages * PAGE, fingerprint=self.fingerprint, context_tokens=128)
        yield agent_pb2.PrepareModelResponse(
            stage="ready", bytes_done=pages * PAGE, bytes_total=pages * PAGE, facts=facts
        )

    async def WarmReplica(self, request: agent_pb2.WarmReplicaRequest, context: Any) -> Any:
        return await self._faulty(self._warm(request))

    async def _warm(self, request: agent_pb2.WarmReplicaRequest) -> Any:
        self._take("warm", request.spec.name, request.fence)
        shard = self._shard(request.spec, request.group)
        told, shard.score = shard.score, request.reason.score
        if shard.state == COLD or (shard.state == WARM and shard.pages_resident < shard.pages_total):
            await self._begin(shard, WARM, request.reason)
        elif shard.score != told:
            await self.report()
        return agent_pb2.WarmReplicaResponse(state=shard.state)

    async def WakeReplica(self, request: agent_pb2.WakeReplicaRequest, context: Any) -> Any:
        return await self._faulty(self._wake(request))

    async def _wake(self, request: agent_pb2.WakeReplicaRequest) -> Any:
        self._take("wake", request.spec.name, request.fence)
        shard = self._shard(request.spec, request.group)
        if shard.state in (COLD, WARM):
            await self._begin(shard, ACTIVE, request.reason)
        return agent_pb2.WakeReplicaResponse(state=shard.state)

    async def DrainReplica(self, request: agent_pb2.DrainReplicaRequest, context: Any) -> Any:
        return await self._faulty(self._drain(request))

    async def _drain(self, request: agent_pb2.DrainReplicaRequest) -> Any:
        self._take("drain", request.model, request.fence)
        shard = self.shards.get(request.model)
        if shard is not None and shard.state == ACTIVE:
            shard.state = DRAINING
            shard.reason.CopyFrom(request.reason)
            if not shard.running:
                await self._retire(shard)
            await self.report()
        return agent_pb2.DrainReplicaResponse(state=shard.state if shard else COLD)

    async def EvictReplica(self, request: agent_pb2.EvictReplicaRequest, context: Any) -> Any:
        return await self._faulty(self._evict(request))

    async def _evict(self, request: agent_pb2.EvictReplicaRequest) -> Any:
        self._take("evict", request.model, request.fence)
        shard = self.shards.get(request.model)
        if shard is None:
            return agent_pb2.EvictReplicaResponse(state=COLD)
        if shard.state in (ACTIVE, DRAINING):
            raise StatusError(grpc.StatusCode.FAILED_PRECONDITION, f"{request.model} is serving")
        kept = math.ceil(request.keep_residency * shard.pages_total)
        freed = max(0, shard.pages_resident - kept)
        self._resident(shard, min(kept, shard.pages_resident))
        shard.state = WARM if kept else COLD
        if not kept:
            del self.shards[request.model]
        await self.report()
        return agent_pb2.EvictReplicaResponse(state=shard.state, pages_freed=freed)

    async def _faulty(self, carrying_out: Coroutine[Any, Any, Any]) -> Any:
        """Carries an order out, unless the network has it otherwise."""
        fault = self.network()
        if fault in (Fault.LOST, Fault.SILENT):
            carrying_out.close()
        if fault is Fault.LOST:
            raise StatusError(grpc.StatusCode.UNAVAILABLE, "the order was lost")
        if fault is Fault.SILENT:
            await asyncio.Event().wait()  # until the caller gives up
        answer = await carrying_out
        if fault is Fault.ANSWER_LOST:
            raise StatusError(grpc.StatusCode.UNAVAILABLE, "the answer was lost")
        return answer

    def _take(self, kind: str, model: str, fence: int) -> None:
        if fence < max(self.fences, default=0):
            raise StatusError(grpc.StatusCode.FAILED_PRECONDITION, "another placer leads")
        self.orders.append((kind, model))
        self.fences.append(fence)

    def _shard(self, spec: cluster_pb2.ModelSpec, group: common_pb2.Group) -> cluster_pb2.ResidentShard:
        assert self.name in group.agent_ids
        return self.shards.setdefault(
            spec.name,
            cluster_pb2.ResidentShard(
                model=spec.name,
                shard=list(group.agent_ids).index(self.name),
                group=group,
                state=COLD,
                pages_total=math.ceil(spec.facts.shard_bytes / PAGE),
            ),
        )

    async def _begin(self, shard: cluster_pb2.ResidentShard, then: Any, reason: common_pb2.Reason) -> None:
        free = self.pages - sum(other.pages_resident for other in self.shards.values())
        if shard.pages_total - shard.pages_resident + 1 > free:
            raise StatusError(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{shard.model} does not fit into {free} free pages")
        shard.state = WARMING
        shard.reason.CopyFrom(reason)
        self._resident(shard, shard.pages_total)
        await self.report()
        task = asyncio.create_task(self._load(shard, then))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _load(self, shard: cluster_pb2.ResidentShard, then: Any) -> None:
        await self.loads.wait()
        if self.load_fails:
            self._resident(shard, 0)
            shard.state = COLD
            shard.reason.CopyFrom(common_pb2.Reason(cause=common_pb2.CAUSE_FAILURE, text=self.load_fails))
            return await self.report()
        shard.state = then
        shard.cold_load_ms = 250
        if then == ACTIVE:
            shard.instance_id = f"{self.name}.{time.monotonic_ns()}"
            if shard.shard == 0:
                record = cluster_pb2.InstanceRecord(
                    id=shard.instance_id, model=shard.model, group=shard.group, state=ACTIVE, slots=self.slots
                )
                await self.node.session.put(self.node.keys.instance(shard.model, shard.instance_id), record)
        return await self.report()

    async def _retire(self, shard: cluster_pb2.ResidentShard) -> None:
        if shard.shard == 0:
            await self.node.session.delete(self.node.keys.instance(shard.model, shard.instance_id))
        shard.state = WARM
        shard.instance_id = ""

    def _resident(self, shard: cluster_pb2.ResidentShard, pages: int) -> None:
        shard.pages_resident = pages
        shard.residency = pages / shard.pages_total


@dataclass
class Peers:
    """The agents of one test, by id."""

    cluster: Cluster
    agents: dict[str, AgentPeer] = field(default_factory=dict)

    async def add(self, name: str, machine: str = "n0", pages: int = 64) -> AgentPeer:
        """Starts an agent g<index>."""
        node = make_node(self.cluster.settings(ServiceSettings, name), asyncio.Event())
        await node.session.start()
        peer = AgentPeer(node, name, machine, int(name[1:]), pages)
        await peer.start()
        self.agents[name] = peer
        return peer

    async def lose(self, name: str) -> None:
        """An agent is gone, and its lease with it."""
        peer = self.agents.pop(name)
        await peer.node.session.close()
        await peer.node.server.stop(0)
        await peer.node.redis.aclose()
        await peer.node.store.close()

    async def close(self) -> None:
        """Ends them all."""
        for name in list(self.agents):
            await self.lose(name)
