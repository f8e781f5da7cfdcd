"""The leader's loop: snapshot, plan, orders, each tick and when something has changed; wakes are decided at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import replace

from prometheus_client import Gauge, Histogram
from redis.exceptions import RedisError

from services.common.queues import QueueCounts, RequestQueue
from services.common.telemetry import logger
from services.placer import planner
from services.placer import records as convert
from services.placer.calls import AgentCalls
from services.placer.decisions import Action, Do, Plan
from services.placer.memory import Memory
from services.placer.mending import Mending
from services.placer.mirrors import Mirrors
from services.placer.orders import Orders
from services.placer.planning import Planning, PlanningError
from services.placer.planning_frames import Publish
from services.placer.settings import PlacerSettings
from services.placer.snapshot import Node, Snapshot, State
from warmserve.cluster.keys import Keys
from warmserve.cluster.store import Store, StoreUnavailableError
from warmserve.v1 import cluster_pb2

_log = logger(__name__)
_COALESCE_S = 0.02  # changes that come together are answered together
_REST = 4  # times as long as planning took no plan is made, so that others have the processor; but at most:
_MOST_REST_S = 1.0
_PUBLISH_S = 0.2  # between plans written: they are for people, and etcd keeps every one for a while
_REDIS_TIMEOUT_S = 1.0
_PLAN_SECONDS = Histogram(
    "warmserve_placer_plan_seconds",
    "Time to decide: a whole plan, or a wake alone",
    ["of"],
    buckets=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3),
)
_WAKE_SECONDS = Histogram(
    "warmserve_placer_wake_seconds",
    "Time from a call of WakeModel until the orders that it takes are on their way, or wait for others to make room",
    buckets=(0.001, 0.002, 0.003, 0.004, 0.005, 0.007, 0.01, 0.02, 0.05, 0.1, 0.3, 1),
)
_ACTIONS = Gauge("warmserve_placer_orders_in_progress", "Orders on their way")
_WAITING = Gauge("warmserve_placer_waiting_requests", "Requests that no instance has taken", ["model"])
_ADVISORY = Gauge("warmserve_placer_advisory", "1 while plans are shown and not carried out")


class DeposedError(Exception):
    """Another placer leads."""


class Controller:
    """One leadership. `run` until it ends; `wake` meanwhile."""

    def __init__(
        self,
        settings: PlacerSettings,
        keys: Keys,
        store: Store,
        queue: RequestQueue,
        mirrors: Mirrors,
        planning: Planning,
        fence: int,
    ) -> None:
        self._settings = settings
        self._keys = keys
        self._store = store
        self._queue = queue
        self._mirrors = mirrors
        self._planning = planning
        self._fence = fence
        self._agents: Mapping[str, cluster_pb2.AgentRecord] = {}  # that are connected to
        self._nodes: Mapping[str, Node] = {}  # that they are on
        self._view = convert.View()
        self._memory = Memory()
        self._mending = Mending()
        self._orders = Orders(self._memory, AgentCalls(settings.order_timeout_s), self._changed)
        self._counts: dict[str, QueueCounts] = {}
        self._shown_waiting: dict[str, int] = {}  # by metrics
        self._told: dict[str, int] = {}  # waiting requests that routers told of, until Redis is asked next
        self._asked: dict[str, int] = {}  # waiting requests that routers ask for, by model, until that is decided
        self._decision: asyncio.Task[tuple[Snapshot, Plan]]  # about them
        self._kick = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._published = b""  # digest of the plan that etcd has
        self._publish_again: asyncio.TimerHandle | None = None  # set while it is too early to write another
        self._unpublished = False  # one waits for that
        self._closed = False
        self._unsubscribe = mirrors.on_any_change(self._changed)

    @property
    def advisory(self) -> bool:
        """Whether plans are shown only."""
        return self._settings.advisory or self._mirrors.advisory

    async def run(self) -> None:
        """Decides and acts until cancelled. Raises DeposedError where etcd says that another leads."""
        while True:
            self._kick.clear()
            if self._mirrors.connected:  # else nothing is placed anew until etcd answers
                await asyncio.sleep(min(_MOST_REST_S, self._settings.tick_s, _REST * await self._round()))
            try:
                async with asyncio.timeout(self._settings.tick_s):
                    await self._kick.wait()
            except TimeoutError:
                continue

    async def close(self) -> None:
        """Drops what is on its way, once `run` has ended."""
        self._closed = True
        self._unsubscribe()
        for timer in (self._timer, self._publish_again):
            if timer is not None:
                timer.cancel()
        _WAITING.clear()  # whoever leads next tells
        await self._orders.close()

    async def wake(self, model: str, waiting: int) -> tuple[Snapshot, Plan]:
        """Decides about a deployed model's waiting requests, orders what that takes, and tells what was decided.

        Neither Redis, whose last counts it takes, nor a plan in the making is waited for. Calls that come together are
        decided together. A whole plan follows. Raises StoreUnavailableError while etcd is away, DeposedError once this
        leadership has ended.
        """
        if self._closed:
            raise DeposedError
        if not self._mirrors.connected:
            raise StoreUnavailableError("nothing is placed anew until etcd answers")
        began = time.monotonic()
        first = not self._asked
        self._asked[model] = max(waiting, 1, self._asked.get(model, 0))
        if first:
            self._decision = asyncio.create_task(self._decide_asked(), name="wakes")
        decided = await asyncio.shield(self._decision)
        _WAKE_SECONDS.observe(time.monotonic() - began)
        return decided

    async def _decide_asked(self) -> tuple[Snapshot, Plan]:
        """Decides about what was asked in one turn of the loop."""
        asked, self._asked = self._asked, {}
        if self._closed:
            raise DeposedError
        for model, waiting in asked.items():
            self._told[model] = max(waiting, self._told.get(model, 0))
        decided = self._decide_wakes(*asked)
        self._changed()
        return decided

    def _decide_wakes(self, *models: str) -> tuple[Snapshot, Plan]:
        """What requests that wait need, without a whole plan; with the outlooks of some models."""
        records, snapshot = self._look()
        with _PLAN_SECONDS.labels("wake").time():
            plan = planner.wake(snapshot, *models)
        if not self.advisory:
            self._orders.launch(plan.actions, snapshot, records, self._fence)
        return snapshot, plan

    def _changed(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_COALESCE_S, self._coalesced)

    def _coalesced(self) -> None:
        self._timer = None
        on_their_way = {action.model for action in self._orders.actions if action.do is Do.WAKE}
        counts = _at_least(self._counts, self._told)
        waiting = [name for name, count in counts.items() if count.waiting and name not in on_their_way]
        if waiting and self._mirrors.connected:  # one has drained, for example, and makes room for the next
            self._decide_wakes()
        self._kick.set()

    def _may_publish(self) -> None:
        self._publish_again = None
        if self._unpublished:
            self._unpublished = False
            self._kick.set()

    async def _round(self) -> float:
        """Counts, plans, orders and publishes. Returns how long planning took, in seconds."""
        await self._count()
        records, snapshot = self._look()
        mending = self._mending.actions(records, self._orders.keys, time.monotonic())
        if mending and not self.advisory:
            self._orders.launch(mending, snapshot, records, self._fence)
            records, snapshot = self._look()
        sent = self._orders.sent
        began = time.monotonic()
        try:
            actions = await self._planning.plan(snapshot)  # wakes are decided meanwhile
        except PlanningError as error:
            _log.error("no plan was made; the next tick makes one", error=str(error))
            return self._settings.tick_s
        planning_s = time.monotonic() - began
        _PLAN_SECONDS.labels("plan").observe(planning_s)
        proposed: list[Action] = []
        if self.advisory:
            proposed = actions
        else:
            self._orders.launch(self._orders.unaffected(actions, since=sent), snapshot, records, self._fence)
        _ADVISORY.set(self.advisory)
        _ACTIONS.set(len(self._orders.actions))
        await self._publish(proposed)
        return planning_s

    async def _count(self) -> None:
        told, names = dict(self._told), list(self._mirrors.models.items)
        try:
            async with asyncio.timeout(_REDIS_TIMEOUT_S):
                counts = await self._queue.counts(names)
        except (RedisError, OSError, TimeoutError) as error:
            _log.warning("queues cannot be read; going on with the last counts", error=str(error))
        else:  # what was told before is counted now
            self._counts = {name: count for name, count in counts.items() if count.waiting or count.taken}
            self._told = {name: count for name, count in self._told.items() if told.get(name) != count}
        waiting = {name: self._counts.get(name, QueueCounts()).waiting for name in names}
        for name in self._shown_waiting.keys() - waiting.keys():  # undeployed
            _WAITING.remove(name)
        for name, count in waiting.items() - self._shown_waiting.items():
            _WAITING.labels(name).set(count)
        self._shown_waiting = waiting

    def _look(self) -> tuple[convert.Records, Snapshot]:
        """The cluster as it is now, with the orders on their way."""
        records = self._mirrors.records()
        if records.agents is not self._agents:
            self._agents = records.agents
            self._orders.calls.connect(records.agents.values())
            self._nodes = convert.nodes(records, self._settings.node_copy_bytes_per_s)
        seen = self._view.see(records)
        shown = seen.replicas
        self._orders.settle(shown, seen.failures, records.agents)
        if told := self._told:
            for model in {r.model for r in shown.values() if r.model in told and r.state is State.ACTIVE}:
                del told[model]  # its requests are in Redis, and taken from there
        snapshot = self._memory.snapshot(
            records,
            seen.agents,
            self._orders.apply(shown, convert.order_pages(records, self._orders.actions)),
            _at_least(self._counts, self._told),
            self._settings.rules,
            time.monotonic(),
            time.time(),
        )
        return records, replace(snapshot, nodes=self._nodes)

    async def _publish(self, proposed: list[Action]) -> None:
        """Writes the last plan where it says anything new; `proposed`: actions that are not carried out."""
        if self._publish_again is not None:
            self._unpublished = True
            return
        measured, models = self._memory.measured, self._mirrors.models.items
        wish = Publish(
            self._fence,
            self._settings.id,
            self.advisory,
            [*self._orders.actions, *proposed],
            {name: measured.capacity(spec) for name, spec in models.items()},
            self._published,
        )
        try:
            published = await self._planning.publish(wish)
        except PlanningError as error:
            _log.error("the plan was not written", error=str(error))
            return
        if published is None:
            return
        self._publish_again = asyncio.get_running_loop().call_later(_PUBLISH_S, self._may_publish)
        try:
            leader = self._keys.placer_leader()
            held = await self._store.put_if_held(self._keys.plan(), published.value, leader, self._fence)
        except StoreUnavailableError as error:
            _log.warning("the plan was not written", error=str(error))
            return
        if not held:
            raise DeposedError
        self._published = published.digest


def _at_least(counts: dict[str, QueueCounts], told: dict[str, int]) -> dict[str, QueueCounts]:
    """Counts, with at least as many waiting as routers told of."""
    known = dict(counts)
    for name, waiting in told.items():
        count = known.get(name, QueueCounts())
        known[name] = QueueCounts(max(count.waiting, waiting), count.taken)
    return known
