"""Shards' changes of state, and what is told of them."""

from __future__ import annotations

import time
from dataclasses import dataclass

from services.common.telemetry import logger
from services.gpu_agent.engine.pace import Pace
from services.gpu_agent.reports import Reports
from services.gpu_agent.shard import ACTIVE, COLD, DRAINING, WARM, WARMING, Shard
from warmserve.v1 import cluster_pb2, common_pb2

_log = logger(__name__)

_IN_PROGRESS = (WARMING, DRAINING)


@dataclass(frozen=True)
class Moved:
    """What a transition copied, or gave back: bytes, the seconds in which it copied them, and from where."""

    nbytes: int = 0
    copy_s: float = 0.0
    tier: common_pb2.Tier.ValueType = common_pb2.TIER_UNSPECIFIED


class Transitions:
    """Changes states and reports it: to etcd what is, to the cluster's events what happened."""

    def __init__(self, agent_id: str, reports: Reports) -> None:
        self._id = agent_id
        self._reports = reports

    def enter(
        self,
        shard: Shard,
        state: common_pb2.ReplicaState.ValueType,
        reason: common_pb2.Reason,
        kind: cluster_pb2.EventKind.ValueType,
        moved: Moved | None = None,
        took_ms: float | None = None,
    ) -> None:
        """The shard is in a state from now on; `kind` is the event to report.

        took_ms: by default as long as the state before lasted, if that was one on the way to another, and else nothing.
        """
        before = shard.state
        lasted_ms = shard.enter(state, reason)
        _log.info("transition", model=shard.name, state=common_pb2.ReplicaState.Name(state), reason=reason.text)
        if took_ms is None:
            took_ms = lasted_ms if before in _IN_PROGRESS else 0.0
        self._report(shard, kind, before, reason, moved or Moved(), took_ms)
        self._reports.changed()

    def rest(
        self,
        shard: Shard,
        reason: common_pb2.Reason,
        kind: cluster_pb2.EventKind.ValueType,
        moved: Moved | None = None,
        took_ms: float | None = None,
    ) -> None:
        """The shard is warm, or cold where none of its pages is resident."""
        self.enter(shard, WARM if shard.pages_resident else COLD, reason, kind, moved, took_ms)

    def failed(self, shard: Shard, error: Exception) -> None:
        """The shard is not what it was to become."""
        _log.error("did not become ready", model=shard.name, error=str(error))
        reason = common_pb2.Reason(cause=common_pb2.CAUSE_FAILURE, text=f"did not become ready: {error}")
        self.rest(shard, reason, cluster_pb2.EVENT_KIND_FAILED)

    def redirected(self, shard: Shard, reason: common_pb2.Reason, kind: cluster_pb2.EventKind.ValueType) -> None:
        """The shard goes on in its state, but for another reason, of which `kind` tells."""
        shard.reason = reason
        self._report(shard, kind, shard.state, reason, Moved(), 0.0)
        self._reports.changed()

    def lost_pages(self, shard: Shard, nbytes: int, reason: common_pb2.Reason) -> None:
        """So much of the shard's weights went to others."""
        kind, moved = cluster_pb2.EVENT_KIND_EVICTED, Moved(nbytes)
        if shard.state == WARM and not shard.pages_resident:
            self.enter(shard, COLD, reason, kind, moved)
        else:
            self._report(shard, kind, shard.state, reason, moved, 0.0)
            self._reports.changed()

    def instance(self, shard: Shard) -> None:
        """The shard's instance is there, has another state or another pace."""
        assert shard.server is not None
        self._reports.instance(
            cluster_pb2.InstanceRecord(
                id=shard.server.instance_id,
                model=shard.name,
                group=shard.group,
                state=DRAINING if shard.state == DRAINING else ACTIVE,
                slots=shard.server.slots,
                started_unix_ms=int(shard.active_since * 1e3),
                pace=_pace(shard.server.pace),
            )
        )

    def retired(self, shard: Shard, reason: common_pb2.Reason, kind: cluster_pb2.EventKind.ValueType) -> None:
        """Active or draining became warm, or cold where its weights were given up, for the engine has let go."""
        assert shard.server is not None
        self._reports.instance_gone(shard.name, shard.server.instance_id)
        shard.server = None
        self.rest(shard, reason, kind)

    def _report(
        self,
        shard: Shard,
        kind: cluster_pb2.EventKind.ValueType,
        before: common_pb2.ReplicaState.ValueType,
        reason: common_pb2.Reason,
        moved: Moved,
        took_ms: float,
    ) -> None:
        self._reports.event(
            cluster_pb2.Event(
                unix_ms=int(time.time() * 1e3),
                kind=kind,
                model=shard.name,
                agent_ids=[self._id],
                reason=reason,
                from_state=before,
                to_state=shard.state,
                duration_ms=took_ms,
                bytes=moved.nbytes,
                copy_ms=moved.copy_s * 1e3,
                tier=moved.tier,
            )
        )


def _pace(pace: Pace | None) -> cluster_pb2.Pace | None:
    if pace is None:
        return None
    return cluster_pb2.Pace(base_ms=pace.base_s * 1e3, per_sequence_ms=pace.per_sequence_s * 1e3)
