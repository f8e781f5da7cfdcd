"""The cluster's state as etcd has it, all of it read at one revision."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from google.protobuf.message import Message

from warmserve.cluster.keys import Keys
from warmserve.cluster.store import Change, Store, decode
from warmserve.v1 import cluster_pb2

M = TypeVar("M", bound=Message)


@dataclass
class ClusterState:
    """What the services have written, by their ids."""

    models: dict[str, cluster_pb2.ModelSpec] = field(default_factory=dict)
    agents: dict[str, cluster_pb2.AgentRecord] = field(default_factory=dict)
    residency: dict[str, cluster_pb2.AgentResidency] = field(default_factory=dict)
    instances: dict[str, cluster_pb2.InstanceRecord] = field(default_factory=dict)
    """By model/id."""
    routers: dict[str, cluster_pb2.RouterRecord] = field(default_factory=dict)
    controls: dict[str, cluster_pb2.AgentControl] = field(default_factory=dict)
    forecasts: dict[str, cluster_pb2.Forecast] = field(default_factory=dict)
    forecasters: dict[str, cluster_pb2.ForecasterRecord] = field(default_factory=dict)
    calendar: dict[str, cluster_pb2.CalendarEntry] = field(default_factory=dict)
    """By model/id."""
    mode: cluster_pb2.PlacerMode | None = None
    plan: cluster_pb2.Plan | None = None
    leader: cluster_pb2.LeaderRecord | None = None
    unreadable: list[str] = field(default_factory=list)
    """Keys whose values are not what they should be, with what is wrong."""


async def read_state(store: Store, keys: Keys) -> ClusterState:
    """Reads everything. Raises StoreUnavailableError where etcd does not answer."""
    changes, _ = await store.snapshot(f"{keys.prefix}/")
    return parse_state(changes, keys)


def parse_state(changes: Iterable[Change], keys: Keys) -> ClusterState:
    """The state in raw values; what cannot be read is left out and named in `unreadable`."""
    changes = list(changes)
    state = ClusterState()

    def under(prefix: str, kind: type[M]) -> dict[str, M]:
        found = {}
        for change in changes:
            if change.key.startswith(prefix) and change.value is not None:
                try:
                    found[change.key.removeprefix(prefix)] = decode(change.value, kind)
                except ValueError as error:
                    state.unreadable.append(f"{change.key}: {error}")
        return dict(sorted(found.items()))

    state.models = under(keys.models(), cluster_pb2.ModelSpec)
    state.agents = under(keys.agents(), cluster_pb2.AgentRecord)
    state.residency = under(keys.residencies(), cluster_pb2.AgentResidency)
    state.instances = under(keys.instances(), cluster_pb2.InstanceRecord)
    state.routers = under(keys.routers(), cluster_pb2.RouterRecord)
    state.controls = under(keys.controls(), cluster_pb2.AgentControl)
    state.forecasts = under(keys.forecasts(), cluster_pb2.Forecast)
    state.forecasters = under(keys.forecasters(), cluster_pb2.ForecasterRecord)
    state.calendar = under(keys.calendars(), cluster_pb2.CalendarEntry)
    state.mode = under(keys.placer_mode(), cluster_pb2.PlacerMode).get("")
    state.plan = under(keys.plan(), cluster_pb2.Plan).get("")
    state.leader = under(keys.placer_leader(), cluster_pb2.LeaderRecord).get("")
    return state
