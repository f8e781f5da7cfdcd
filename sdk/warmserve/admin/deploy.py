"""Deploying a model by way of the leading placer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import grpc

from warmserve.admin.target import CommandError
from warmserve.cluster.keys import Keys
from warmserve.cluster.mirror import Mirror
from warmserve.cluster.store import Store
from warmserve.v1 import cluster_pb2, common_pb2, placement_pb2, placement_pb2_grpc

OnProgress = Callable[[str, int, int], None]
"""Hears (stage, bytes done, bytes to do)."""


async def find_leader(store: Store, keys: Keys) -> cluster_pb2.LeaderRecord:
    """The leading placer. Raises CommandError where none leads."""
    entry = await store.get(keys.placer_leader(), cluster_pb2.LeaderRecord)
    if entry is None:
        raise CommandError(f"no placer leads (etcd key {keys.placer_leader()} is empty): start one, then try again")
    return entry.value


async def deploy(
    leader: cluster_pb2.LeaderRecord, spec: cluster_pb2.ModelSpec, on_progress: OnProgress
) -> cluster_pb2.ModelSpec:
    """Has the leader deploy a model, and returns it as deployed. Raises CommandError with what the leader said."""
    async with grpc.aio.insecure_channel(leader.address) as channel:
        stub = placement_pb2_grpc.PlacementServiceStub(channel)
        deployed: cluster_pb2.ModelSpec | None = None
        try:
            async for response in stub.DeployModel(placement_pb2.DeployModelRequest(spec=spec)):
                if response.HasField("spec"):
                    deployed = response.spec
                else:
                    on_progress(response.stage, response.bytes_done, response.bytes_total)
        except grpc.aio.AioRpcError as error:
            raise CommandError(_explain(error, leader)) from None
    if deployed is None:
        raise CommandError(f"placer {leader.id} ended the call without saying that {spec.name} is deployed")
    return deployed


def _explain(error: grpc.aio.AioRpcError, leader: cluster_pb2.LeaderRecord) -> str:
    details = error.details() or error.code().name
    if error.code() is grpc.StatusCode.UNAVAILABLE:
        return f"placer {leader.id} at {leader.address}: {details}"
    return details


async def wait_until_active(store: Store, keys: Keys, spec: cluster_pb2.ModelSpec) -> None:
    """Returns once as many instances of the model are active as its spec asks for.

    Raises CommandError where the model is undeployed meanwhile.
    """
    models = Mirror(store, keys.models(), cluster_pb2.ModelSpec)
    instances = Mirror(store, keys.instances(), cluster_pb2.InstanceRecord)
    await models.start()
    await instances.start()

    def active() -> int:
        states = [record.state for record in instances.items.values() if record.model == spec.name]
        return states.count(common_pb2.REPLICA_STATE_ACTIVE)

    try:
        waits = [
            asyncio.ensure_future(models.wait_for(lambda found: spec.name not in found)),
            asyncio.ensure_future(instances.wait_for(lambda _: active() >= spec.min_replicas)),
        ]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)
        if active() < spec.min_replicas:
            raise CommandError(f"{spec.name} was undeployed while waiting for it")
    finally:
        await models.close()
        await instances.close()
