"""The agent's gRPC service: orders in, states out."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import grpc

from services.common.grpc_frame import StatusError
from services.gpu_agent.agent import Agent, BusyError, NoRoomError
from services.gpu_agent.images import AbandonedError, Images
from services.gpu_agent.shard import Shard
from services.gpu_agent.weights.errors import CheckpointError, Problem
from warmserve.cluster.keys import check_model_name
from warmserve.v1 import agent_pb2, agent_pb2_grpc, common_pb2

Context = grpc.aio.ServicerContext[Any, Any]

_PREPARES = 4  # at once: each has a thread for as long as an image takes, and loads need threads too
_STATUS = {
    Problem.NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    Problem.PERMISSION: grpc.StatusCode.PERMISSION_DENIED,
    Problem.INVALID: grpc.StatusCode.INVALID_ARGUMENT,
    Problem.TOO_LARGE: grpc.StatusCode.RESOURCE_EXHAUSTED,
}


class AgentServicer(agent_pb2_grpc.AgentServiceServicer):
    """See agent.proto."""

    def __init__(self, agent_id: str, agent: Agent, images: Images) -> None:
        self._id = agent_id
        self._agent = agent
        self._images = images
        self._fence = 0
        self._preparing = asyncio.Semaphore(_PREPARES)

    async def PrepareModel(
        self, request: agent_pb2.PrepareModelRequest, context: Context
    ) -> AsyncIterator[agent_pb2.PrepareModelResponse]:
        """Checks a checkpoint and prepares its image."""
        _check_name(request.spec.name)
        loop = asyncio.get_running_loop()
        news: asyncio.Queue[tuple[int, int] | None] = asyncio.Queue()
        abandoned = threading.Event()

        def progress(done: int, total: int) -> None:
            if abandoned.is_set():
                raise AbandonedError
            loop.call_soon_threadsafe(news.put_nowait, (done, total))

        try:
            yield agent_pb2.PrepareModelResponse(stage="checking the checkpoint")
            async with self._preparing:
                blueprint = await asyncio.to_thread(self._images.inspect, request.spec)
                work = asyncio.create_task(asyncio.to_thread(self._images.prepare, blueprint, progress))
                work.add_done_callback(lambda _: news.put_nowait(None))
                while (step := await news.get()) is not None:
                    while not news.empty() and (newer := news.get_nowait()) is not None:
                        step = newer  # only the newest matters to a slow reader
                    yield agent_pb2.PrepareModelResponse(
                        stage="writing the image", bytes_done=step[0], bytes_total=step[1]
                    )
                    if work.done():
                        break
                await work
        except CheckpointError as error:
            raise StatusError(_STATUS[error.kind], error.message) from error
        finally:
            abandoned.set()  # where the caller went away, this ends the thread's work; nothing is left of the image
        self._agent.prepared()
        total = blueprint.layout.total_bytes
        yield agent_pb2.PrepareModelResponse(stage="ready", bytes_done=total, bytes_total=total, facts=blueprint.facts)

    async def WarmReplica(
        self, request: agent_pb2.WarmReplicaRequest, context: Context
    ) -> agent_pb2.WarmReplicaResponse:
        """Begins to warm a shard."""
        self._check(request.fence, request.spec.name, request.group)
        try:
            shard = await self._agent.warm(request.spec, request.group, request.reason)
        except NoRoomError as error:
            raise StatusError(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error)) from error
        except BusyError as error:
            raise StatusError(grpc.StatusCode.FAILED_PRECONDITION, str(error)) from error
        return agent_pb2.WarmReplicaResponse(state=shard.state)

    async def WakeReplica(
        self, request: agent_pb2.WakeReplicaRequest, context: Context
    ) -> agent_pb2.WakeReplicaResponse:
        """Begins to make a shard an instance."""
        self._check(request.fence, request.spec.name, request.group)
        try:
            shard = await self._agent.wake(request.spec, request.group, request.reason)
        except NoRoomError as error:
            raise StatusError(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error)) from error
        except BusyError as error:
            raise StatusError(grpc.StatusCode.FAILED_PRECONDITION, str(error)) from error
        return agent_pb2.WakeReplicaResponse(state=shard.state, estimated_ms=_estimated_ms(shard))

    async def DrainReplica(
        self, request: agent_pb2.DrainReplicaRequest, context: Context
    ) -> agent_pb2.DrainReplicaResponse:
        """Has an instance finish what it runs."""
        self._check(request.fence, request.model)
        return agent_pb2.DrainReplicaResponse(state=self._agent.drain(request.model, request.reason))

    async def EvictReplica(
        self, request: agent_pb2.EvictReplicaRequest, context: Context
    ) -> agent_pb2.EvictReplicaResponse:
        """Gives weight pages back."""
        self._check(request.fence, request.model)
        if not 0 <= request.keep_residency <= 1:
            raise StatusError(
                grpc.StatusCode.INVALID_ARGUMENT, f"keep_residency is {request.keep_residency}, not from 0 to 1"
            )
        try:
            state, freed = await self._agent.evict(request.model, request.keep_residency, request.reason)
        except BusyError as error:
            raise StatusError(grpc.StatusCode.FAILED_PRECONDITION, str(error)) from error
        return agent_pb2.EvictReplicaResponse(state=state, pages_freed=freed)

    def _check(self, fence: int, model: str, group: common_pb2.Group | None = None) -> None:
        _check_name(model)
        if group is not None and list(group.agent_ids) != [self._id]:
            raise StatusError(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"the group is {list(group.agent_ids)}, but agent {self._id} serves groups of itself alone",
            )
        if fence < self._fence:
            raise StatusError(
                grpc.StatusCode.FAILED_PRECONDITION, f"fence {fence} is older than {self._fence}: another placer leads"
            )
        self._fence = fence


def _check_name(model: str) -> None:
    try:
        check_model_name(model)
    except ValueError as error:
        raise StatusError(grpc.StatusCode.INVALID_ARGUMENT, str(error)) from error


def _estimated_ms(shard: Shard) -> float | None:
    """How long until the shard is active: what its last cold load took, for the share that is missing."""
    if shard.state == common_pb2.REPLICA_STATE_ACTIVE:
        return 0.0
    if not shard.cold_load_ms or not shard.pages_total:
        return None
    return shard.cold_load_ms * (1 - shard.pages_resident / shard.pages_total)
