"""Replicas on several agents whose shards have come apart: an order reached one agent and not another. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container
from dataclasses import dataclass, field

from services.placer.decisions import Action, Do, Reason
from services.placer.records import Records
from services.placer.snapshot import Key
from services.placer.words import names
from warmserve.v1 import cluster_pb2, common_pb2

_PATIENCE_S = 3.0  # shards change state one after another, and etcd shows it later
_MOVING = {common_pb2.REPLICA_STATE_WARMING, common_pb2.REPLICA_STATE_DRAINING}


@dataclass
class Mending:
    """Brings shards that have come apart together again, by taking away what one has and another has not."""

    _since: dict[Key, float] = field(default_factory=dict)  # monotonic

    def actions(self, records: Records, ordered: Container[Key], now: float) -> list[Action]:
        """What to do about replicas that have been in pieces for a while; those with orders on their way may wait."""
        broken = {key: action for key, action in _broken(records).items() if key not in ordered}
        self._since = {key: self._since.get(key, now) for key in broken}
        return [action for key, action in broken.items() if now >= self._since[key] + _PATIENCE_S]


def _broken(records: Records) -> dict[Key, Action]:
    shards: defaultdict[Key, list[cluster_pb2.ResidentShard]] = defaultdict(list)
    for shard in records.shards:
        if len(shard.group.agent_ids) > 1 and shard.state != common_pb2.REPLICA_STATE_COLD:
            shards[shard.model, tuple(shard.group.agent_ids)].append(shard)
    mended = {key: _mended(key, parts) for key, parts in shards.items()}
    return {key: action for key, action in mended.items() if action is not None}


def _mended(key: Key, shards: list[cluster_pb2.ResidentShard]) -> Action | None:
    """The action that makes the shards of a replica equal; None where they are, or are about to be."""
    model, group = key
    states = {shard.state for shard in shards}
    if states & _MOVING:
        return None
    whole = len(shards) == len(group)
    reason = Reason(common_pb2.CAUSE_FAILURE, f"its shards on {names(group)} differ: an order reached not all of them")
    if common_pb2.REPLICA_STATE_ACTIVE in states:
        return None if whole and len(states) == 1 else Action(Do.DRAIN, model, group, reason)
    if not whole:
        return Action(Do.EVICT, model, group, reason)
    least = min(shards, key=lambda shard: shard.pages_resident)
    if all(shard.pages_resident == least.pages_resident for shard in shards):
        return None
    return Action(Do.EVICT, model, group, reason, least.pages_resident / max(1, least.pages_total))
