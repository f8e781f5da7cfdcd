"""Orders on their way to agents: sent once, in order, and taken into account until etcd shows what came of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from prometheus_client import Counter

from services.common.tasks import end_tasks
from services.common.telemetry import logger
from services.placer.accounting import Prewarms
from services.placer.backoff import Backoff
from services.placer.calls import AgentCalls, Sent
from services.placer.decisions import Action, Do
from services.placer.memory import Memory
from services.placer.records import Records
from services.placer.snapshot import Key, Replica, Snapshot, State

_log = logger(__name__)
_SETTLE_S = 3.0  # after an agent's answer: how long etcd may take to show it
_LOG_S = 0.01  # after which orders are logged: first they leave, and others that are asked for at the same time
_ORDERS = Counter("warmserve_placer_orders", "Orders sent to agents", ["kind", "outcome"])


@dataclass(eq=False)
class _Order:
    number: int
    action: Action
    copies: int  # bytes, of a load
    task: asyncio.Task[str]  # "" or what failed
    idle: bool  # nothing was in progress there when it was sent
    answered_at: float | None = None  # monotonic
    begun: bool = False  # etcd has shown it in progress
    shown: bool = False  # etcd has shown it carried out: what comes later is not its doing


@dataclass
class Orders:
    """All orders of one leadership. One order per replica at a time; a later one waits for the earlier one's answer."""

    memory: Memory
    calls: AgentCalls
    on_failure: Callable[[], None]  # called when an agent has refused an order or has not answered
    sent: int = 0  # orders so far
    _orders: dict[Key, _Order] = field(default_factory=dict)
    _prewarms: Prewarms = field(default_factory=Prewarms)
    _clearing: Backoff[tuple[Do, Key]] = field(default_factory=Backoff)  # drains and evictions that failed

    def launch(self, actions: Iterable[Action], snapshot: Snapshot, records: Records, fence: int) -> None:
        """Begins to carry out actions. What makes room on an agent is answered before what needs it is sent."""
        found = {replica.key: replica for replica in snapshot.replicas}
        refused = self._clearing.refused(time.monotonic())
        blocked: set[str] = set()  # agents on which no room can be made for now
        for action in actions:
            key = (action.model, action.group)
            before = self._orders.get(key)
            if before is not None and before.shown:
                before = None
            if before is not None and before.action.do is action.do and before.action.keep <= action.keep:
                continue
            if (action.do, key) in refused or (action.do in (Do.WAKE, Do.WARM) and blocked.intersection(action.group)):
                blocked.update(action.group)
                continue
            first = [before] if before is not None else []
            if action.do in (Do.WAKE, Do.WARM):
                first += [
                    order
                    for order in self._orders.values()
                    if order.action.do is Do.EVICT and not set(order.action.group).isdisjoint(action.group)
                ]
            asyncio.get_running_loop().call_later(_LOG_S, _tell, action)
            self._prewarms.ordered(action, found.get(key))
            name = f"{action.do.value} {action.model}"
            work = self._carry_out(action, records, fence, first) if first else self._send(action, records, fence)
            task = asyncio.create_task(work, name=name)
            self.sent += 1
            replica = found.get(key)
            idle = replica is None or replica.state is not State.WARMING
            self._orders[key] = _Order(self.sent, action, _copies(action, replica, records), task, idle)

    def unaffected(self, actions: Iterable[Action], since: int) -> list[Action]:
        """Those actions that have nothing to do with agents to which orders were sent after the first `since`."""
        touched = {a for order in self._orders.values() if order.number > since for a in order.action.group}
        left = list(actions)
        while lost := [action for action in left if not touched.isdisjoint(action.group)]:
            left = [action for action in left if touched.isdisjoint(action.group)]
            touched.update(agent_id for action in lost for agent_id in action.group)  # what they make room for, too
        return left

    @property
    def keys(self) -> Collection[Key]:
        """The replicas that orders on their way concern."""
        return self._orders.keys()

    @property
    def actions(self) -> list[Action]:
        """What is on its way, in the order it was decided."""
        return [order.action for order in self._orders.values()]

    def settle(self, shown: Mapping[Key, Replica], failures: Mapping[Key, str], agents: Iterable[str]) -> None:
        """Forgets orders whose outcome etcd shows, and remembers what failed."""
        present = set(agents)
        now = time.monotonic()
        self._prewarms.shown(shown)
        self._clearing.forget(lambda kind_and_key: kind_and_key[1] not in shown)
        for key, order in list(self._orders.items()):
            if present.isdisjoint(order.action.group):
                order.task.cancel()
                del self._orders[key]
                continue
            replica = shown.get(key)
            order.begun = order.begun or (replica is not None and replica.state is State.WARMING)
            order.shown = order.shown or _shown_done(order, replica)
            if order.task.done() and order.answered_at is None:
                order.answered_at = now
                error = order.task.result()
                if error and not _taken(order, replica):
                    self._failed(key, order, error, now)
                    continue
            if order.shown:
                if order.answered_at is not None:
                    self._succeeded(key, order)
                continue
            given_up = order.begun and (replica is None or replica.state is State.WARM)
            silent = order.answered_at is not None and now > order.answered_at + _SETTLE_S
            if given_up or (silent and not _in_progress(order, replica)):
                self._ended(key, order, failures, now)

    def apply(self, shown: Mapping[Key, Replica], pages: Mapping[Key, int]) -> list[Replica]:
        """The replicas as they will be. `pages`: the shard pages of replicas that etcd does not show yet."""
        expected = dict(shown)
        for key, order in self._orders.items():
            if order.shown:
                continue
            replica = expected.get(key)
            match order.action.do:
                case Do.EVICT if replica is not None:
                    keep = int(order.action.keep * replica.shard_pages + 0.5)
                    if keep:
                        expected[key] = replace(replica, state=State.WARM, resident=min(keep, replica.resident))
                    else:
                        del expected[key]
                case Do.DRAIN if replica is not None and replica.state is not State.WARM:
                    expected[key] = replace(replica, state=State.DRAINING)
                case Do.WARM if replica is None or replica.state is State.WARM:
                    expected[key] = replace(replica or _absent(key, pages), state=State.WARMING)
                case Do.WAKE if replica is None or replica.state is not State.ACTIVE:
                    expected[key] = replace(replica or _absent(key, pages), state=State.WAKING)
        return list(expected.values())

    async def close(self) -> None:
        """Drops all orders; what agents have taken they carry out."""
        await end_tasks(order.task for order in self._orders.values())
        self._orders.clear()
        await self.calls.close()

    def _succeeded(self, key: Key, order: _Order) -> None:
        del self._orders[key]
        if order.action.do in (Do.WAKE, Do.WARM):
            self.memory.succeeded(key)
        else:
            self._clearing.succeeded((order.action.do, key))
        if order.action.do is Do.WARM and order.copies:
            self._prewarms.warmed(key, order.copies)

    def _failed(self, key: Key, order: _Order, error: str, now: float) -> None:
        action = order.action
        _log.warning("order failed", kind=action.do.value, model=action.model, agents=action.group, error=error)
        if action.do in (Do.WAKE, Do.WARM):
            self.memory.failed(key, error, now)
        else:
            self._clearing.failed((action.do, key), error, now)
        del self._orders[key]

    def _ended(self, key: Key, order: _Order, failures: Mapping[Key, str], now: float) -> None:
        """Etcd shows that the order did not come to its end: it failed, or a later one of another leader undid it."""
        if key in failures:
            self._failed(key, order, failures[key], now)
        else:
            del self._orders[key]

    async def _carry_out(self, action: Action, records: Records, fence: int, first: list[_Order]) -> str:
        for order in first:
            await asyncio.wait([order.task])
            if order.action.do is Do.EVICT and not order.task.cancelled() and (error := order.task.result()):
                return f"no room was made: {error}"
        return await self._send(action, records, fence)

    def _send(self, action: Action, records: Records, fence: int) -> Coroutine[Any, Any, str]:
        """Sends an order now; what failed is told when it is awaited."""
        return self._answer(action, self.calls.send(action, records, fence))

    async def _answer(self, action: Action, sent: list[Sent]) -> str:
        error = await self.calls.answers(sent)
        _ORDERS.labels(action.do.value, "failed" if error else "taken").inc()
        if error:
            self.on_failure()
        return error


def _tell(action: Action) -> None:
    _log.info("order", kind=action.do.value, model=action.model, agents=action.group, reason=action.reason.text)


def _copies(action: Action, found: Replica | None, records: Records) -> int:
    """Bytes that carrying out an action copies, on all agents of its group."""
    if action.do not in (Do.WAKE, Do.WARM):
        return 0
    whole = records.models[action.model].facts.shard_bytes * len(action.group)
    return int(whole * (1 - found.residency)) if found is not None else whole


def _absent(key: Key, pages: Mapping[Key, int]) -> Replica:
    return Replica(key[0], key[1], State.WARMING, pages.get(key, 0), 0)


def _taken(order: _Order, replica: Replica | None) -> bool:
    """Whether etcd shows that the agent has taken the order, so that only its answer was lost.

    Of several agents one may have taken it and another not.
    """
    return len(order.action.group) == 1 and (order.shown or (order.idle and _in_progress(order, replica)))


def _shown_done(order: _Order, replica: Replica | None) -> bool:
    match order.action.do:
        case Do.EVICT:
            return replica is None or (
                order.action.keep > 0 and replica.resident <= order.action.keep * replica.shard_pages + 0.5
            )
        case Do.DRAIN:
            return replica is None or replica.state in (State.DRAINING, State.WARM)
        case Do.WARM:
            return replica is not None and (
                replica.state in (State.ACTIVE, State.DRAINING)
                or (replica.state is State.WARM and replica.residency == 1)
            )
        case Do.WAKE:
            return replica is not None and replica.state is State.ACTIVE


def _in_progress(order: _Order, replica: Replica | None) -> bool:
    """Whether etcd shows that the agent is still at it."""
    if replica is None or order.action.do not in (Do.WAKE, Do.WARM):
        return False
    return replica.state in (State.WARMING, State.DRAINING)
