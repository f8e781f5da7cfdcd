"""The parts of etcd that the placer follows."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

from google.protobuf.message import Message

from services.placer.records import Records
from warmserve.cluster.keys import Keys
from warmserve.cluster.mirror import Mirror
from warmserve.cluster.store import Store
from warmserve.v1 import cluster_pb2

M = TypeVar("M", bound=Message)


class _Values(Generic[M]):
    """A mirror's values as they are now: another mapping only where they have changed, and never changed itself."""

    def __init__(self, mirror: Mirror[M]) -> None:
        self._mirror = mirror
        self._last: Mapping[str, M] | None = None
        mirror.on_change(self._changed)

    def __call__(self) -> Mapping[str, M]:
        if self._last is None:
            self._last = dict(self._mirror.items)
        return self._last

    def _changed(self, *_: object) -> None:
        self._last = None


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
        self._agents = _Values(self.agents)
        self._residency = _Values(self.residency)
        self._instances = _Values(self.instances)
        self._models = _Values(self.models)
        self._controls = _Values(self.controls)
        self._forecasts = _Values(self.forecasts)
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
        """Everything as it is now; later changes do not show in it. What has not changed is the same mapping again."""
        return Records(
            agents=self._agents(),
            residency=self._residency(),
            instances=self._instances(),
            models=self._models(),
            controls=self._controls(),
            forecasts=self._forecasts(),
        )

    def on_any_change(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Has `listener` called after each change; returns what ends that."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def _changed(self, *_: object) -> None:
        for listener in self._listeners:
            listener()
