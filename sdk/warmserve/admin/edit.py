"""Changing a value in etcd so that nothing is lost when others change it at the same time."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from google.protobuf.message import Message

from warmserve.admin.target import CommandError
from warmserve.cluster.store import Store

M = TypeVar("M", bound=Message)
_TRIES = 20


async def edit(store: Store, key: str, kind: type[M], change: Callable[[M], None], absent: str) -> tuple[M, M]:
    """Changes the value at `key`: read, changed, and written only where it is still what was read; else again.

    Returns it as it was and as it is. Raises CommandError with the words `absent` where there is none, and where others
    change it all the while; StoreUnavailableError where etcd does not answer.
    """
    for _ in range(_TRIES):
        entry = await store.get(key, kind)
        if entry is None:
            raise CommandError(absent)
        changed = kind()
        changed.CopyFrom(entry.value)
        change(changed)
        if changed == entry.value or await store.replace(entry, changed):
            return entry.value, changed
    raise CommandError(f"{key} is changed by others all the time: nothing was written; try again")
