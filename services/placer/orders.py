"""Orders on their way to agents: sent once, in order, and taken into account until etcd shows what came of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import grpc
from prometheus_client import Counter

from services.common.grpc_frame import channel
from services.common.tasks import end_tasks
from services.common.telemetry import logger
from services.placer.decisions import Action, Do
from services.placer.memory import Memory
from services.placer.records import Records, group_record, reason_record
from services.placer.snapshot import Key, Replica, State
from warmserve.v1 import agent_pb2, agent_pb2_grpc

_log = logger(__name__)
_SETTLE_S = 3.0  # after an agent's answer: how long etcd may take to show it
_ORDERS = Counter("warmserve_placer_orders", "Orders sent to agents", ["kind", "outcome"])


@dataclass(eq=False)
class _Order:
    action: Action
    task: asyncio.Task[str]  # "" or what failed
    answered_at: float | None = None  # monotonic
    begun: bool = False  # etcd has shown it in progress


@dataclass(frozen=True)
class _Context:
    """What an order is sent with, as it was when it was decided."""

    records: Records
    fence: int


@dataclass
class Orders:
    """All orders of one leadership. One order per replica at a time; a later one waits for the earlier one's answer."""

    memory: Memory
    timeout_s: float
    _orders: dict[Key, _Order] = field(default_factory=dict)
    _channels: dict[str, grpc.aio.Channel] = field(default_factory=dict)  # by address

    def launch(self, actions: Iterable[Action], records: Records, fence: int) -> None:
        """Begins to carry out actions. What makes room on an agent is answered before what needs it is sent."""
        context = _Context(records, fence)
        for action in actions:
            key = (action.model, action.group)
            before = self._orders.get(key)
            if before is not None and before.action.do is action.do and before.action.keep <= action.keep:
                continue
            first = [before] if before is not None else []
            if action.do in (Do.WAKE, Do.WARM):
                first += [
                    order
                    for order in self._orders.values()
                    if order.action.do is Do.EVICT and not set(order.action.group).isdisjoint(action.group)
                ]
            _log.info("order", kind=action.do.value, model=action.model, agents=action.group, reason=action.reason.text)
            task = asyncio.create_task(
                self._carry_out(action, context, first), name=f"{action.do.value} {action.model}"
            )
            self._orders[key] = _Order(action, task)

    @property
    def actions(self) -> list[Action]:
        """What is on its way, in the order it was decided."""
        return [order.action for order in self._orders.values()]

    def settle(self, shown: Mapping[Key, Replica], failures: Mapping[Key, str], agents: Iterable[str]) -> None:
        """Forgets orders whose outcome etcd shows, and remembers what failed."""
        present = set(agents)
        now = time.monotonic()
        for key, order in list(self._orders.items()):
            if present.isdisjoint(order.action.group):
                order.task.cancel()
                del self._orders[key]
                continue
            if order.task.done() and order.answered_at is None:
                order.answered_at = now
                if error := order.task.result():
                    self._failed(key, order, error, now)
                    continue
            replica = shown.get(key)
            order.begun = order.begun or (replica is not None and replica.state is State.WARMING)
            if _shown_done(order, replica):
                if order.answered_at is not None:
                    del self._orders[key]
                    if order.action.do in (Do.WAKE, Do.WARM):
                        self.memory.succeeded(key)
                continue
            given_up = order.begun and (replica is None or replica.state is State.WARM)
            silent = order.answered_at is not None and now > order.answered_at + _SETTLE_S
            if given_up or (silent and not _in_progress(order, replica)):
                self._ended(key, order, failures, now)

    def apply(self, shown: Mapping[Key, Replica], pages: Mapping[Key, int]) -> list[Replica]:
        """The replicas as they will be. `pages`: the shard pages of replicas that etcd does not show yet."""
        expected = dict(shown)
        for key, order in self._orders.items():
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
        return [expected[key] for key in sorted(expected)]

    async def close(self) -> None:
        """Drops all orders; what agents have taken they carry out."""
        await end_tasks(order.task for order in self._orders.values())
        self._orders.clear()
        for open_channel in self._channels.values():
            await open_channel.close()
        self._channels.clear()

    def _failed(self, key: Key, order: _Order, error: str, now: float) -> None:
        action = order.action
        _log.warning("order failed", kind=action.do.value, model=action.model, agents=action.group, error=error)
        if action.do in (Do.WAKE, Do.WARM):
            self.memory.failed(key, error, now)
        del self._orders[key]

    def _ended(self, key: Key, order: _Order, failures: Mapping[Key, str], now: float) -> None:
        """Etcd shows that the order did not come to its end: it failed, or a later one of another leader undid it."""
        if key in failures:
            self._failed(key, order, failures[key], now)
        else:
            del self._orders[key]

    async def _carry_out(self, action: Action, context: _Context, first: list[_Order]) -> str:
        for order in first:
            await asyncio.wait([order.task])
            if order.action.do is Do.EVICT and not order.task.cancelled() and (error := order.task.result()):
                return f"no room was made: {error}"
        addresses = [context.records.agents[a].address for a in action.group if a in context.records.agents]
        results = await asyncio.gather(*(self._send(action, context, address) for address in addresses))
        error = "; ".join(filter(None, results))
        _ORDERS.labels(action.do.value, "failed" if error else "taken").inc()
        return error

    async def _send(self, action: Action, context: _Context, address: str) -> str:
        if address not in self._channels:
            self._channels[address] = channel(address)
        stub = agent_pb2_grpc.AgentServiceStub(self._channels[address])
        try:
            await _call(stub, action, context, self.timeout_s)
        except grpc.aio.AioRpcError as error:
            return f"{address} refused to {action.do.value} {action.model}: {error.details() or error.code().name}"
        return ""


def _call(stub: Any, action: Action, context: _Context, timeout_s: float) -> Any:
    records, fence = context.records, context.fence
    reason = reason_record(action.reason)
    match action.do:
        case Do.WAKE | Do.WARM:
            spec, group = records.models[action.model], group_record(action.group, records.agents)
            if action.do is Do.WAKE:
                request = agent_pb2.WakeReplicaRequest(spec=spec, group=group, reason=reason, fence=fence)
                return stub.WakeReplica(request, timeout=timeout_s)
            return stub.WarmReplica(
                agent_pb2.WarmReplicaRequest(spec=spec, group=group, reason=reason, fence=fence), timeout=timeout_s
            )
        case Do.DRAIN:
            return stub.DrainReplica(
                agent_pb2.DrainReplicaRequest(model=action.model, reason=reason, fence=fence), timeout=timeout_s
            )
        case Do.EVICT:
            # A whisker less, so that rounding up to pages does not keep one more.
            keep = max(0.0, action.keep - 1e-9)
            return stub.EvictReplica(
                agent_pb2.EvictReplicaRequest(model=action.model, keep_residency=keep, reason=reason, fence=fence),
                timeout=timeout_s,
            )


def _absent(key: Key, pages: Mapping[Key, int]) -> Replica:
    return Replica(key[0], key[1], State.WARMING, pages.get(key, 0), 0)


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
