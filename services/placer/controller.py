"""The leader's loop: snapshot, plan, orders; at every tick, when a router asks, and when something has changed."""

from __future__ import annotations

import asyncio
import time

from prometheus_client import Gauge, Histogram
from redis.exceptions import RedisError

from services.common.queues import QueueCounts, RequestQueue
from services.common.telemetry import logger
from services.placer import planner
from services.placer import records as convert
from services.placer.decisions import Plan
from services.placer.memory import Memory
from services.placer.mirrors import Mirrors
from services.placer.orders import Orders
from services.placer.settings import PlacerSettings
from services.placer.snapshot import Key, Snapshot
from warmserve.cluster.keys import Keys
from warmserve.cluster.store import Store, StoreUnavailableError
from warmserve.v1 import cluster_pb2

_log = logger(__name__)
_COALESCE_S = 0.02  # changes that come together are answered by one plan
_REDIS_TIMEOUT_S = 1.0
_PLAN_SECONDS = Histogram(
    "warmserve_placer_plan_seconds", "Time to make a plan", buckets=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1)
)
_ACTIONS = Gauge("warmserve_placer_orders_in_progress", "Orders on their way")
_WAITING = Gauge("warmserve_placer_waiting_requests", "Requests that no instance has taken", ["model"])


class DeposedError(Exception):
    """Another placer leads."""


class Controller:
    """One leadership. `run` until it ends; `wake` meanwhile."""

    def __init__(
        self, settings: PlacerSettings, keys: Keys, store: Store, queue: RequestQueue, mirrors: Mirrors, fence: int
    ) -> None:
        self._settings = settings
        self._keys = keys
        self._store = store
        self._queue = queue
        self._mirrors = mirrors
        self._fence = fence
        self._memory = Memory()
        self._orders = Orders(self._memory, settings.order_timeout_s)
        self._counts: dict[str, QueueCounts] = {}
        self._told: dict[str, int] = {}  # waiting requests that routers told of, for the next decision
        self._askers: list[asyncio.Future[tuple[Snapshot, Plan]]] = []
        self._kick = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._published: cluster_pb2.Plan | None = None
        self._unsubscribe = mirrors.on_any_change(self._changed)

    async def run(self) -> None:
        """Decides and acts until cancelled. Raises DeposedError where etcd says that another leads."""
        while True:
            self._kick.clear()
            await self._round()
            try:
                async with asyncio.timeout(self._settings.tick_s):
                    await self._kick.wait()
            except TimeoutError:
                continue

    async def close(self) -> None:
        """Drops what is on its way, once `run` has ended."""
        self._unsubscribe()
        if self._timer is not None:
            self._timer.cancel()
        for asker in self._askers:
            if not asker.done():
                asker.set_exception(DeposedError())
        await self._orders.close()

    async def wake(self, model: str, waiting: int) -> tuple[Snapshot, Plan]:
        """Has a decision made that knows of the model's waiting requests. One decision answers all who ask meanwhile.

        Raises StoreUnavailableError while etcd is away, DeposedError where this leadership ends.
        """
        self._told[model] = max(waiting, 1, self._told.get(model, 0))
        asker: asyncio.Future[tuple[Snapshot, Plan]] = asyncio.get_running_loop().create_future()
        self._askers.append(asker)
        self._kick.set()
        return await asker

    def _changed(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_COALESCE_S, self._coalesced)

    def _coalesced(self) -> None:
        self._timer = None
        self._kick.set()

    async def _round(self) -> None:
        askers, self._askers = self._askers, []
        told, self._told = self._told, {}
        if not self._mirrors.connected:
            for asker in askers:
                if not asker.done():
                    asker.set_exception(StoreUnavailableError("nothing is placed anew until etcd answers"))
            return
        await self._count(told)
        snapshot, plan = self._decide()
        for asker in askers:
            if not asker.done():
                asker.set_result((snapshot, plan))
        await self._publish(plan)

    async def _count(self, told: dict[str, int]) -> None:
        names = list(self._mirrors.models.items)
        try:
            async with asyncio.timeout(_REDIS_TIMEOUT_S):
                self._counts = await self._queue.counts(names)
        except (RedisError, OSError, TimeoutError) as error:
            _log.warning("queues cannot be read; going on with the last counts", error=str(error))
        for name, waiting in told.items():
            known = self._counts.get(name, QueueCounts())
            self._counts[name] = QueueCounts(max(known.waiting, waiting), known.taken)
        for name in names:
            _WAITING.labels(name).set(self._counts.get(name, QueueCounts()).waiting)

    def _decide(self) -> tuple[Snapshot, Plan]:
        records = self._mirrors.records()
        shown = convert.replicas(records)
        self._orders.settle(shown, convert.failures(records), records.agents)
        expected = self._orders.apply(shown, self._pages(records))
        snapshot = self._memory.snapshot(
            records, expected, self._counts, self._settings.rules, time.monotonic(), time.time()
        )
        with _PLAN_SECONDS.time():
            plan = planner.plan(snapshot)
        self._orders.launch(plan.actions, records, self._fence)
        _ACTIONS.set(len(self._orders.actions))
        return snapshot, plan

    def _pages(self, records: convert.Records) -> dict[Key, int]:
        """Shard pages of the replicas that orders on their way make."""
        pages = {}
        for action in self._orders.actions:
            spec = records.models.get(action.model)
            sizes = [records.agents[a].page_bytes for a in action.group if a in records.agents]
            if spec is not None:
                pages[action.model, action.group] = max(
                    (-(-spec.facts.shard_bytes // size) for size in sizes if size), default=0
                )
        return pages

    async def _publish(self, plan: Plan) -> None:
        agents = self._mirrors.agents.items
        record = cluster_pb2.Plan(
            fence=self._fence,
            planner=planner.RULE,
            placer_id=self._settings.id,
            actions=[convert.action_record(action, agents) for action in self._orders.actions],
            outlooks=[convert.outlook_record(outlook) for outlook in plan.outlooks],
        )
        if record == self._published:
            return
        dated = cluster_pb2.Plan()
        dated.CopyFrom(record)
        dated.made_unix_ms = int(time.time() * 1e3)
        try:
            held = await self._store.put_if_held(self._keys.plan(), dated, self._keys.placer_leader(), self._fence)
        except StoreUnavailableError as error:
            _log.warning("the plan was not written", error=str(error))
            return
        if not held:
            raise DeposedError
        self._published = record
