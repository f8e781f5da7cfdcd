"""Typed reading and writing of cluster state in etcd.

Values are protobuf JSON, so that `etcdctl get --prefix warmserve/` shows them to people. aetcd (asyncio descendant of
etcd3) does the calls; watching uses its generated stubs directly, because its own watcher does not notice a stream that
the server ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import aetcd
from aetcd import rpc
from google.protobuf import json_format
from google.protobuf.message import Message
from grpc.aio import AioRpcError

M = TypeVar("M", bound=Message)
T = TypeVar("T")

_CALL_TIMEOUT_S = 5
_CHANNEL_OPTIONS = {
    # While a watch or a call is open, by which mirrors notice that etcd is gone without a word. etcd closes
    # connections ("too_many_pings") that ping more often than every 5 s, or when no call is open at all.
    "grpc.keepalive_time_ms": 10_000,
    "grpc.keepalive_timeout_ms": 3_000,
    "grpc.keepalive_permit_without_calls": 0,
    "grpc.initial_reconnect_backoff_ms": 100,
    "grpc.max_reconnect_backoff_ms": 2_000,
    "grpc.max_receive_message_length": -1,  # a prefix is read whole, and a thousand forecasts exceed grpc's 4 MiB
}
_LEASE_GONE = "lease not found"
_CONNECTION_ERRORS = (aetcd.exceptions.ConnectionFailedError, aetcd.exceptions.ConnectionTimeoutError)


class StoreUnavailableError(ConnectionError):
    """No etcd endpoint answered, or the one that did refuses to work."""


class CompactedError(LookupError):
    """The changes that were asked for are compacted away."""


@dataclass(frozen=True)
class Entry(Generic[M]):
    """A value with its place in etcd's history."""

    key: str
    value: M
    create_revision: int
    mod_revision: int


@dataclass(frozen=True)
class Change:
    """One change under a watched prefix; `value` is None where the key was deleted."""

    key: str
    value: bytes | None
    create_revision: int
    mod_revision: int


def encode(message: Message) -> bytes:
    """A message as the JSON kept in etcd."""
    return json_format.MessageToJson(message, preserving_proto_field_name=True, indent=None).encode()


def decode(data: bytes, kind: type[M]) -> M:
    """The message in `data`; fields of newer versions are ignored. Raises ValueError where it is none of that kind."""
    try:
        return json_format.Parse(data, kind(), ignore_unknown_fields=True)
    except json_format.ParseError as error:
        raise ValueError(f"not a {kind.__name__}: {error}") from error


class Store:
    """etcd, with several endpoints: calls go to one, and to the next when it does not answer.

    All methods raise StoreUnavailableError when no endpoint answers, or etcd refuses (its disk is full, for example),
    and after `close`.
    """

    def __init__(self, endpoints: Sequence[str]) -> None:
        """`endpoints`: host:port of each etcd member. Nothing is contacted yet."""
        if not endpoints:
            raise ValueError("at least one etcd endpoint is needed")
        self._endpoints = [_split_endpoint(endpoint) for endpoint in endpoints]
        self._current = 0
        self._client: Any = None  # aetcd has no types
        self._closed = False

    async def _connected(self) -> aetcd.Client:
        if self._closed:
            raise StoreUnavailableError("this store is closed")
        client = self._client
        if client is None:
            host, port = self._endpoints[self._current]
            client = aetcd.Client(host=host, port=port, timeout=_CALL_TIMEOUT_S, options=_CHANNEL_OPTIONS)
            self._client = client
        await client.connect()
        return client

    async def _call(self, operation: Callable[[aetcd.Client], Awaitable[T]]) -> T:
        errors = []
        for _ in self._endpoints:
            client = await self._connected()
            try:
                return await operation(client)
            except _CONNECTION_ERRORS as error:
                host, port = self._endpoints[self._current]
                errors.append(f"{host}:{port}: {type(error).__name__}")
                if self._client is client and len(self._endpoints) > 1:  # nobody else has moved on yet
                    self._client = None
                    self._current = (self._current + 1) % len(self._endpoints)
                    await client.close()
            except asyncio.CancelledError:
                if _being_cancelled():
                    raise
                errors.append("the connection was given up")  # by another call, which goes on with the next endpoint
            except aetcd.exceptions.ClientError as error:
                if _LEASE_GONE in str(error):
                    raise LookupError(str(error)) from error
                # Among others where its disk is full: until somebody sees to it, etcd is as good as away.
                raise StoreUnavailableError(f"etcd refused: {error}") from error
        raise StoreUnavailableError("etcd does not answer (" + "; ".join(errors) + ")")

    async def get(self, key: str, kind: type[M]) -> Entry[M] | None:
        """The value at `key`, or None."""
        found = await self._call(lambda client: client.get(key.encode()))
        return None if found is None else _entry(found, kind)

    async def get_all(self, prefix: str, kind: type[M]) -> list[Entry[M]]:
        """All values under `prefix`, in order of key."""
        found = await self._call(lambda client: client.get_prefix(prefix.encode()))
        return sorted((_entry(item, kind) for item in found), key=lambda entry: entry.key)

    async def snapshot(self, prefix: str) -> tuple[list[Change], int]:
        """All raw values under `prefix`, and the revision at which they were read."""
        found = await self._call(lambda client: client.get_prefix(prefix.encode()))
        items = [Change(item.key.decode(), item.value, item.create_revision, item.mod_revision) for item in found]
        return items, found.header.revision

    async def put(self, key: str, message: Message, lease: int | None = None) -> None:
        """Writes a value, bound to `lease` where one is given. Raises LookupError where the lease is gone."""
        await self._call(lambda client: client.put(key.encode(), encode(message), lease=lease))

    async def create(self, key: str, message: Message, lease: int | None = None) -> int | None:
        """Writes a value only where there is none. Returns its revision, or None where another value is there.

        Raises LookupError where the lease is gone.
        """
        value = encode(message)

        async def transaction(client: aetcd.Client) -> int | None:
            parts = client.transactions
            _, responses = await client.transaction(
                compare=[parts.create(key.encode()) == 0],
                success=[parts.put(key.encode(), value, lease=lease), parts.get(key.encode())],
                failure=[parts.get(key.encode())],
            )
            [(stored, where)] = responses[-1]
            # Also where the comparison failed: a retry after a lost answer finds its own value.
            return int(where.create_revision) if stored == value and where.lease == (lease or 0) else None

        return await self._call(transaction)

    async def put_if_held(self, key: str, value: bytes, held_key: str, create_revision: int) -> bool:
        """Writes an encoded value only while `held_key` is the one created at `create_revision`: it fences leaders."""

        async def transaction(client: aetcd.Client) -> bool:
            parts = client.transactions
            ok, _ = await client.transaction(
                compare=[parts.create(held_key.encode()) == create_revision],
                success=[parts.put(key.encode(), value)],
                failure=[],
            )
            return bool(ok)

        return await self._call(transaction)

    async def replace(self, entry: Entry[M], message: M) -> bool:
        """Writes a value only where nobody has written or deleted the key since `entry` was read."""
        key, value = entry.key.encode(), encode(message)

        async def transaction(client: aetcd.Client) -> bool:
            parts = client.transactions
            ok, _ = await client.transaction(
                compare=[parts.mod(key) == entry.mod_revision],
                success=[parts.put(key, value)],
                failure=[],
            )
            return bool(ok)

        return await self._call(transaction)

    async def delete(self, key: str) -> bool:
        """Deletes a key. False where there was none."""
        return bool(await self._call(lambda client: client.delete(key.encode())))

    async def grant_lease(self, ttl_s: int) -> int:
        """A new lease's id."""
        lease = await self._call(lambda client: client.lease(ttl_s))
        return int(lease.id)

    async def refresh_lease(self, lease: int) -> bool:
        """Keeps a lease alive for another TTL. False where it has ended."""
        try:
            answer = await self._call(lambda client: client.refresh_lease(lease))
        except LookupError:
            return False
        return answer is not None and int(answer.TTL) > 0

    async def revoke_lease(self, lease: int) -> None:
        """Ends a lease, which deletes its keys. Nothing happens where it has ended already."""
        try:
            await self._call(lambda client: client.revoke_lease(lease))
        except LookupError:
            return  # ended already

    async def watch(self, prefix: str, after_revision: int) -> AsyncIterator[list[Change]]:
        """Changes under `prefix` later than `after_revision`, until the stream breaks.

        Raises StoreUnavailableError when it breaks, CompactedError (a LookupError) when those changes are compacted
        away: list anew then.
        """
        client = await self._connected()
        request = rpc.WatchRequest(
            create_request=rpc.WatchCreateRequest(
                key=prefix.encode(),
                range_end=aetcd.utils.prefix_range_end(prefix.encode()),
                start_revision=after_revision + 1,
            )
        )
        call = rpc.WatchStub(client.channel).Watch(metadata=client.metadata)
        try:
            await call.write(request)
            while (response := await call.read()) and hasattr(response, "events"):
                if response.compact_revision:
                    raise CompactedError(f"revision {after_revision} is compacted away")
                if response.canceled:
                    break
                if response.events:
                    yield [_change(event) for event in response.events]
        except (AioRpcError, asyncio.InvalidStateError) as error:
            raise StoreUnavailableError(f"etcd watch on {prefix} broke: {error}") from error
        except asyncio.CancelledError:
            if _being_cancelled():
                raise
            raise StoreUnavailableError(f"etcd watch on {prefix} broke: its connection was given up") from None
        finally:
            call.cancel()
        raise StoreUnavailableError(f"etcd ended the watch on {prefix}")

    async def ping(self) -> str:
        """The version of the etcd that answers."""
        status = await self._call(lambda client: client.status())
        return str(status.version)

    async def close(self) -> None:
        """Closes the connection."""
        self._closed = True
        if self._client is not None:
            client = self._client
            self._client = None
            await client.close()


def _being_cancelled() -> bool:
    """Whether the task is; grpc.aio raises CancelledError also where the call's channel was closed."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _split_endpoint(endpoint: str) -> tuple[str, int]:
    host, colon, port = endpoint.removeprefix("http://").rstrip("/").rpartition(":")
    if not colon or not host or not port.isdigit():
        raise ValueError(f"etcd endpoint {endpoint!r} is not host:port")
    return host, int(port)


def _entry(item: Any, kind: type[M]) -> Entry[M]:
    return Entry(item.key.decode(), decode(item.value, kind), item.create_revision, item.mod_revision)


def _change(event: Any) -> Change:
    deleted = event.type == event.DELETE
    kv = event.kv
    return Change(kv.key.decode(), None if deleted else kv.value, kv.create_revision, kv.mod_revision)
