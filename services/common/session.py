"""A process's life in etcd: a lease, the records bound to it, and leadership.

After etcd's `client/v3/concurrency` recipes (sessions and elections).
"""

from __future__ import annotations

import asyncio
import time

from google.protobuf.message import Message

from services.common.tasks import begin_task, end_tasks
from services.common.telemetry import logger
from warmserve.cluster.store import Change, Store, StoreUnavailableError

_log = logger(__name__)
_RETRY_S = 0.5


class Session:
    """A lease that is kept alive, and the records that end with it.

    When the lease is lost (this process or etcd stood still too long), or a write has failed, a new one is taken as
    soon as etcd answers and every record is written again, before the old lease is ended: who watches sees no record
    go that is still there. `lost` is set from the moment the lease may have ended until it is renewed.
    """

    def __init__(self, store: Store, ttl_s: int) -> None:
        self.store = store
        self.lost = asyncio.Event()
        self._ttl_s = ttl_s
        self._lease = 0
        self._left: list[int] = []  # leases that were left for another, not yet ended
        self._records: dict[str, Message] = {}
        self._failed = False  # a write has failed since the lease was taken
        self._task: asyncio.Task[None] | None = None

    @property
    def lease(self) -> int:
        """The current lease's id."""
        return self._lease

    async def start(self) -> None:
        """Takes the lease. Raises StoreUnavailableError where etcd does not answer."""
        self._lease = await self.store.grant_lease(self._ttl_s)
        self._task = begin_task(self._keep_alive(), "lease keep-alive")

    async def put(self, key: str, message: Message) -> None:
        """Writes a record that lives as long as this process. Where etcd is away it is written when it returns."""
        self._records[key] = message
        try:
            await self._write(key)
        except (StoreUnavailableError, LookupError) as error:
            _log.warning("record will be written when etcd is back", key=key, error=str(error))
            self._renew_soon()

    async def delete(self, key: str) -> None:
        """Deletes a record."""
        self._records.pop(key, None)
        try:
            await self._write(key)
        except (StoreUnavailableError, LookupError) as error:
            # The old lease still holds the key; a new lease leaves it behind.
            _log.warning("record will be gone with the old lease", key=key, error=str(error))
            self._renew_soon()

    async def close(self) -> None:
        """Ends the lease, and with it all records."""
        await end_tasks([self._task])
        try:
            await self.store.revoke_lease(self._lease)
        except StoreUnavailableError:
            return  # it ends by itself
        finally:
            self.lost.set()

    async def _write(self, key: str) -> None:
        """Makes etcd hold what the records say, also where they change while it is being told."""
        while True:
            message = self._records.get(key)
            if message is None:
                await self.store.delete(key)
            else:
                await self.store.put(key, message, lease=self._lease)
            if self._records.get(key) is message:
                return

    def _renew_soon(self) -> None:
        self._failed = True
        self.lost.set()

    async def _keep_alive(self) -> None:
        renewed = time.monotonic()
        while True:
            if not self.lost.is_set():
                left = max(renewed + self._ttl_s - time.monotonic(), 0)
                try:
                    # Waking early when a write failed, else at a third of the TTL, or when the lease may end.
                    async with asyncio.timeout(min(self._ttl_s / 3, left)):
                        await self.lost.wait()
                except TimeoutError:
                    renewed = await self._refresh(renewed)
            if self.lost.is_set():
                await self._start_anew()
                renewed = time.monotonic()

    async def _refresh(self, renewed: float) -> float:
        asked = time.monotonic()
        try:
            async with asyncio.timeout(renewed + self._ttl_s - asked):
                if await self.store.refresh_lease(self._lease):
                    return asked
            _log.warning("lease ended; registering again")
            self.lost.set()
        except TimeoutError:
            _log.warning("etcd has been away for longer than the lease lives")
            self.lost.set()
        except StoreUnavailableError as error:
            _log.warning("lease not renewed", error=str(error))
        return renewed

    async def _start_anew(self) -> None:
        while True:
            self._failed = False
            try:
                lease = await self.store.grant_lease(self._ttl_s)
                self._left.append(self._lease)
                self._lease = lease
                for key in list(self._records):
                    await self._write(key)
                while self._left:  # with what is still theirs: records that are deleted, leadership
                    await self.store.revoke_lease(self._left[-1])
                    self._left.pop()
            except (StoreUnavailableError, LookupError):
                await asyncio.sleep(_RETRY_S)
                continue
            if self._failed:  # another write, meanwhile
                continue
            self.lost.clear()
            _log.info("registered again", records=len(self._records))
            return


class Election:
    """One leader among processes that campaign for the same key."""

    def __init__(self, session: Session, key: str, record: Message) -> None:
        self._session = session
        self._key = key
        self._record = record

    async def campaign(self) -> int:
        """Waits until this process leads. Returns the fence: the revision of its election, higher than any before.

        It leads until `session.lost` is set; orders carry the fence, so that a late one of an old leader is refused.
        """
        store = self._session.store
        while True:
            if self._session.lost.is_set():
                await asyncio.sleep(_RETRY_S)
                continue
            try:
                fence = await store.create(self._key, self._record, lease=self._session.lease)
                if fence is not None:
                    return fence
                await self._until_vacant()
            except (StoreUnavailableError, LookupError):
                await asyncio.sleep(_RETRY_S)

    async def _until_vacant(self) -> None:
        held, revision = await self._session.store.snapshot(self._key)
        if not held:
            return
        async for changes in self._session.store.watch(self._key, revision):
            if any(_deleted(change) for change in changes):
                return


def _deleted(change: Change) -> bool:
    return change.value is None
