"""A whole GPU agent for tests, served over real sockets, and a router's side of the relay."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from services.common.grpc_frame import GrpcServer, channel
from services.common.process import Node, make_node
from services.common.queues import RequestQueue
from services.common.settings import ServiceSettings
from services.common.tasks import end_tasks
from services.gpu_agent.__main__ import serve
from services.gpu_agent.settings import GpuAgentSettings
from warmserve.cluster.mirror import Mirror
from warmserve.v1 import agent_pb2, agent_pb2_grpc, cluster_pb2, common_pb2, inference_pb2

REASON = common_pb2.Reason(cause=common_pb2.CAUSE_OPERATOR, text="a test asked for it")


class RelayServer(agent_pb2_grpc.TokenRelayServiceServicer):
    """Collects what agents send, as a router would."""

    def __init__(self) -> None:
        self.updates: defaultdict[str, list[agent_pb2.SequenceUpdate]] = defaultdict(list)
        self.changed = asyncio.Condition()
        self.cancels: asyncio.Queue[str] = asyncio.Queue()
        self.streams = 0

    async def Relay(self, request_iterator, context):
        self.streams += 1
        reader = asyncio.create_task(self._read(request_iterator))
        try:
            while True:
                get = asyncio.create_task(self.cancels.get())
                await asyncio.wait({get, reader}, return_when=asyncio.FIRST_COMPLETED)
                if reader.done():
                    get.cancel()
                    return
                yield agent_pb2.RelayResponse(cancel_request_ids=[get.result()])
        finally:
            reader.cancel()

    async def _read(self, request_iterator) -> None:
        async for message in request_iterator:
            for update in message.step.updates:
                self.updates[update.request_id].append(update)
            async with self.changed:
                self.changed.notify_all()

    async def finished(self, request_id: str, attempt: int = 0) -> agent_pb2.SequenceUpdate:
        """The last update of a request, once it has ended."""

        def last() -> agent_pb2.SequenceUpdate | None:
            ends = [u for u in self.updates[request_id] if u.finish_reason and u.attempt == attempt]
            return ends[0] if ends else None

        async with self.changed:
            await self.changed.wait_for(lambda: last() is not None)
        update = last()
        assert update is not None
        return update

    async def some_tokens(self, request_id: str, count: int) -> None:
        """Returns once a request has so many tokens."""
        async with self.changed:
            await self.changed.wait_for(lambda: len(self.tokens(request_id)) >= count)

    def tokens(self, request_id: str) -> list[int]:
        """The tokens of a request so far; asserts that offsets have neither gap nor repeat."""
        tokens: list[int] = []
        for update in self.updates[request_id]:
            assert update.offset == len(tokens) or not update.token_ids
            tokens += update.token_ids
        return tokens


@dataclass
class RunningAgent:
    """An agent in this process."""

    settings: GpuAgentSettings
    node: Node
    stub: agent_pb2_grpc.AgentServiceStub
    residency: Mirror[cluster_pb2.AgentResidency]
    instances: Mirror[cluster_pb2.InstanceRecord]
    queue: RequestQueue
    relay: RelayServer
    relay_address: str
    relay_server: GrpcServer
    task: asyncio.Task[None]
    group: common_pb2.Group = field(init=False)

    def __post_init__(self) -> None:
        self.group = common_pb2.Group(agent_ids=[self.settings.id], node=self.settings.node)

    def shard(self, model: str) -> cluster_pb2.ResidentShard | None:
        """The model's shard as etcd shows it."""
        record = self.residency.items.get(self.settings.id)
        return next((s for s in record.shards if s.model == model), None) if record else None

    async def until(self, model: str, state: common_pb2.ReplicaState.ValueType) -> cluster_pb2.ResidentShard:
        """Waits until etcd shows the model in a state."""

        def there(_: object) -> bool:
            shard = self.shard(model)
            return (shard.state if shard else common_pb2.REPLICA_STATE_COLD) == state

        await asyncio.wait_for(self.residency.wait_for(there), 30)
        return self.shard(model) or cluster_pb2.ResidentShard()

    async def prepare(self, name: str, source: Path, **fields: object) -> cluster_pb2.ModelSpec:
        """Has a checkpoint prepared; returns the spec as the placer would write it."""
        spec = cluster_pb2.ModelSpec(name=name, source=str(source), tp=1, **fields)
        async for progress in self.stub.PrepareModel(agent_pb2.PrepareModelRequest(spec=spec)):
            if progress.HasField("facts"):
                spec.facts.CopyFrom(progress.facts)
        spec.deployed_unix_ms = 1
        return spec

    async def warm(self, spec: cluster_pb2.ModelSpec) -> None:
        """Warms a model and waits for it."""
        await self.stub.WarmReplica(agent_pb2.WarmReplicaRequest(spec=spec, group=self.group, reason=REASON))
        await self.until(spec.name, common_pb2.REPLICA_STATE_WARM)

    async def wake(self, spec: cluster_pb2.ModelSpec) -> str:
        """Wakes a model and waits for it; returns the instance's id."""
        await self.stub.WakeReplica(agent_pb2.WakeReplicaRequest(spec=spec, group=self.group, reason=REASON))
        return (await self.until(spec.name, common_pb2.REPLICA_STATE_ACTIVE)).instance_id

    async def submit(
        self, model: str, name: str, prompt: list[int], max_tokens: int, attempt: int = 0, generated: int = 0
    ) -> None:
        """Queues a greedy request as a router would."""
        await self.queue.put(
            agent_pb2.QueuedRequest(
                request_id=name,
                model=model,
                attempt=attempt,
                router_id="test",
                relay_address=self.relay_address,
                token_ids=prompt,
                generated=generated,
                sampling=inference_pb2.SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True),
            )
        )


@asynccontextmanager
async def running_agent(
    etcd: str, redis: str, prefix: str, folder: Path, agent_id: str = "g0", arena: str = "16MiB", **options: object
) -> AsyncIterator[RunningAgent]:
    """Runs an agent, and a relay for it, until the block ends; then stops it as SIGTERM would.

    options: further settings.
    """
    common = {"etcd_endpoints": [etcd], "redis_url": f"redis://{redis}/0", "prefix": prefix, "lease_ttl_s": 5}
    settings = GpuAgentSettings(
        **common,
        id=agent_id,
        node="n0",
        arena_bytes=arena,
        model_roots=[folder],
        image_dir=folder / "images",
        grace_s=5,
        **{"backend": "host", "page_bytes": "64KiB", **options},
    )
    stop = asyncio.Event()
    node = make_node(settings, stop)
    relay_server = GrpcServer(ServiceSettings(**common))
    relay = RelayServer()
    relay_server.add(
        agent_pb2_grpc.add_TokenRelayServiceServicer_to_server,
        relay,
        agent_pb2.DESCRIPTOR.services_by_name["TokenRelayService"],
    )
    agents = Mirror(node.store, node.keys.agents(), cluster_pb2.AgentRecord)
    residency = Mirror(node.store, node.keys.residencies(), cluster_pb2.AgentResidency)
    instances = Mirror(node.store, node.keys.instances(), cluster_pb2.InstanceRecord)
    async with AsyncExitStack() as stack:  # it all ends whatever happens in the block
        stack.push_async_callback(node.close)
        await node.session.start()
        stack.push_async_callback(relay_server.stop, 0)
        relay_address = await relay_server.start()
        for mirror in (agents, residency, instances):
            stack.push_async_callback(mirror.close)
            await mirror.start()
        task = asyncio.create_task(serve(settings, node))
        stack.push_async_callback(_stopped, task, stop)
        registered = asyncio.create_task(agents.wait_for(lambda items: agent_id in items))
        stack.push_async_callback(end_tasks, [registered])
        await asyncio.wait({registered, task}, return_when=asyncio.FIRST_COMPLETED, timeout=30)
        if task.done():
            task.result()
        await registered
        await asyncio.wait_for(residency.wait_for(lambda items: agent_id in items), 30)
        connection = await stack.enter_async_context(channel(agents.items[agent_id].address))
        yield RunningAgent(
            settings,
            node,
            agent_pb2_grpc.AgentServiceStub(connection),
            residency,
            instances,
            RequestQueue(node.redis, node.keys),
            relay,
            relay_address,
            relay_server,
            task,
        )


async def _stopped(task: asyncio.Task[None], stop: asyncio.Event) -> None:
    """Stops an agent as SIGTERM would; fails where it does not end, or ended with an error."""
    stop.set()
    await asyncio.wait({task}, timeout=30)
    assert task.done(), "the agent does not stop"
    task.result()


async def status_of(call: object) -> tuple[grpc.StatusCode, str]:
    """The status a call fails with."""
    try:
        if hasattr(call, "__aiter__"):
            async for _ in call:
                pass
        else:
            await call  # type: ignore[misc]
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details() or ""
    raise AssertionError("the call did not fail")
