"""The cluster as this router sees it: models, agents, instances and residency mirrored from etcd."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable

from warmserve.cluster.keys import Keys
from warmserve.cluster.mirror import Mirror
from warmserve.cluster.store import Store
from warmserve.v1 import cluster_pb2, common_pb2

_READINESS = (
    common_pb2.REPLICA_STATE_COLD,
    common_pb2.REPLICA_STATE_WARMING,
    common_pb2.REPLICA_STATE_WARM,
    common_pb2.REPLICA_STATE_ACTIVE,
)


class ClusterView:
    """Mirrors of what a router needs. While etcd is away it shows the last known state."""

    def __init__(self, store: Store, keys: Keys) -> None:
        self.models = Mirror(store, keys.models(), cluster_pb2.ModelSpec)
        self.agents = Mirror(store, keys.agents(), cluster_pb2.AgentRecord)
        self.instances = Mirror(store, keys.instances(), cluster_pb2.InstanceRecord)
        self.residencies = Mirror(store, keys.residencies(), cluster_pb2.AgentResidency)
        self.leaders = Mirror(store, keys.placer_leader(), cluster_pb2.LeaderRecord)
        self._by_model: dict[str, dict[str, cluster_pb2.InstanceRecord]] = defaultdict(dict)
        self.instances.on_change(self._index)

    def _index(self, _: str, old: cluster_pb2.InstanceRecord | None, new: cluster_pb2.InstanceRecord | None) -> None:
        if old is not None:
            of_model = self._by_model[old.model]
            of_model.pop(old.id, None)
            if not of_model:
                del self._by_model[old.model]
        if new is not None:
            self._by_model[new.model][new.id] = new

    async def start(self) -> None:
        """Reads everything and begins to follow. Raises StoreUnavailableError where etcd does not answer."""
        for mirror in (self.models, self.agents, self.instances, self.residencies, self.leaders):
            await mirror.start()

    async def close(self) -> None:
        """Stops following."""
        mirrors = (self.models, self.agents, self.instances, self.residencies, self.leaders)
        await asyncio.gather(*(mirror.close() for mirror in mirrors))

    def instances_of(self, model: str) -> Iterable[cluster_pb2.InstanceRecord]:
        """The model's instances, draining ones too."""
        return self._by_model.get(model, {}).values()

    def active(self, model: str) -> bool:
        """Whether an instance takes requests of the model."""
        return any(item.state == common_pb2.REPLICA_STATE_ACTIVE for item in self.instances_of(model))

    def group_of(self, model: str, instance_id: str) -> frozenset[str]:
        """The agents of an instance; empty where it is not (yet, or any more) known."""
        record = self._by_model.get(model, {}).get(instance_id)
        return frozenset() if record is None else frozenset(record.group.agent_ids)

    def larger_instances(self, model: str, than: Collection[str]) -> list[str]:
        """Agents of the model's active instances that could have more KV than each of the instances `than`.

        An instance that has not said yet how much it could have is taken to have more.
        """
        known = {record.id: self._kv_bytes(record) for record in self.instances_of(model)}
        most = max((known.get(item) or 0 for item in than), default=0)
        return sorted(
            agent_id
            for record in self.instances_of(model)
            if record.state == common_pb2.REPLICA_STATE_ACTIVE and record.id not in than
            if (size := known[record.id]) is None or size > most
            for agent_id in record.group.agent_ids
        )

    def _kv_bytes(self, record: cluster_pb2.InstanceRecord) -> int | None:
        """What an instance's KV could grow to, on each of its agents; None where that is not known."""
        sizes = []
        for agent_id in record.group.agent_ids:
            agent, residency = self.agents.items.get(agent_id), self.residencies.items.get(agent_id)
            shards = residency.shards if residency is not None else ()
            pages = next((item.pages_kv_most for item in shards if item.instance_id == record.id), 0)
            if agent is None or not pages:
                return None
            sizes.append(pages * agent.page_bytes)
        return min(sizes, default=None)

    def leader_address(self) -> str:
        """host:port of the leading placer; empty where none leads."""
        record = self.leaders.items.get("")
        return "" if record is None else record.address

    def best_state(self, model: str) -> common_pb2.ReplicaState.ValueType:
        """The readiest of the model's replicas: COLD, WARMING, WARM or ACTIVE."""
        if self.active(model):
            return common_pb2.REPLICA_STATE_ACTIVE
        return best_replica_state(model, self.residencies.items.values())

    def on_model_gone(self, listener: Callable[[str], None]) -> None:
        """Has `listener(name)` called when a model is undeployed, or deployed anew in between."""

        def changed(name: str, old: cluster_pb2.ModelSpec | None, new: cluster_pb2.ModelSpec | None) -> None:
            if old is not None and (new is None or new.deployed_unix_ms != old.deployed_unix_ms):
                listener(name)

        self.models.on_change(changed)


def best_replica_state(
    model: str, residencies: Iterable[cluster_pb2.AgentResidency]
) -> common_pb2.ReplicaState.ValueType:
    """The best state of any replica, where a replica is as ready as its least ready shard. Pure.

    Shards that are active or draining count as warm: only an instance record makes a replica ready for requests.
    """
    shards: dict[tuple[str, ...], dict[str, int]] = defaultdict(dict)
    for residency in residencies:
        for shard in residency.shards:
            if shard.model == model:
                group = tuple(shard.group.agent_ids) or (residency.agent_id,)
                shards[group][residency.agent_id] = _rank(shard.state)
    best = 0
    for group, ranks in shards.items():
        ready = min(ranks.get(agent_id, 0) for agent_id in group)
        begun = 1 if any(ranks.values()) else 0
        best = max(best, ready, begun)
    return _READINESS[best]


def _rank(state: common_pb2.ReplicaState.ValueType) -> int:
    if state in (common_pb2.REPLICA_STATE_ACTIVE, common_pb2.REPLICA_STATE_DRAINING):
        return 2
    return _READINESS.index(state) if state in _READINESS else 0
