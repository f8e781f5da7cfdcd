"""The newest forecasts: in memory, in etcd, and to those who follow them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Iterable

from warmserve.cluster.keys import Keys
from warmserve.cluster.store import Store
from warmserve.v1 import cluster_pb2

_AT_ONCE = 32  # writes to etcd on their way at a time


class Publisher:
    """What was forecast last. Followers hear it at once; etcd when `flush` is called, and what it does not take is kept
    for the next call."""

    def __init__(self, store: Store, keys: Keys) -> None:
        self._store = store
        self._keys = keys
        self._unwritten: dict[str, cluster_pb2.Forecast | None] = {}  # None: to be deleted
        self._followers: set[_Follower] = set()
        self.newest: dict[str, cluster_pb2.Forecast] = {}

    def publish(self, forecast: cluster_pb2.Forecast) -> None:
        """Replaces the model's forecast."""
        self.newest[forecast.model] = forecast
        self._unwritten[forecast.model] = forecast
        for follower in self._followers:
            follower.tell(forecast)

    def withdraw(self, model: str) -> None:
        """Takes a model's forecast back."""
        self.newest.pop(model, None)
        self._unwritten[model] = None
        for follower in self._followers:
            follower.waiting.pop(model, None)

    async def withdraw_others(self, models: Collection[str]) -> None:
        """Takes back forecasts in etcd that outlived their models, because this process or etcd was away.

        Raises StoreUnavailableError.
        """
        prefix = self._keys.forecasts()
        found, _ = await self._store.snapshot(prefix)
        for model in {change.key.removeprefix(prefix) for change in found} - set(models):
            self.withdraw(model)

    async def flush(self) -> None:
        """Writes to etcd what it does not hold yet. Raises StoreUnavailableError where it has not taken all."""
        slots = asyncio.Semaphore(_AT_ONCE)
        results = await asyncio.gather(
            *(self._write(model, slots) for model in list(self._unwritten)), return_exceptions=True
        )
        for error in results:
            if error is not None:
                raise error

    async def _write(self, model: str, slots: asyncio.Semaphore) -> None:
        async with slots:
            forecast = self._unwritten[model]
            key = self._keys.forecast(model)
            if forecast is None:
                await self._store.delete(key)
            else:
                await self._store.put(key, forecast)
            if self._unwritten[model] is forecast:
                del self._unwritten[model]

    async def follow(self, models: Collection[str]) -> AsyncIterator[cluster_pb2.Forecast]:
        """The newest forecasts of these models, or of all, then each new one. Who is slow misses what is not the newest
        any more when they ask for the next."""
        follower = _Follower(models)
        self._followers.add(follower)
        try:
            for forecast in list(self.newest.values()):
                follower.tell(forecast)
            while True:
                yield await follower.next()
        finally:
            self._followers.discard(follower)


class _Follower:
    """One forecast per model waits for it at most, however slow it is."""

    def __init__(self, models: Iterable[str]) -> None:
        self._models = frozenset(models)
        self._news = asyncio.Event()
        self.waiting: dict[str, cluster_pb2.Forecast] = {}

    def tell(self, forecast: cluster_pb2.Forecast) -> None:
        """Has it wait for the follower, in place of an older one."""
        if not self._models or forecast.model in self._models:
            self.waiting[forecast.model] = forecast
            self._news.set()

    async def next(self) -> cluster_pb2.Forecast:
        """The forecast that has waited longest."""
        while not self.waiting:
            self._news.clear()
            await self._news.wait()
        return self.waiting.pop(next(iter(self.waiting)))
