"""What is lost is put back: agents, instances and Redis may go at any time, requests may not."""

from __future__ import annotations

import asyncio
import itertools
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping

from redis.asyncio import Redis

from services.common.queues import RequestQueue, Ticket
from services.common.tasks import end_tasks
from services.common.telemetry import logger
from services.router.dispatch import REDIS_ERRORS, Dispatcher
from services.router.relay import RelayStream
from services.router.request import Request
from services.router.view import ClusterView
from warmserve.v1 import cluster_pb2, common_pb2

_log = logger(__name__)
_REDIS_S = 5.0
_CHECKS_PER_LOOK = 10  # every so many checks it is looked for entries that are gone
_REMEMBER_S = 60.0  # a cut-off instance's last read from Redis may still be answered this long after its record ended


class Recovery:
    """Watches for losses and puts requests back.

    Running requests move when their agent's record ends or its token stream breaks. Waiting ones are put back when
    the instance that took their entry is gone, or when their entry is: Redis came back without it, or an agent dropped
    it, which could not reach this router.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        queue: RequestQueue,
        redis: Redis,
        view: ClusterView,
        need: Callable[[str], None],
        check_s: float,
    ) -> None:
        """`need(model)` has a model woken, where that is necessary; it is called for all that requests wait for."""
        self._dispatcher = dispatcher
        self._queue = queue
        self._redis = redis
        self._view = view
        self._need = need
        self._check_s = check_s
        self._gone: dict[str, dict[str, float]] = defaultdict(dict)  # model -> instance -> when it went
        self._missed: set[Ticket] = set()  # entries that were gone at the last look
        self._redis_run = ""  # changes when Redis is restarted or another one takes over
        self._task: asyncio.Task[None] | None = None
        view.agents.on_change(self._agent_changed)
        view.instances.on_change(self._instance_changed)
        dispatcher.on_stream_lost = self._stream_lost

    def start(self) -> None:
        """Begins the periodic check."""
        self._task = asyncio.create_task(self._check_for_ever(), name="recovery")

    async def close(self) -> None:
        """Ends it."""
        await end_tasks([self._task])

    def _agent_changed(
        self, agent_id: str, _: cluster_pb2.AgentRecord | None, new: cluster_pb2.AgentRecord | None
    ) -> None:
        if new is not None:
            return
        reason = common_pb2.Reason(cause=common_pb2.CAUSE_AGENT_LOST, text=f"agent {agent_id} is gone")
        for request in self._dispatcher.all():
            if agent_id in request.agent_ids and not request.ended:
                self._dispatcher.put_back(request, reason)

    def _instance_changed(
        self, _: str, old: cluster_pb2.InstanceRecord | None, new: cluster_pb2.InstanceRecord | None
    ) -> None:
        if new is not None:
            self._gone[new.model].pop(new.id, None)
        elif old is not None:
            self._gone[old.model][old.id] = asyncio.get_running_loop().time()
            self._dispatcher.spawn(self._check_entries(old.model, [old.id], exist=False))

    def _stream_lost(self, stream: RelayStream) -> None:
        # What the agent had taken but not yet reported, it has dropped as well.
        for model in self._dispatcher.models():
            ids = [item.id for item in self._view.instances_of(model) if stream.agent_id in item.group.agent_ids]
            if ids:
                self._dispatcher.spawn(self._check_entries(model, ids, exist=True))

    async def _check_entries(self, model: str, instance_ids: Collection[str], exist: bool) -> None:
        try:
            await self._put_back_lost(model, instance_ids, exist)
        except REDIS_ERRORS as error:
            self._dispatcher.queue_failed(error)  # all are checked when it is back

    async def _put_back_lost(self, model: str, instance_ids: Collection[str], exist: bool) -> None:
        """Puts back waiting requests that these instances hold, and with `exist` those whose entry is gone."""
        waiting = self._queued([model])
        if not waiting:
            return
        async with asyncio.timeout(_REDIS_S):
            held = set(await self._queue.held(model, instance_ids))
            missing = await self._queue.missing(waiting.keys() - held) if exist else set()
        self._put_back(waiting, held, common_pb2.CAUSE_AGENT_LOST, "the instance that had taken it is gone")
        self._put_back(waiting, missing, common_pb2.CAUSE_FAILURE, "its queue entry is gone")

    async def _look(self, models: Iterable[str]) -> None:
        """Puts back waiting requests whose entry is gone, and was at the last look.

        After one look alone the news that it runs, or has ended, may be on its way here.
        """
        waiting = self._queued(models)
        async with asyncio.timeout(_REDIS_S):
            missing = await self._queue.missing(waiting)
        self._put_back(waiting, missing & self._missed, common_pb2.CAUSE_FAILURE, "its queue entry is gone")
        self._missed = missing

    def _queued(self, models: Iterable[str]) -> dict[Ticket, Request]:
        requests = [request for model in models for request in self._dispatcher.waiting_of(model)]
        return {request.ticket: request for request in requests if request.ticket is not None}

    def _put_back(
        self, waiting: Mapping[Ticket, Request], lost: Collection[Ticket], cause: common_pb2.Cause.ValueType, text: str
    ) -> None:
        for ticket, request in waiting.items():  # the oldest first
            if ticket in lost and request.waiting and request.ticket is ticket:  # not taken or put back meanwhile
                self._dispatcher.put_back(request, common_pb2.Reason(cause=cause, text=text))

    async def _check_for_ever(self) -> None:
        try:
            self._redis_run = await self._run_of_redis()
        except REDIS_ERRORS as error:
            self._dispatcher.queue_failed(error)
        for number in itertools.count(1):
            await asyncio.sleep(self._check_s)
            self._forget_old()
            models = [model for model in self._dispatcher.models() if self._dispatcher.waiting_of(model)]
            if not models:
                continue
            for model in models:
                self._need(model)  # changes of the view have said so already, unless something went wrong
            try:
                await self._check(models)
                if number % _CHECKS_PER_LOOK == 0:
                    await self._look(models)
            except REDIS_ERRORS as error:
                self._dispatcher.queue_failed(error)

    async def _check(self, models: Iterable[str]) -> None:
        run = await self._run_of_redis()
        restarted = run != self._redis_run or bool(self._dispatcher.queue_error)
        for model in models:
            if restarted or self._gone.get(model):
                await self._put_back_lost(model, list(self._gone.get(model, ())), exist=restarted)
            for request in self._dispatcher.waiting_of(model):
                if request.ticket is None and not request.queueing:
                    await self._enqueue(request)
        if self._dispatcher.queue_error:
            _log.info("the queue answers again; waiting requests are in it")
        self._dispatcher.queue_error = ""
        self._redis_run = run

    async def _run_of_redis(self) -> str:
        async with asyncio.timeout(_REDIS_S):
            return str((await self._redis.info("server")).get("run_id"))

    async def _enqueue(self, request: Request) -> None:
        attempt = request.attempt
        await self._dispatcher.enqueue(request)
        if request.ticket is None and request.waiting and request.attempt == attempt:
            raise ConnectionError(self._dispatcher.queue_error)

    def _forget_old(self) -> None:
        now = asyncio.get_running_loop().time()
        for model, instances in list(self._gone.items()):
            for instance_id, since in list(instances.items()):
                if now - since > _REMEMBER_S:
                    del instances[instance_id]
            if not instances:
                del self._gone[model]
