"""The parts of etcd that the placer follows."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from services.placer.records import Records
from warmserve.cluster.keys import Keys
from warmserve.cluster.mirror import Mirror
from warmserve.cluster.store import Store
from warmserve.v1 import cluster_pb2


class Mirrors:
    """Mirrors of all records that plans are made from, and of who leads."""

    def __init__(self, store: Store, keys: Keys) -> None:
        self.agents = Mirror(store, keys.agents(), cluster_pb2.AgentRecord)
        self.residency = Mirror(store, keys.residencies(), cluster_pb2.AgentResidency)
        self.instances = Mirror(store, keys.instances(), cluster_pb2.InstanceRecord)
        self.models = Mirror(store, keys.models(), cluster_pb2.ModelSpec)
        self.controls = Mirror(store, keys.controls(), cluster_pb2.AgentControl)
        self.forecasts = Mirror(store, keys.forecasts(), cluster_pb2.Forecast)
        self.mode = Mirror(store, keys.placer_mode(), cluster_pb2.PlacerMode)
        self.leader = Mirror(store, keys.placer_leader(), cluster_pb2.LeaderRecord)
        self._planned: list[Mirror[Any]] = [
            self.agents,
            self.residency,
            self.instances,
            self.models,
            self.controls,
            self.forecasts,
            self.mode,
        ]
        self._listeners: list[Callable[[], None]] = []
        for mirror in self._planned:
            mirror.on_change(self._changed)

    async def start(self) -> None:
        """Lists everything and begins to follow. Raises StoreUnavailableError."""
        await asyncio.gather(*(mirror.start() for mirror in (*self._planned, self.leader)))

    async def close(self) -> None:
        """Stops following."""
        await asyncio.gather(*(mirror.close() for mirror in (*self._planned, self.leader)))

    @property
    def connected(self) -> bool:
        """Whether all that plans are made from is up to date."""
        return all(mirror.connected for mirror in self._planned)

    @property
    def advisory(self) -> bool:
        """Whether an operator has said that plans are to be shown only."""
        mode = self.mode.items.get("")
        return mode is not None and mode.advisory

    @property
    def leader_address(self) -> str:
        """host:port of the leading placer; empty where none leads."""
        record = self.leader.items.get("")
        return record.address if record is not None else ""

    def records(self) -> Records:
        """Everything as it is now; later changes do not show in it."""
        return Records(
            agents=dict(self.agents.items),
            residency=dict(self.residency.items),
            instances=dict(self.instances.items),
            models=dict(self.models.items),
            controls=dict(self.controls.items),
            forecasts=dict(self.forecasts.items),
        )

    def on_any_change(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Has `listener` called after each change; returns what ends that."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def _changed(self, *_: object) -> None:
        for listener in self._listeners:
            listener()
