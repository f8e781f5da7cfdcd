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
_GATHER_S = 0.01  # what happens within it is written at once
_CLOSE_S = 2.0
_RETRY_S = 0.5
_MOST_UNWRITTEN = 10_000  # events, while Redis is away; older ones are dropped
_PAGES = Gauge(
    "warmserve_gpu_agent_pages", "Pages of the arena; those lent are of weights, those promised free", ["use"]
)
_TRANSITIONS = Counter("warmserve_gpu_agent_transitions_total", "Changes of replicas' states", ["event"])
_TRANSITION_SECONDS = Histogram(
    "warmserve_gpu_agent_transition_seconds",
    "Time that what ended with the event took: warmed, woken, drained, evicted, cancelled, failed",
    ["event"],
    buckets=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100),
)
_TRANSITION_BYTES = Counter("warmserve_gpu_agent_transition_bytes_total", "Bytes copied or given back", ["event"])
_COPY_SPEED = Histogram(
    "warmserve_gpu_agent_copy_bytes_per_second",
    "Mean speed of each load's copy, by where it came from",
    ["tier"],
    buckets=(1e8, 3e8, 1e9, 2e9, 5e9, 1e10, 2e10, 3e10, 4e10, 5e10, 6e10, 1e11, 2e11, 4e11),
)
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
        kind = cluster_pb2.EventKind.Name(event.kind).removeprefix("EVENT_KIND_").lower()
        _TRANSITIONS.labels(kind).inc()
        _TRANSITION_BYTES.labels(kind).inc(event.bytes)
        if event.duration_ms:  # what only begins has taken no time yet
            _TRANSITION_SECONDS.labels(kind).observe(event.duration_ms / 1e3)
        if event.copy_ms:
            tier = common_pb2.Tier.Name(event.tier).removeprefix("TIER_").lower()
            _COPY_SPEED.labels(tier).observe(event.bytes / event.copy_ms * 1e3)
        if self._news.qsize() == _MOST_UNWRITTEN:
            self._news.get_nowait()  # the oldest
            self._news.task_done()
        self._news.put_nowait(event)

    async def close(self) -> None:
        """Writes what is left, as far as etcd and Redis answer soon."""
        self._dirty.set()
        try:
            async with asyncio.timeout(_CLOSE_S):
                await self._news.join()
        except TimeoutError:
            _log.warning("events lost, because Redis does not answer", events=self._news.qsize() + 1)
        await end_tasks(self._tasks)
        await self._write()

    async def _write_all(self) -> None:
        while True:
            try:
                async with asyncio.timeout(_LOOK_S):
                    await self._dirty.wait()
            except TimeoutError:
                # KV pages come and go without a word, and so do pages that are copied in.
                if self._moving(self.describe()) == self._moving(self._written):
                    continue
            # News come in bursts, and at the very moment when a first token is on its way through this thread.
            await asyncio.sleep(_GATHER_S)
            self._dirty.clear()
            await self._write()

    @staticmethod
    def _moving(residency: cluster_pb2.AgentResidency) -> tuple[int, ...]:
        return (
            residency.pages_free,
            residency.pages_kv,
            residency.pages_weights,
            residency.pages_promised,
            residency.host_tier.filling.bytes_done,
            *(image.bytes_done for image in residency.disk.preparing),
        )

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
            await self._tell(event)
            self._news.task_done()

    async def _tell(self, event: cluster_pb2.Event) -> None:
        """Appends an event, as soon as Redis is there; where only its answer was lost, the event is there twice."""
        while True:
            try:
                await self._events.append(event)
            except (RedisError, OSError) as error:
                _log.warning("events wait for Redis", waiting=self._news.qsize() + 1, error=str(error))
                await asyncio.sleep(_RETRY_S)
            else:
                return

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
