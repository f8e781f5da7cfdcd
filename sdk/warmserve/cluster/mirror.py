"""A prefix of etcd kept in memory."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Generic, TypeVar

from google.protobuf.message import Message

from warmserve.cluster.store import Change, CompactedError, Store, StoreUnavailableError, decode

M = TypeVar("M", bound=Message)
OnChange = Callable[[str, "M | None", "M | None"], None]

_log = logging.getLogger(__name__)
_RETRY_S = 0.5


class Mirror(Generic[M]):
    """All values under one prefix: listed, then watched, and listed anew after any break.

    While etcd is away the last known values stay readable and `connected` is False. Keys are given without the prefix.
    """

    def __init__(self, store: Store, prefix: str, kind: type[M]) -> None:
        self._store = store
        self._prefix = prefix
        self._kind = kind
        self._items: dict[str, M] = {}
        self._create_revisions: dict[str, int] = {}
        self._listeners: list[OnChange[M]] = []
        self._changed = asyncio.Condition()
        self._task: asyncio.Task[None] | None = None
        self.connected = False

    @property
    def items(self) -> Mapping[str, M]:
        """The values by key, live: it changes as etcd does."""
        return MappingProxyType(self._items)

    def create_revision(self, key: str) -> int:
        """The revision at which the value at `key` was created; 0 where there is none."""
        return self._create_revisions.get(key, 0)

    def on_change(self, listener: OnChange[M]) -> None:
        """Has `listener(key, old, new)` called after each change; None stands for absence. It must not raise."""
        self._listeners.append(listener)

    async def start(self) -> None:
        """Lists the prefix and begins to watch. Raises StoreUnavailableError where etcd does not answer."""
        revision = await self._list()
        self._task = asyncio.create_task(self._follow(revision), name=f"mirror {self._prefix}")
        self._task.add_done_callback(self._ended)

    async def wait_for(self, condition: Callable[[Mapping[str, M]], bool]) -> None:
        """Returns once `condition(items)` holds."""
        async with self._changed:
            await self._changed.wait_for(lambda: condition(self._items))

    async def close(self) -> None:
        """Stops watching."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self.connected = False
        if not task.cancelled():
            _log.error("the mirror of %s ended", self._prefix, exc_info=task.exception())

    async def _follow(self, revision: int) -> None:
        while True:
            try:
                async for changes in self._store.watch(self._prefix, revision):
                    revision = max(revision, *(change.mod_revision for change in changes))
                    await self._apply(changes)
            except (StoreUnavailableError, CompactedError) as error:
                self.connected = False
                _log.debug("%s", error)
            revision = await self._list_when_back()

    async def _list_when_back(self) -> int:
        while True:
            try:
                return await self._list()
            except StoreUnavailableError:
                await asyncio.sleep(_RETRY_S)

    async def _list(self) -> int:
        changes, revision = await self._store.snapshot(self._prefix)
        present = {change.key for change in changes}
        gone = [Change(self._prefix + key, None, 0, 0) for key in self._items if self._prefix + key not in present]
        await self._apply(gone + changes)
        self.connected = True
        return revision

    async def _apply(self, changes: list[Change]) -> None:
        for change in changes:
            key = change.key.removeprefix(self._prefix)
            old = self._items.get(key)
            if change.value is None:
                new = None
                self._items.pop(key, None)
                self._create_revisions.pop(key, None)
            else:
                try:
                    new = decode(change.value, self._kind)
                except ValueError as error:
                    _log.warning("ignored the value at %s: %s", change.key, error)
                    continue
                self._items[key] = new
                self._create_revisions[key] = change.create_revision
            if old != new:
                for listener in self._listeners:
                    listener(key, old, new)
        async with self._changed:
            self._changed.notify_all()
