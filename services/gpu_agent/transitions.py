"""Shards' changes of state, and what is told of them."""

from __future__ import annotations

import time

from services.common.telemetry import logger
from services.gpu_agent.reports import Reports
from services.gpu_agent.shard import ACTIVE, COLD, DRAINING, WARM, Shard
from warmserve.v1 import cluster_pb2, common_pb2

_log = logger(__name__)

_BEGINNINGS = (cluster_pb2.EVENT_KIND_WARMING, cluster_pb2.EVENT_KIND_DRAINING, cluster_pb2.EVENT_KIND_WOKEN)


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
        kind: cluster_pb2.EventKind.ValueType | None,
    ) -> None:
        """The shard is in a state from now on; `kind` is the event to report, if any."""
        lasted_ms = shard.enter(state, reason)
        _log.info("transition", model=shard.name, state=common_pb2.ReplicaState.Name(state), reason=reason.text)
        if kind is not None:
            # What begins has taken no time yet; what ends a state has taken as long as that state lasted.
            self.event(shard, kind, 0.0 if kind in _BEGINNINGS else lasted_ms, 0)
        self._reports.changed()

    def rest(self, shard: Shard, reason: common_pb2.Reason, kind: cluster_pb2.EventKind.ValueType | None) -> None:
        """The shard is warm, or cold where none of its pages is resident."""
        self.enter(shard, WARM if shard.pages_resident else COLD, reason, kind)

    def failed(self, shard: Shard, error: Exception) -> None:
        """The shard is not what it was to become."""
        _log.error("did not become ready", model=shard.name, error=str(error))
        reason = common_pb2.Reason(cause=common_pb2.CAUSE_FAILURE, text=f"did not become ready: {error}")
        self.rest(shard, reason, cluster_pb2.EVENT_KIND_FAILED)

    def event(
        self,
        shard: Shard,
        kind: cluster_pb2.EventKind.ValueType,
        duration_ms: float,
        nbytes: int,
        reason: common_pb2.Reason | None = None,
    ) -> None:
        """Something happened to the shard, by default for the reason of its state."""
        self._reports.event(
            cluster_pb2.Event(
                unix_ms=int(time.time() * 1e3),
                kind=kind,
                model=shard.name,
                agent_ids=[self._id],
                reason=reason or shard.reason,
                duration_ms=duration_ms,
                bytes=nbytes,
            )
        )

    def instance(self, shard: Shard) -> None:
        """The shard's instance is there, or has another state."""
        assert shard.server is not None
        self._reports.instance(
            cluster_pb2.InstanceRecord(
                id=shard.server.instance_id,
                model=shard.name,
                group=shard.group,
                state=DRAINING if shard.state == DRAINING else ACTIVE,
                slots=shard.server.slots,
                started_unix_ms=int(shard.since * 1e3),
            )
        )

    def retired(self, shard: Shard, reason: common_pb2.Reason, kind: cluster_pb2.EventKind.ValueType) -> None:
        """Active or draining became warm, for the engine has let go."""
        assert shard.server is not None
        self._reports.instance_gone(shard.name, shard.server.instance_id)
        shard.server = None
        self.enter(shard, WARM, reason, kind)
