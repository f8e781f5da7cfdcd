"""The calendar in etcd: what it makes forecasts expect, and what came of entries that have ended."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Collection

from services.common.load import start_of, window_index
from services.common.telemetry import logger
from services.forecaster.announced import Expectation, trust, what_came
from services.forecaster.history import History
from services.forecaster.past import EndedAnnouncements, PastForecasts
from services.forecaster.predictors import LEVELS, MEAN_LOAD, PEAK_LOAD
from warmserve.cluster.keys import Keys
from warmserve.cluster.mirror import Mirror
from warmserve.cluster.store import Store
from warmserve.v1 import cluster_pb2, forecast_pb2

_log = logger(__name__)
_REPORTED = 2  # windows, after which routers that report late have done so
_HINTS = 10  # of a model's clients, the newest, by which the next ones are judged
_LONGEST = 100_000  # windows; longer entries are not held against what was forecast
_MEDIAN = LEVELS.index(0.5)


class Calendar:
    """Entries by model. Those that cannot be meant (no length, no load) are ignored, said so, and end like others."""

    def __init__(
        self, keys: Keys, store: Store, history: History, past: PastForecasts, ended: EndedAnnouncements
    ) -> None:
        self._keys = keys
        self._store = store
        self._history = history
        self._past = past
        self._ended = ended
        self._trust: dict[str, float] = {}
        self._entries = Mirror(store, keys.calendars(), cluster_pb2.CalendarEntry)

    async def start(self, changed: Callable[[str], None]) -> None:
        """Begins to follow the calendar; `changed(model)` is called after each change. Raises StoreUnavailableError."""

        def on_change(key: str, old: cluster_pb2.CalendarEntry | None, new: cluster_pb2.CalendarEntry | None) -> None:
            if new is not None and not _meant(new):
                _log.warning("an entry of the calendar has no length or no load", entry=key)
            for entry in (old, new):
                if entry is not None:
                    changed(entry.model)

        self._entries.on_change(on_change)
        await self._entries.start()

    async def close(self) -> None:
        """Stops following."""
        await self._entries.close()

    def entries(self, model: str) -> list[cluster_pb2.CalendarEntry]:
        """A model's entries in etcd, in order of time."""
        found = [entry for entry in self._entries.items.values() if entry.model == model and _meant(entry)]
        return sorted(found, key=lambda entry: (entry.start_unix_s, entry.id))

    async def expectations(self, models: Collection[str]) -> dict[str, list[Expectation]]:
        """What was announced for these models; those for which nothing was are left out."""
        found: dict[str, list[Expectation]] = {}
        for entry in list(self._entries.items.values()):
            if entry.model not in models or not _meant(entry):
                continue
            of_all = entry.source != cluster_pb2.CALENDAR_SOURCE_CLIENT
            believed = 1.0 if of_all else await self._trust_in(entry.model)
            one = Expectation(entry.start_unix_s, _end(entry), entry.load * believed, of_all)
            found.setdefault(entry.model, []).append(one)
        return found

    async def settle(self, last: int) -> None:
        """Scores entries that ended two windows before the one numbered `last`, or earlier, and takes them out of etcd.

        By then routers have reported what came. Without a window counted since, the clock may have leapt ahead: then
        nothing is settled. Raises StoreUnavailableError.
        """
        window_s = self._history.window_s
        ended = {
            key: entry
            for key, entry in self._entries.items.items()
            if _end(entry) <= start_of(last + 1 - _REPORTED, window_s)
        }
        counted = max(await asyncio.to_thread(self._history.seen), default=-1) if ended else -1
        for key, entry in ended.items():
            if _end(entry) > start_of(counted + 1, window_s):
                continue
            if _meant(entry):
                score = await asyncio.to_thread(self._score, entry)
                await asyncio.to_thread(self._ended.save, score)
                self._trust.pop(entry.model, None)
                _log.info(
                    "an announced expectation has ended",
                    model=entry.model,
                    entry=entry.id,
                    announced=entry.load,
                    came=score.actual_peak if score.HasField("actual_peak") else None,
                    forecast=score.forecast_load if score.HasField("forecast_load") else None,
                )
            await self._store.delete(self._keys.calendars() + key)

    async def _trust_in(self, model: str) -> float:
        if model not in self._trust:
            self._trust[model] = trust(await asyncio.to_thread(self._ended.of_clients, model, _HINTS))
        return self._trust[model]

    def _score(self, entry: cluster_pb2.CalendarEntry) -> forecast_pb2.CalendarScore:
        window_s = self._history.window_s
        begin, end = entry.start_unix_s, _end(entry)
        first, last = window_index(begin, window_s), window_index(end, window_s)
        score = forecast_pb2.CalendarScore(entry=entry)
        actual = [
            (start_of(window, window_s), values[MEAN_LOAD], values[PEAK_LOAD])
            for window, joined, values in self._history.windows(entry.model, first, last)
            if joined == 1
        ]
        if came := what_came(begin, end, window_s, actual):
            score.actual_load, score.actual_peak = came
        if last - first > _LONGEST:
            return score
        forecast = self._past.unraised([entry.model], first, last, 1)[0, :, MEAN_LOAD, _MEDIAN].tolist()
        known = [(start_of(first + step, window_s), one, one) for step, one in enumerate(forecast) if one == one]
        if expected := what_came(begin, end, window_s, known):
            score.forecast_load = expected[0]
        return score


def _end(entry: cluster_pb2.CalendarEntry) -> int:
    return entry.start_unix_s + entry.duration_s


def _meant(entry: cluster_pb2.CalendarEntry) -> bool:
    return entry.duration_s > 0 and entry.start_unix_s >= 0 and math.isfinite(entry.load) and entry.load > 0
