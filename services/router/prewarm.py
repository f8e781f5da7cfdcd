"""Clients' announcements of traffic, written to the calendar in etcd, where the forecaster reads them."""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from collections.abc import Callable

import grpc

from services.common.telemetry import logger
from services.router.errors import RequestError, invalid, unavailable
from warmserve.cluster.keys import Keys
from warmserve.cluster.store import Store, StoreUnavailableError, decode
from warmserve.v1 import cluster_pb2, inference_pb2

MAX_OPEN = 20  # clients' announcements of one model that have not ended
MAX_LOAD = 100_000
MAX_AHEAD_S = 7 * 86_400
MAX_DURATION_S = 86_400
MAX_NOTE_CHARS = 200
DEFAULT_DURATION_S = 600

_SKEW_S = 60  # by which clients' clocks may be behind ours
_RETRY_S = 1.0

_log = logger(__name__)


def check_prewarm(request: inference_pb2.PrewarmRequest, now_s: float) -> None:
    """Everything but whether the model is deployed. Raises RequestError (INVALID_ARGUMENT)."""
    if not request.model:
        raise invalid("model", "name a deployed model")
    if not 0 < request.load <= MAX_LOAD:  # NaN too
        raise invalid("load", f"{request.load:g} requests in progress are not above 0 and at most {MAX_LOAD:,}")
    if not 0 <= request.duration_s <= MAX_DURATION_S:
        raise invalid("duration_s", f"{request.duration_s} s is not between 0 and {MAX_DURATION_S:,} s (a day)")
    if request.start_unix_s:
        ahead_s = request.start_unix_s - now_s
        if ahead_s < -_SKEW_S:
            raise invalid("start_unix_s", f"it is {-ahead_s:,.0f} s in the past; 0 means now")
        if ahead_s > MAX_AHEAD_S:
            raise invalid("start_unix_s", f"it is {ahead_s:,.0f} s ahead, and more than {MAX_AHEAD_S:,} s (a week)")
    if len(request.note) > MAX_NOTE_CHARS or not request.note.isprintable():
        raise invalid("note", f"use at most {MAX_NOTE_CHARS} printable characters")


class Prewarmer:
    """Takes announcements."""

    def __init__(self, store: Store, keys: Keys, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._keys = keys
        self._clock = clock
        self._writing = asyncio.Lock()  # what is counted is what is there when the next one is written

    async def announce(self, request: inference_pb2.PrewarmRequest) -> str:
        """Writes the announcement of a deployed model; returns its id. Raises RequestError."""
        now = self._clock()
        check_prewarm(request, now)
        entry = cluster_pb2.CalendarEntry(
            model=request.model,
            start_unix_s=request.start_unix_s or math.floor(now),
            duration_s=request.duration_s or DEFAULT_DURATION_S,
            load=request.load,
            note=request.note,
            id=uuid.uuid4().hex[:12],
            source=cluster_pb2.CALENDAR_SOURCE_CLIENT,
            created_unix_ms=int(now * 1000),
        )
        try:
            async with self._writing:
                if len(ends := await self._open_ends(request.model, now)) >= MAX_OPEN:
                    raise RequestError(
                        grpc.StatusCode.RESOURCE_EXHAUSTED,
                        f"model {request.model!r} has {len(ends)} open announcements; at most {MAX_OPEN} are kept",
                        retry_after_s=min(ends) - now,
                    )
                await self._store.put(self._keys.calendar(entry.model, entry.id), entry)
        except StoreUnavailableError as error:
            raise unavailable(f"the announcement cannot be written: {error}", _RETRY_S) from error
        _log.info("traffic announced", model=entry.model, load=entry.load, id=entry.id)
        return entry.id

    async def _open_ends(self, model: str, now: float) -> list[float]:
        """When each of the clients' announcements of the model that have not ended will end."""
        # Under the prefix are also those of models whose names begin with this one's and a slash.
        found, _ = await self._store.snapshot(self._keys.calendar(model, ""))
        ends = []
        for item in found:
            try:
                entry = decode(item.value or b"", cluster_pb2.CalendarEntry)
            except ValueError as error:
                _log.warning("a calendar entry cannot be read", key=item.key, error=str(error))
                continue
            if entry.model == model and entry.source == cluster_pb2.CALENDAR_SOURCE_CLIENT:
                ends.append(float(entry.start_unix_s + entry.duration_s))
        return [end for end in ends if end > now]
