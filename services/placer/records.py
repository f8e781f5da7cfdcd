"""What etcd holds, as the planner's values."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

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


@dataclass(frozen=True)
class Seen:
    """What records show."""

    agents: dict[str, Agent]  # those whose residency is known
    replicas: dict[Key, Replica]  # those that are not cold, put together from their shards
    failures: dict[Key, str]  # replicas whose last transition failed, with the agent's words


@dataclass(frozen=True)
class _OfAgent:
    """What one agent's records show, and those records."""

    record: cluster_pb2.AgentRecord
    residency: cluster_pb2.AgentResidency
    control: cluster_pb2.AgentControl | None
    agent: Agent | None
    replicas: dict[Key, Replica]  # those that it holds alone
    instances: dict[Key, str]  # of those, where they have one
    shards: list[tuple[Key, cluster_pb2.ResidentShard]]  # of the others
    failures: dict[Key, str]

    def holds(
        self,
        record: cluster_pb2.AgentRecord,
        residency: cluster_pb2.AgentResidency,
        control: cluster_pb2.AgentControl | None,
    ) -> bool:
        """Whether it is of these."""
        return self.record is record and self.residency is residency and self.control is control


class View:
    """Records as the planner's values, made anew only for agents of which something has changed: wakes wait for it."""

    def __init__(self) -> None:
        self._known: dict[str, _OfAgent] = {}
        self._models: Mapping[str, cluster_pb2.ModelSpec] = {}

    def see(self, records: Records) -> Seen:
        """What these records show. A record that has changed is another object, and so is the mapping it is in."""
        if records.models is not self._models:
            self._known.clear()
            self._models = records.models
        known = self._known
        self._known = {}
        slots = {record.id: record.slots for record in records.instances.values()}
        seen = Seen({}, {}, {})
        parts: defaultdict[Key, list[cluster_pb2.ResidentShard]] = defaultdict(list)
        for agent_id, record in records.agents.items():
            residency, control = records.residency.get(agent_id), records.controls.get(agent_id)
            if residency is None:
                continue
            own = known.get(agent_id)
            if own is None or not own.holds(record, residency, control):
                own = _of_agent(records, record, residency, control)
            self._known[agent_id] = own
            if own.agent is not None:
                seen.agents[agent_id] = own.agent
            for key, instance in own.instances.items():
                offered = slots.get(instance, 0)
                if own.replicas[key].slots != offered:
                    own.replicas[key] = replace(own.replicas[key], slots=offered)
            seen.replicas.update(own.replicas)
            for key, shard in own.shards:
                parts[key].append(shard)
            seen.failures.update(own.failures)
        for key, shards in parts.items():
            state = _joint_state([_STATES[shard.state] for shard in shards], len(key[1]))
            offered = max(slots.get(shard.instance_id, 0) for shard in shards)
            seen.replicas[key] = replace(_replica(records, key, state, shards), slots=offered)
        return seen


def _of_agent(
    records: Records,
    record: cluster_pb2.AgentRecord,
    residency: cluster_pb2.AgentResidency,
    control: cluster_pb2.AgentControl | None,
) -> _OfAgent:
    found = _OfAgent(record, residency, control, _agent(record, residency, control), {}, {}, [], {})
    for shard in residency.shards:
        key, state = (shard.model, tuple(shard.group.agent_ids)), _STATES.get(shard.state)
        if state is not None and len(key[1]) == 1:
            found.replicas[key] = _replica(records, key, state, (shard,))
            if shard.instance_id:
                found.instances[key] = shard.instance_id
        elif state is not None:
            found.shards.append((key, shard))
        ended = shard.state in (common_pb2.REPLICA_STATE_COLD, common_pb2.REPLICA_STATE_WARM)
        if ended and shard.reason.cause == common_pb2.CAUSE_FAILURE:
            found.failures[key] = shard.reason.text
    return found


def _agent(
    record: cluster_pb2.AgentRecord, residency: cluster_pb2.AgentResidency, control: cluster_pb2.AgentControl | None
) -> Agent | None:
    if not record.page_bytes:
        return None
    cordoned, drained = (control.cordoned, control.drained) if control is not None else (False, False)
    return Agent(
        id=record.id,
        node=record.node,
        device_index=record.device_index,
        page_bytes=record.page_bytes,
        pages_total=record.pages_total,
        pages_kv=residency.pages_kv,
        pages_promised=residency.pages_promised,
        cordoned=cordoned or drained or record.stopping,
        drained=drained and not record.stopping,  # one that stops drains itself
    )


def _replica(
    records: Records,
    key: Key,
    state: State,
    shards: Sequence[cluster_pb2.ResidentShard],
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
