"""Calls to agents, over connections that are made before they are needed: a wake must not wait for one."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import grpc

from services.common.grpc_frame import channel
from services.placer.decisions import Action, Do
from services.placer.published import group_record, reason_record
from services.placer.records import Records
from warmserve.v1 import agent_pb2, agent_pb2_grpc, cluster_pb2

Call = Any  # grpc.aio's unary call, of any answer


@dataclass(frozen=True)
class Sent:
    """An order on its way to one agent."""

    agent: str
    address: str
    call: Call


@dataclass
class AgentCalls:
    """Connections to all registered agents."""

    timeout_s: float
    _channels: dict[str, tuple[grpc.aio.Channel, Any]] = field(default_factory=dict)  # with stubs, by address
    _closing: set[asyncio.Task[None]] = field(default_factory=set)

    def connect(self, agents: Iterable[cluster_pb2.AgentRecord]) -> None:
        """Connects to those agents that are new, and drops the connections of those that are gone."""
        addresses = {agent.address for agent in agents}
        if addresses == self._channels.keys():
            return
        for address in addresses - self._channels.keys():
            self._connected(address)[0].get_state(try_to_connect=True)
        for address in self._channels.keys() - addresses:
            task = asyncio.create_task(self._channels.pop(address)[0].close(self.timeout_s), name=f"close {address}")
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    def send(self, action: Action, records: Records, fence: int) -> list[Sent]:
        """Sends an order to every agent of its group that is registered, at once: a wake waits for no turn."""
        addresses = [(a, records.agents[a].address) for a in action.group if a in records.agents]
        return [
            Sent(agent, address, _call(self._connected(address)[1], action, records, fence, self.timeout_s))
            for agent, address in addresses
        ]

    async def answers(self, sent: Iterable[Sent]) -> str:
        """What failed, or nothing, once all agents have answered."""
        return "; ".join(filter(None, await asyncio.gather(*map(_answer, sent))))

    async def close(self) -> None:
        """Closes all connections."""
        await asyncio.gather(*(open_channel.close() for open_channel, _ in self._channels.values()), *self._closing)
        self._channels.clear()

    def _connected(self, address: str) -> tuple[grpc.aio.Channel, Any]:
        if address not in self._channels:
            made = channel(address)
            self._channels[address] = made, agent_pb2_grpc.AgentServiceStub(made)
        return self._channels[address]


async def _answer(sent: Sent) -> str:
    try:
        await sent.call
    except grpc.aio.AioRpcError as error:
        return f"agent {sent.agent} at {sent.address}: {error.details() or error.code().name}"
    return ""


def _call(stub: Any, action: Action, records: Records, fence: int, timeout_s: float) -> Call:
    common: Mapping[str, Any] = {"reason": reason_record(action.reason), "fence": fence}
    match action.do:
        case Do.WAKE | Do.WARM:
            spec, group = records.models[action.model], group_record(action.group, records.agents)
            if action.do is Do.WAKE:
                wake = agent_pb2.WakeReplicaRequest(spec=spec, group=group, **common)
                return stub.WakeReplica(wake, timeout=timeout_s)
            warm = agent_pb2.WarmReplicaRequest(spec=spec, group=group, **common)
            return stub.WarmReplica(warm, timeout=timeout_s)
        case Do.DRAIN:
            return stub.DrainReplica(agent_pb2.DrainReplicaRequest(model=action.model, **common), timeout=timeout_s)
        case Do.EVICT:
            # A whisker less, so that rounding up to pages does not keep one more.
            keep = max(0.0, action.keep - 1e-9)
            evict = agent_pb2.EvictReplicaRequest(model=action.model, keep_residency=keep, **common)
            return stub.EvictReplica(evict, timeout=timeout_s)
