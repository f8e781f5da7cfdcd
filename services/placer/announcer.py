"""Events that only the placer knows of, and what undeployed models leave behind."""

from __future__ import annotations

import asyncio
import time
from collections import deque

from redis.exceptions import RedisError

from services.common.queues import RequestQueue
from services.common.telemetry import logger
from services.placer.mirrors import Mirrors
from warmserve.cluster.events import EventStream
from warmserve.v1 import cluster_pb2, common_pb2

_log = logger(__name__)
_RETRY_S = 0.5
_MOST_UNWRITTEN = 10_000  # while Redis is away; older ones are dropped


class Announcer:
    """While `leading`, writes events for agents that join or leave and models that go; drops gone models' queues.

    It follows changes from the start, so that a new leader knows what went while nobody led.
    """

    def __init__(self, mirrors: Mirrors, events: EventStream, queue: RequestQueue) -> None:
        self._mirrors = mirrors
        self._events = events
        self._queue = queue
        self._gone: set[str] = set()  # models whose queues are still there
        self._outbox: deque[cluster_pb2.Event] = deque(maxlen=_MOST_UNWRITTEN)
        self._unwritten = asyncio.Event()
        self._news = asyncio.Event()
        self.leading = False
        mirrors.models.on_change(self._model_changed)
        mirrors.agents.on_change(self._agent_changed)
        mirrors.on_any_change(self._news.set)

    def deployed(self, spec: cluster_pb2.ModelSpec) -> None:
        """A model was deployed by this placer."""
        text = f"{spec.name} was deployed from {spec.source}"
        self._put(cluster_pb2.EVENT_KIND_DEPLOYED, spec.name, [], common_pb2.CAUSE_DEPLOYED, text)

    async def write(self) -> None:
        """Writes events until cancelled; those left then are written by the next call."""
        while True:
            while self._outbox:
                try:
                    await self._events.append(self._outbox[0])
                    self._outbox.popleft()
                except (RedisError, OSError) as error:
                    _log.warning("event waits for Redis", error=str(error))
                    await asyncio.sleep(_RETRY_S)
            self._unwritten.clear()
            await self._unwritten.wait()

    async def drop_queues(self) -> None:
        """Deletes the queues of undeployed models once no instance reads them, until cancelled."""
        while True:
            self._news.clear()
            serving = {record.model for record in self._mirrors.instances.items.values()}
            again = None
            for model in sorted(self._gone - serving):
                try:
                    await self._queue.drop(model)
                except (RedisError, OSError) as error:
                    _log.warning("queues of an undeployed model are dropped later", model=model, error=str(error))
                    again = _RETRY_S
                else:
                    self._gone.discard(model)
            try:
                async with asyncio.timeout(again):
                    await self._news.wait()
            except TimeoutError:
                continue

    def _model_changed(self, name: str, _: cluster_pb2.ModelSpec | None, new: cluster_pb2.ModelSpec | None) -> None:
        if new is not None:
            self._gone.discard(name)
            return
        self._gone.add(name)
        self._put(cluster_pb2.EVENT_KIND_UNDEPLOYED, name, [], common_pb2.CAUSE_UNDEPLOYED, f"{name} was undeployed")

    def _agent_changed(
        self, agent_id: str, old: cluster_pb2.AgentRecord | None, new: cluster_pb2.AgentRecord | None
    ) -> None:
        if old is None and new is not None:
            text = f"agent {agent_id} joined on {new.node} with {new.pages_total} pages of {new.page_bytes} bytes"
            self._put(cluster_pb2.EVENT_KIND_AGENT_JOINED, "", [agent_id], common_pb2.CAUSE_UNSPECIFIED, text)
        elif old is not None and new is None:
            if old.stopping:
                cause, text = common_pb2.CAUSE_AGENT_STOPPING, f"agent {agent_id} stopped"
            else:
                cause, text = common_pb2.CAUSE_AGENT_LOST, f"agent {agent_id} was lost: its lease ended"
            self._put(cluster_pb2.EVENT_KIND_AGENT_LEFT, "", [agent_id], cause, text)

    def _put(
        self,
        kind: cluster_pb2.EventKind.ValueType,
        model: str,
        agent_ids: list[str],
        cause: common_pb2.Cause.ValueType,
        text: str,
    ) -> None:
        if not self.leading:
            return
        self._outbox.append(
            cluster_pb2.Event(
                unix_ms=int(time.time() * 1e3),
                kind=kind,
                model=model,
                agent_ids=agent_ids,
                reason=common_pb2.Reason(cause=cause, text=text),
            )
        )
        self._unwritten.set()
