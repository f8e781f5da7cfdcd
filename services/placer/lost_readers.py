"""What instances had taken from the queues that ended without a word, together with the routers they worked for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping

from redis.exceptions import RedisError

from services.common.queues import RequestQueue
from services.common.telemetry import logger

_log = logger(__name__)
_LOOK_S = 30.0
_GONE_S = 60.0  # by then a router that lives has put its requests back


class LostReaders:
    """Takes readers out of the queues' groups, with all that they hold, once they have had no record for a minute.

    Entries that nobody can take any more would count as requests in progress for as long as their model is deployed.
    """

    def __init__(
        self,
        queue: RequestQueue,
        models: Callable[[], Iterable[str]],
        instances: Callable[[], set[str] | None],
    ) -> None:
        """`models()` are the deployed ones, `instances()` the ids of those with a record; None while none is known."""
        self._queue = queue
        self._models = models
        self._instances = instances
        self._missed: dict[tuple[str, str], float] = {}  # (model, instance): since when it has no record

    async def run(self) -> None:
        """Looks every half minute, until cancelled."""
        while True:
            await asyncio.sleep(_LOOK_S)
            try:
                await self.look(time.monotonic())
            except (RedisError, OSError) as error:
                _log.debug("lost instances are looked for later", error=str(error))

    async def look(self, now: float) -> None:
        """Looks once; `now` in seconds of any clock. Raises RedisError."""
        readers = await self._queue.readers(self._models())
        known = self._instances()
        if known is None:
            self._missed.clear()
            return
        self._missed = {lost: self._missed.get(lost, now) for lost in _without_record(readers, known)}
        for (model, instance_id), since in list(self._missed.items()):
            if now - since >= _GONE_S:
                entries = await self._queue.expel(model, instance_id)
                del self._missed[model, instance_id]
                _log.info("forgot a lost instance's entries", model=model, instance=instance_id, entries=entries)


def _without_record(readers: Mapping[str, set[str]], known: set[str]) -> list[tuple[str, str]]:
    return [(model, instance_id) for model, ids in readers.items() for instance_id in sorted(ids - known)]
