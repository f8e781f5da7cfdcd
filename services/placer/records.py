"""What etcd holds, as the planner's values."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from services.placer.decisions import Action
from services.placer.snapshot import Agent, Key, Node, Quantiles, Replica, State, WindowLoad
from warmserve.v1 import cluster_pb2, common_pb2

_STATES = {
    common_pb2.REPLICA_STATE_WARMING: State.WARMING,
    common_pb2.REPLICA_STATE_WARM: State.WARM,
    common_pb2.REPLICA_STATE_ACTIVE: State.ACTIVE,
    common_pb2.REPLICA_STATE_DRAINING: State.DRAINING,
}


@dataclass(frozen=True)
class Records:
    """The records that plans are made from, each by its key under its prefix."""

    agents: Mapping[str, cluster_pb2.AgentRecord]
    residency: Mapping[str, cluster_pb2.AgentResidency]
    instances: Mapping[str, cluster_pb2.InstanceRecord]
    models: Mapping[str, cluster_pb2.ModelSpec]
    controls: Mapping[str, cluster_pb2.AgentControl]
    forecasts: Mapping[str, cluster_pb2.Forecast]

    @property
    def shards(self) -> Iterable[cluster_pb2.ResidentShard]:
        """All shards on agents that are registered."""
        for agent_id, residency in self.residency.items():
            if agent_id in self.agents:
                yield from residency.shards


def agents(records: Records) -> dict[str, Agent]:
    """The agents whose residency is known."""
    known = {}
    for agent_id, record in records.agents.items():
        residency = records.residency.get(agent_id)
        if residency is None or not record.page_bytes:
            continue
        control = records.controls.get(agent_id, cluster_pb2.AgentControl())
        known[agent_id] = Agent(
            id=agent_id,
            node=record.node,
            device_index=record.device_index,
            page_bytes=record.page_bytes,
            pages_total=record.pages_total,
            pages_kv=residency.pages_kv,
            cordoned=control.cordoned or control.drained or record.stopping,
            drained=control.drained and not record.stopping,  # one that stops drains itself
        )
    return known


def replicas(records: Records) -> dict[Key, Replica]:
    """The replicas that are not cold, put together from their shards."""
    shards: defaultdict[Key, list[cluster_pb2.ResidentShard]] = defaultdict(list)
    for shard in records.shards:
        if shard.state in _STATES:
            shards[shard.model, tuple(shard.group.agent_ids)].append(shard)
    return {key: _replica(records, key, parts) for key, parts in shards.items()}


def _replica(records: Records, key: Key, shards: list[cluster_pb2.ResidentShard]) -> Replica:
    model, group = key
    spec = records.models.get(model)
    pages = max(shard.pages_total for shard in shards)
    if spec is not None:  # an agent that has not looked at the image yet says 0
        sizes = [records.agents[shard_agent].page_bytes for shard_agent in group if shard_agent in records.agents]
        pages = max([pages, *(-(-spec.facts.shard_bytes // size) for size in sizes if size)])
    instance_ids = {shard.instance_id for shard in shards} - {""}
    slots = [r.slots for r in records.instances.values() if r.id in instance_ids]
    return Replica(
        model=model,
        group=group,
        state=_joint_state([_STATES[shard.state] for shard in shards], len(group)),
        shard_pages=pages,
        resident=min(shard.pages_resident for shard in shards) if len(shards) == len(group) else 0,
        kv_pages=max(shard.pages_kv for shard in shards),
        running=max(shard.running for shard in shards),
        slots=max(slots, default=0),
    )


def _joint_state(states: list[State], size: int) -> State:
    """The state of a replica whose shards are in these states; missing ones are cold."""
    if State.DRAINING in states:
        return State.DRAINING
    if State.WARMING in states or len(set(states)) > 1:
        return State.WARMING
    return State.WARMING if states[0] is State.ACTIVE and len(states) < size else states[0]


def nodes(records: Records, copy_bytes_per_s: float) -> dict[str, Node]:
    """The machines that agents are on, each with the bound on what is copied there at a time."""
    return {name: Node(name, copy_bytes_per_s) for name in {record.node for record in records.agents.values()}}


def order_pages(records: Records, actions: Iterable[Action]) -> dict[Key, int]:
    """Shard pages of the replicas that orders on their way make."""
    pages = {}
    for action in actions:
        spec = records.models.get(action.model)
        sizes = [records.agents[a].page_bytes for a in action.group if a in records.agents]
        if spec is not None:
            pages[action.model, action.group] = max(
                (-(-spec.facts.shard_bytes // size) for size in sizes if size), default=0
            )
    return pages


def failures(records: Records) -> dict[Key, str]:
    """Replicas whose last transition failed, with the agent's words."""
    return {
        (shard.model, tuple(shard.group.agent_ids)): shard.reason.text
        for shard in records.shards
        if shard.reason.cause == common_pb2.CAUSE_FAILURE
        and shard.state in (common_pb2.REPLICA_STATE_COLD, common_pb2.REPLICA_STATE_WARM)
    }


def windows(forecast: cluster_pb2.Forecast | None) -> tuple[WindowLoad, ...]:
    """A forecast as the planner takes it."""
    if forecast is None:
        return ()
    return tuple(
        WindowLoad(w.start_unix_s, w.start_unix_s + forecast.window_s, _quantiles(w.mean_load), _quantiles(w.peak_load))
        for w in forecast.windows
    )


def _quantiles(record: cluster_pb2.Quantiles) -> Quantiles:
    return Quantiles(record.p50, record.p90, record.p99)
