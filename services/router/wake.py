"""Waking models that requests wait for: one call to the placer for any number of waiters, repeated while needed."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import grpc

from services.common.grpc_frame import channel
from services.common.tasks import end_tasks
from services.common.telemetry import logger
from services.router import metrics
from services.router.view import ClusterView
from warmserve.v1 import cluster_pb2, common_pb2, inference_pb2, placement_pb2, placement_pb2_grpc

_log = logger(__name__)
_CALL_S = 10.0


@dataclass(frozen=True)
class WakeStatus:
    """What waking a model has come to."""

    state: inference_pb2.ProgressState.ValueType  # WAKING or BLOCKED
    reason: common_pb2.Reason
    ready_at: float | None = None  # estimate, on time.monotonic()


class Waker:
    """Asks the leading placer for an instance of each model that requests wait for and none serves."""

    def __init__(
        self,
        view: ClusterView,
        waiting: Callable[[str], int],
        on_progress: Callable[[str], None],
        retry_s: float,
    ) -> None:
        """`waiting(model)` counts waiting requests; `on_progress(model)` is called when `status(model)` has changed."""
        self._view = view
        self._waiting = waiting
        self._on_progress = on_progress
        self._retry_s = retry_s
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._news: dict[str, asyncio.Event] = {}
        self._statuses: dict[str, WakeStatus] = {}
        self._channel: grpc.aio.Channel | None = None
        self._address = ""
        self._closing: set[asyncio.Task[None]] = set()
        view.instances.on_change(self._instance_changed)
        view.leaders.on_change(self._leader_changed)

    def status(self, model: str) -> WakeStatus | None:
        """What the wake in progress has come to; None where there is none, or nothing is known yet."""
        return self._statuses.get(model)

    def need(self, model: str) -> None:
        """Begins to wake a model, unless an instance is active or a wake is in progress."""
        if model not in self._tasks and self._needed(model):
            self._news[model] = asyncio.Event()
            self._tasks[model] = asyncio.create_task(self._wake(model), name=f"wake {model}")

    def _needed(self, model: str) -> bool:
        return model in self._view.models.items and not self._view.active(model) and self._waiting(model) > 0

    def _instance_changed(
        self, _: str, old: cluster_pb2.InstanceRecord | None, new: cluster_pb2.InstanceRecord | None
    ) -> None:
        record = new or old
        if record is None:
            return
        if record.model in self._news:
            self._news[record.model].set()
        self.need(record.model)
        self._on_progress(record.model)

    def _leader_changed(self, *_: object) -> None:
        for news in self._news.values():
            news.set()

    async def _wake(self, model: str) -> None:
        news = self._news[model]
        try:
            while self._needed(model):
                news.clear()
                self._tell(model, await self._ask(model))
                # Asked again after a while: the placer may have changed its mind, or have a better estimate.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._retry_s):
                        await news.wait()
        finally:
            del self._tasks[model], self._news[model]
            self._statuses.pop(model, None)
            self._on_progress(model)

    def _tell(self, model: str, status: WakeStatus) -> None:
        before = self._statuses.get(model)
        self._statuses[model] = status
        if before is None or (before.state, before.reason) != (status.state, status.reason):
            _log.info(
                "model waits for an instance",
                model=model,
                state=inference_pb2.ProgressState.Name(status.state).removeprefix("PROGRESS_STATE_").lower(),
                reason=status.reason.text,
            )
        self._on_progress(model)

    async def _ask(self, model: str) -> WakeStatus:
        address = self._view.leader_address()
        if not address:
            return self._blocked(model, "no_placer", common_pb2.CAUSE_NO_PLACER, "no placer leads at the moment")
        stub = placement_pb2_grpc.PlacementServiceStub(self._channel_to(address))
        request = placement_pb2.WakeModelRequest(model=model, waiting_requests=self._waiting(model))
        try:
            answer = await stub.WakeModel(request, timeout=_CALL_S)
        except grpc.aio.AioRpcError as error:
            text = f"the placer at {address} did not take the wake: {error.details() or error.code().name}"
            lost = error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.FAILED_PRECONDITION)
            cause = common_pb2.CAUSE_NO_PLACER if lost else common_pb2.CAUSE_FAILURE
            return self._blocked(model, "failed", cause, text)
        if answer.state in (common_pb2.REPLICA_STATE_COLD, common_pb2.REPLICA_STATE_UNSPECIFIED):
            metrics.WAKES.labels(model, "blocked").inc()
            return WakeStatus(inference_pb2.PROGRESS_STATE_BLOCKED, answer.reason)
        metrics.WAKES.labels(model, "waking").inc()
        ready_at = time.monotonic() + answer.estimated_ms / 1000 if answer.HasField("estimated_ms") else None
        return WakeStatus(inference_pb2.PROGRESS_STATE_WAKING, answer.reason, ready_at)

    def _blocked(self, model: str, outcome: str, cause: common_pb2.Cause.ValueType, text: str) -> WakeStatus:
        metrics.WAKES.labels(model, outcome).inc()
        return WakeStatus(inference_pb2.PROGRESS_STATE_BLOCKED, common_pb2.Reason(cause=cause, text=text))

    def _channel_to(self, address: str) -> grpc.aio.Channel:
        if self._channel is None or self._address != address:
            old, self._channel, self._address = self._channel, channel(address), address
            if old is not None:  # calls to the old leader end first: closing would cancel whoever waits for them
                task = asyncio.create_task(old.close(2 * _CALL_S))
                self._closing.add(task)
                task.add_done_callback(self._closing.discard)
        return self._channel

    async def close(self) -> None:
        """Ends all wakes."""
        await end_tasks([*self._tasks.values(), *self._closing])
        if self._channel is not None:
            await self._channel.close(None)
