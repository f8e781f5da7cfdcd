"""Deploying a model: every node checks and prepares the checkpoint, then it is written once, or not at all."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass

import grpc

from services.common.grpc_frame import StatusError, channel
from services.common.tasks import end_tasks
from services.placer.groups import groups, is_power_of_two
from services.placer.records import Records
from services.placer.snapshot import Agent
from services.placer.words import count
from warmserve.cluster.keys import Keys, check_model_name
from warmserve.cluster.specs import check_wishes
from warmserve.cluster.store import Store, StoreUnavailableError
from warmserve.v1 import agent_pb2, agent_pb2_grpc, cluster_pb2, placement_pb2

_PASSED_ON = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.UNAVAILABLE,
}


@dataclass
class _Preparation:
    """One node's part."""

    agent: cluster_pb2.AgentRecord
    newest: agent_pb2.PrepareModelResponse


class Deployer:
    """Deploys models, one call per name at a time."""

    def __init__(self, store: Store, keys: Keys) -> None:
        self._store = store
        self._keys = keys
        self._names: set[str] = set()

    async def deploy(
        self, spec: cluster_pb2.ModelSpec, records: Records
    ) -> AsyncIterator[placement_pb2.DeployModelResponse]:
        """Progress, and at the end the model as deployed. Raises StatusError; nothing is written then."""
        wanted = checked(spec)
        if wanted.name in self._names:
            raise StatusError(
                grpc.StatusCode.ALREADY_EXISTS, f"model {wanted.name} is being deployed by another call at this moment"
            )
        self._names.add(wanted.name)
        try:
            if await self._get(wanted.name) is not None:
                raise _exists(wanted.name)
            nodes = _one_agent_per_node(wanted, records)
            preparations: dict[str, _Preparation] = {}
            async for preparations in _prepare(wanted, nodes):
                yield _progress(preparations)
            deployed = cluster_pb2.ModelSpec()
            deployed.CopyFrom(wanted)
            deployed.facts.CopyFrom(_joint_facts(preparations))
            deployed.deployed_unix_ms = int(time.time() * 1e3)
            await self._write(deployed)
            yield placement_pb2.DeployModelResponse(
                stage="deployed",
                bytes_done=sum(p.newest.bytes_done for p in preparations.values()),
                bytes_total=sum(p.newest.bytes_total for p in preparations.values()),
                spec=deployed,
            )
        finally:
            self._names.discard(wanted.name)

    async def _get(self, name: str) -> object:
        try:
            return await self._store.get(self._keys.model(name), cluster_pb2.ModelSpec)
        except StoreUnavailableError as error:
            raise StatusError(grpc.StatusCode.UNAVAILABLE, f"nothing was deployed: {error}") from error

    async def _write(self, spec: cluster_pb2.ModelSpec) -> None:
        try:
            if await self._store.create(self._keys.model(spec.name), spec) is None:
                raise _exists(spec.name)
        except StoreUnavailableError as error:
            raise StatusError(
                grpc.StatusCode.UNAVAILABLE, f"{error}; look whether {spec.name} is deployed before trying again"
            ) from error


def checked(spec: cluster_pb2.ModelSpec) -> cluster_pb2.ModelSpec:
    """The spec with defaults filled in. Raises StatusError INVALID_ARGUMENT, saying what to do."""
    try:
        check_model_name(spec.name)
    except ValueError as error:
        raise _invalid(str(error)) from error
    if not spec.source:
        raise _invalid("source is empty: give the folder of the checkpoint")
    tp = spec.tp or 1
    if not is_power_of_two(tp):
        raise _invalid(f"tp is {tp}: it must be a power of two (1, 2, 4, ...)")
    try:
        check_wishes(spec)
    except ValueError as error:
        raise _invalid(str(error)) from error
    wanted = cluster_pb2.ModelSpec()
    wanted.CopyFrom(spec)
    wanted.tp = tp
    wanted.ClearField("facts")
    wanted.deployed_unix_ms = 0
    return wanted


def _one_agent_per_node(spec: cluster_pb2.ModelSpec, records: Records) -> dict[str, cluster_pb2.AgentRecord]:
    """The first agent of each node. Raises StatusError where there is none, or no node can hold a replica."""
    running = [record for record in records.agents.values() if not record.stopping]
    if not running:
        raise StatusError(grpc.StatusCode.UNAVAILABLE, "no agent is registered: start one and try again")
    places = [Agent(r.id, r.node, r.device_index, r.page_bytes, r.pages_total) for r in running]
    if not groups(places, spec.tp):
        largest = max(sum(place.node == node for place in places) for node in {place.node for place in places})
        raise StatusError(
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            f"tp is {spec.tp}, but no node has {spec.tp} agents side by side; at most {count(largest, 'agent')}",
        )
    nodes: dict[str, cluster_pb2.AgentRecord] = {}
    for record in sorted(running, key=lambda record: (record.node, record.device_index, record.id)):
        nodes.setdefault(record.node, record)
    return nodes


async def _prepare(
    spec: cluster_pb2.ModelSpec, nodes: Mapping[str, cluster_pb2.AgentRecord]
) -> AsyncIterator[dict[str, _Preparation]]:
    """Prepares on all nodes at once; yields where each stands after each piece of news. Ends when all have ended.

    Raises StatusError with the first agent's refusal, after cancelling the others.
    """
    news: asyncio.Queue[tuple[str, agent_pb2.PrepareModelResponse | StatusError | None]] = asyncio.Queue()

    async def prepare(node: str, agent: cluster_pb2.AgentRecord) -> None:
        try:
            async with channel(agent.address) as open_channel:
                stub = agent_pb2_grpc.AgentServiceStub(open_channel)
                async for answer in stub.PrepareModel(agent_pb2.PrepareModelRequest(spec=spec)):
                    news.put_nowait((node, answer))
            news.put_nowait((node, None))
        except grpc.aio.AioRpcError as error:
            news.put_nowait((node, _refusal(node, agent, error)))

    tasks = [asyncio.create_task(prepare(node, agent)) for node, agent in nodes.items()]
    standing = {node: _Preparation(agent, agent_pb2.PrepareModelResponse()) for node, agent in nodes.items()}
    unfinished = set(nodes)
    try:
        while unfinished:
            node, item = await news.get()
            if isinstance(item, StatusError):
                raise item
            if item is None:
                unfinished.discard(node)
            else:
                standing[node].newest = item
                yield standing
    finally:
        await end_tasks(tasks)


def _progress(preparations: Mapping[str, _Preparation]) -> placement_pb2.DeployModelResponse:
    stages = [f"{node}: {p.newest.stage or 'waiting'}" for node, p in sorted(preparations.items())]
    return placement_pb2.DeployModelResponse(
        stage="; ".join(stages),
        bytes_done=sum(p.newest.bytes_done for p in preparations.values()),
        bytes_total=sum(p.newest.bytes_total for p in preparations.values()),
    )


def _joint_facts(preparations: Mapping[str, _Preparation]) -> cluster_pb2.ModelFacts:
    """The facts that all nodes agree on, with the largest shard (nodes may differ in page size)."""
    for node, preparation in preparations.items():
        if not preparation.newest.HasField("facts"):
            raise StatusError(
                grpc.StatusCode.INTERNAL,
                f"agent {preparation.agent.id} on {node} ended its preparation without the model's facts",
            )
    by_fingerprint = {p.newest.facts.fingerprint: node for node, p in sorted(preparations.items())}
    if len(by_fingerprint) > 1:
        raise _invalid(
            f"the nodes {' and '.join(sorted(by_fingerprint.values()))} have different checkpoints in the same folder; "
            "make them equal"
        )
    return max((p.newest.facts for p in preparations.values()), key=lambda facts: facts.shard_bytes)


def _refusal(node: str, agent: cluster_pb2.AgentRecord, error: grpc.aio.AioRpcError) -> StatusError:
    details = error.details() or error.code().name
    if error.code() is grpc.StatusCode.UNAVAILABLE:
        text = f"agent {agent.id} on node {node} was lost while it prepared the model: {details}"
        return StatusError(grpc.StatusCode.UNAVAILABLE, text)
    code = error.code() if error.code() in _PASSED_ON else grpc.StatusCode.INTERNAL
    return StatusError(code, f"node {node}: {details}")


def _exists(name: str) -> StatusError:
    return StatusError(
        grpc.StatusCode.ALREADY_EXISTS,
        f"a model named {name} is deployed already; undeploy it first, or take another name",
    )


def _invalid(message: str) -> StatusError:
    return StatusError(grpc.StatusCode.INVALID_ARGUMENT, message)
