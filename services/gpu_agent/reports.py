"""What the agent tells the cluster: residency and instances in etcd, events in Redis, metrics."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from prometheus_client import Counter, Gauge, Histogram
from redis.exceptions import RedisError

from services.common.session import Session
from services.common.tasks import begin_task, end_tasks
from services.common.telemetry import logger
from warmserve.cluster.events import EventStream
from warmserve.cluster.keys import Keys
from warmserve.v1 import cluster_pb2, common_pb2

_log = logger(__name__)
_LOOK_S = 1.0
_CLOSE_S = 2.0
_PAGES = Gauge(
    "warmserve_gpu_agent_pages", "Pages of the arena; those lent are of weights, those promised free", ["use"]
)
_TRANSITION_SECONDS = Histogram(
    "warmserve_gpu_agent_transition_seconds",
    "Time a transition took",
    ["event"],
    buckets=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100),
)
_TRANSITION_BYTES = Counter("warmserve_gpu_agent_transition_bytes_total", "Bytes copied or given back", ["event"])
_RESIDENT = Gauge(
    "warmserve_gpu_agent_residency", "Share of a model's weight pages that is resident", ["model", "state"]
)


class Reports:
    """Collects news without waiting and writes it in order, the newest residency only once where several came.

    What goes to etcd does not wait for Redis, nor the other way round.
    """

    def __init__(self, agent_id: str, session: Session, events: EventStream, keys: Keys) -> None:
        self._agent_id = agent_id
        self._session = session
        self._events = events
        self._keys = keys
        self._records: dict[str, cluster_pb2.InstanceRecord | None] = {}  # by key; None: delete
        self._news: asyncio.Queue[cluster_pb2.Event] = asyncio.Queue()
        self._written = cluster_pb2.AgentResidency()
        self._dirty = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self.describe: Callable[[], cluster_pb2.AgentResidency] = cluster_pb2.AgentResidency

    def start(self) -> None:
        """Begins to write."""
        self._tasks = [begin_task(self._write_all(), "reports"), begin_task(self._tell_all(), "events")]
        self.changed()

    def changed(self) -> None:
        """Something about the shards has changed."""
        self._dirty.set()

    def instance(self, record: cluster_pb2.InstanceRecord) -> None:
        """An instance is there, or has another state."""
        self._records[self._keys.instance(record.model, record.id)] = record
        self._dirty.set()

    def instance_gone(self, model: str, instance_id: str) -> None:
        """An instance is no more."""
        self._records[self._keys.instance(model, instance_id)] = None
        self._dirty.set()

    def event(self, event: cluster_pb2.Event) -> None:
        """Something happened."""
        kind = cluster_pb2.EventKind.Name(event.kind)
        _TRANSITION_SECONDS.labels(kind).observe(event.duration_ms / 1e3)
        _TRANSITION_BYTES.labels(kind).inc(event.bytes)
        self._news.put_nowait(event)

    async def close(self) -> None:
        """Writes what is left, as far as etcd and Redis answer soon."""
        self._dirty.set()
        try:
            async with asyncio.timeout(_CLOSE_S):
                await self._news.join()
        except TimeoutError:
            _log.warning("events lost, because Redis does not answer", events=self._news.qsize())
        await end_tasks(self._tasks)
        await self._write()

    async def _write_all(self) -> None:
        while True:
            try:
                async with asyncio.timeout(_LOOK_S):
                    await self._dirty.wait()
            except TimeoutError:
                # KV pages come and go without a word.
                if self._pages(self.describe()) == self._pages(self._written):
                    continue
            self._dirty.clear()
            await self._write()

    @staticmethod
    def _pages(residency: cluster_pb2.AgentResidency) -> tuple[int, ...]:
        return residency.pages_free, residency.pages_kv, residency.pages_weights, residency.pages_promised

    async def _write(self) -> None:
        # Instances first: a router that sees one may send, and one that sees none wakes.
        records, self._records = self._records, {}
        for key, record in records.items():
            if record is None:
                await self._session.delete(key)
            else:
                await self._session.put(key, record)
        residency = self.describe()
        self._measure(residency)
        self._written = residency
        await self._session.put(self._keys.residency(self._agent_id), residency)

    async def _tell_all(self) -> None:
        while True:
            event = await self._news.get()
            try:
                await self._events.append(event)
            except RedisError as error:
                _log.warning("event lost", kind=cluster_pb2.EventKind.Name(event.kind), error=str(error))
            self._news.task_done()

    def _measure(self, residency: cluster_pb2.AgentResidency) -> None:
        for use, pages in (
            ("free", residency.pages_free),
            ("kv", residency.pages_kv),
            ("weights", residency.pages_weights),
            ("lent", residency.pages_lent),
            ("promised", residency.pages_promised),
        ):
            _PAGES.labels(use).set(pages)
        _RESIDENT.clear()
        for shard in residency.shards:
            state = common_pb2.ReplicaState.Name(shard.state).removeprefix("REPLICA_STATE_").lower()
            _RESIDENT.labels(shard.model, state).set(shard.residency)
