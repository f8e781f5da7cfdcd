"""What etcd holds, as the planner's values."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
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
            pages_promised=residency.pages_promised,
            cordoned=control.cordoned or control.drained or record.stopping,
            drained=control.drained and not record.stopping,  # one that stops drains itself
        )
    return known


def replicas(records: Records) -> dict[Key, Replica]:
    """The replicas that are not cold, put together from their shards."""
    slots = {record.id: record.slots for record in records.instances.values()}
    found: dict[Key, Replica] = {}
    shards: defaultdict[Key, list[cluster_pb2.ResidentShard]] = defaultdict(list)
    for shard in records.shards:
        state = _STATES.get(shard.state)
        if state is None:
            continue
        key = (shard.model, tuple(shard.group.agent_ids))
        if len(key[1]) == 1:  # most are: a wake waits for this, so they are not gone through again and again
            found[key] = _replica(records, key, state, (shard,), slots)
        else:
            shards[key].append(shard)
    for key, parts in shards.items():
        state = _joint_state([_STATES[shard.state] for shard in parts], len(key[1]))
        found[key] = _replica(records, key, state, parts, slots)
    return found


def _replica(
    records: Records,
    key: Key,
    state: State,
    shards: Sequence[cluster_pb2.ResidentShard],
    slots: Mapping[str, int],
) -> Replica:
    model, group = key
    spec = records.models.get(model)
    first, whole = shards[0], len(shards) == len(group)
    pages, resident = first.pages_total, first.pages_resident
    kv_pages, running = first.pages_kv, first.running
    for shard in shards[1:]:
        pages, resident = max(pages, shard.pages_total), min(resident, shard.pages_resident)
        kv_pages, running = max(kv_pages, shard.pages_kv), max(running, shard.running)
    if spec is not None:  # an agent that has not looked at the image yet says 0
        for agent_id in group:
            record = records.agents.get(agent_id)
            if record is not None and record.page_bytes:
                pages = max(pages, -(-spec.facts.shard_bytes // record.page_bytes))
    return Replica(
        model=model,
        group=group,
        state=state,
        shard_pages=pages,
        resident=resident if whole else 0,
        kv_pages=kv_pages,
        running=running,
        score=min(shard.score for shard in shards) if whole else None,
        slots=max((slots.get(shard.instance_id, 0) for shard in shards), default=0),
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
