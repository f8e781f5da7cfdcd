"""ForecastService: see forecast.proto."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import grpc
import numpy as np

from services.common.grpc_frame import StatusError
from services.common.load import start_of, window_index
from services.common.telemetry import logger
from services.forecaster.calendar import Calendar
from services.forecaster.champion import Champions
from services.forecaster.forecast import loads_message, sample
from services.forecaster.history import History
from services.forecaster.importing import Import
from services.forecaster.past import MAX_AHEAD, EndedAnnouncements, PastForecasts
from services.forecaster.publisher import Publisher
from services.forecaster.refitting import Refitter
from services.forecaster.scores import score
from warmserve.cluster.mirror import Mirror
from warmserve.v1 import cluster_pb2, forecast_pb2, forecast_pb2_grpc

_log = logger(__name__)
_DAY_S = 86_400.0
_MOST_WINDOWS = 50_000
_CAPACITY = 8  # requests that a replica carries, where neither its spec nor an instance says

Context = grpc.aio.ServicerContext[Any, Any]


class ForecastServicer(forecast_pb2_grpc.ForecastServiceServicer):
    """Answers from memory, and from the history in threads."""

    def __init__(
        self,
        models: Mirror[cluster_pb2.ModelSpec],
        instances: Mirror[cluster_pb2.InstanceRecord],
        publisher: Publisher,
        history: History,
        past: PastForecasts,
        ended: EndedAnnouncements,
        calendar: Calendar,
        champions: Champions,
        refitter: Refitter,
        remake: Callable[[], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._models = models
        self._instances = instances
        self._publisher = publisher
        self._history = history
        self._past = past
        self._ended = ended
        self._calendar = calendar
        self._champions = champions
        self._refitter = refitter
        self._remake = remake
        self._clock = clock
        self._importing = asyncio.Lock()

    async def GetForecasts(
        self, request: forecast_pb2.GetForecastsRequest, context: Context
    ) -> forecast_pb2.GetForecastsResponse:
        """The newest forecasts."""
        self._check(request.models)
        newest = self._publisher.newest
        names = sorted(set(request.models or newest))
        return forecast_pb2.GetForecastsResponse(forecasts=[newest[name] for name in names if name in newest])

    async def WatchForecasts(
        self, request: forecast_pb2.WatchForecastsRequest, context: Context
    ) -> AsyncIterator[forecast_pb2.WatchForecastsResponse]:
        """The newest forecasts, then each new one."""
        self._check(request.models)
        async for forecast in self._publisher.follow(request.models):
            yield forecast_pb2.WatchForecastsResponse(forecast=forecast)

    async def GetHistory(
        self, request: forecast_pb2.GetHistoryRequest, context: Context
    ) -> forecast_pb2.GetHistoryResponse:
        """What was, and what had been forecast."""
        window_s = self._history.window_s
        to_s = request.to_unix_s or self._clock()
        from_s = request.from_unix_s or to_s - _DAY_S
        ahead = _ahead(request.ahead)
        first, last = window_index(from_s, window_s), window_index(to_s, window_s)
        if not 0 <= from_s <= to_s:
            raise StatusError(grpc.StatusCode.INVALID_ARGUMENT, "from_unix_s must not be after to_unix_s, nor negative")
        if not await asyncio.to_thread(self._history.knows, request.model):
            raise StatusError(grpc.StatusCode.NOT_FOUND, f"nothing was ever recorded of a model {request.model!r}")
        windows = await asyncio.to_thread(self._windows, request.model, first, last, ahead)
        calendar = {(entry.start_unix_s, entry.id): entry for entry in self._calendar.entries(request.model)}
        for ended in await asyncio.to_thread(self._ended.since, from_s, [request.model]):
            calendar[ended.entry.start_unix_s, ended.entry.id] = ended.entry
        inside = [
            entry
            for _, entry in sorted(calendar.items())
            if entry.start_unix_s < to_s and entry.start_unix_s + entry.duration_s > from_s
        ]
        return forecast_pb2.GetHistoryResponse(window_s=window_s, windows=windows, calendar=inside)

    def _windows(self, model: str, first: int, last: int, ahead: int) -> list[forecast_pb2.HistoryWindow]:
        window_s = self._history.window_s
        actual = self._history.windows(model, first, last)
        oldest, newest = self._past.span()
        begin, end = max(first, oldest), min(last, newest)
        found: dict[int, forecast_pb2.HistoryWindow] = {}
        for number, joined, values in actual:
            found[number] = forecast_pb2.HistoryWindow(
                start_unix_s=start_of(number, window_s), window_s=joined * window_s, actual=sample(values)
            )
        if begin <= end:
            for number, quantiles in enumerate(self._past.of([model], begin, end, ahead)[0], begin):
                forecast = loads_message(start_of(number, window_s), quantiles)
                if forecast is None:
                    continue
                window = found.setdefault(
                    number, forecast_pb2.HistoryWindow(start_unix_s=start_of(number, window_s), window_s=window_s)
                )
                if window.window_s == window_s:
                    window.forecast.CopyFrom(forecast)
        if len(found) > _MOST_WINDOWS:
            raise StatusError(
                grpc.StatusCode.INVALID_ARGUMENT, f"{len(found)} windows are too many to send; ask for a shorter time"
            )
        return [found[number] for number in sorted(found)]

    async def ImportHistory(
        self, request_iterator: AsyncIterator[forecast_pb2.ImportHistoryRequest], context: Context
    ) -> forecast_pb2.ImportHistoryResponse:
        """All of it, or nothing."""
        new = Import(self._history.window_s, self._clock())
        async for request in request_iterator:
            await asyncio.to_thread(new.take, request)
        values = await asyncio.to_thread(new.joined)
        async with self._importing:
            await asyncio.to_thread(self._history.add, values)
        windows = sum(len(numbers) for numbers, _ in values.values())
        _log.info("history was imported", models=len(values), windows=windows)
        if values:
            self._remake()
        return forecast_pb2.ImportHistoryResponse(windows=windows, models=len(values))

    async def GetScores(
        self, request: forecast_pb2.GetScoresRequest, context: Context
    ) -> forecast_pb2.GetScoresResponse:
        """How good forecasts and announcements have been."""
        past_s = request.past_s or 7 * _DAY_S
        if not past_s > 0:
            raise StatusError(grpc.StatusCode.INVALID_ARGUMENT, f"past_s must be above 0, not {past_s:g}")
        ahead = _ahead(request.ahead)
        models = sorted(set(request.models)) or await asyncio.to_thread(self._past.models)
        for name in request.models:
            if name not in self._models.items and not await asyncio.to_thread(self._history.knows, name):
                raise StatusError(grpc.StatusCode.NOT_FOUND, f"nothing was ever recorded of a model {name!r}")
        since = self._clock() - past_s
        capacities = [self._capacity(name) for name in models]
        scores = await asyncio.to_thread(self._scores, models, since, ahead, capacities)
        calendar = await asyncio.to_thread(self._ended.since, since, list(request.models))
        return forecast_pb2.GetScoresResponse(models=scores, calendar=calendar)

    def _scores(
        self, models: list[str], since_s: float, ahead: int, capacities: list[int]
    ) -> list[forecast_pb2.ForecastScore]:
        window_s = self._history.window_s
        last = window_index(self._clock(), window_s) - 1
        oldest, newest = self._past.span()
        first, last = max(window_index(since_s, window_s), oldest), min(last, newest)
        if first > last:
            return []
        actual = np.full((len(models), last - first + 1, 5), np.nan)
        known = self._history.series(models, last, last - first + 1)
        actual[:, actual.shape[1] - known.shape[1] :] = known
        forecast = self._past.of(models, first, last, ahead)
        each = [
            score(name, actual[row], forecast[row], window_s, capacity)
            for row, (name, capacity) in enumerate(zip(models, capacities, strict=True))
        ]
        return [one for one in each if one is not None]

    def _capacity(self, model: str) -> int:
        spec = self._models.items.get(model)
        if spec is not None and spec.limits.max_batch:
            return spec.limits.max_batch
        slots = [one.slots for one in self._instances.items.values() if one.model == model]
        return max(slots, default=0) or _CAPACITY

    async def GetPredictor(
        self, request: forecast_pb2.GetPredictorRequest, context: Context
    ) -> forecast_pb2.GetPredictorResponse:
        """The predictors in use."""
        champions = self._champions
        return forecast_pb2.GetPredictorResponse(
            champion=champions.champion.info,
            previous=champions.previous.info if champions.previous else None,
            challenger=champions.challenger,
            last_refit=champions.last_refit,
            drift=self._refitter.drift,
        )

    async def RestorePredictor(
        self, request: forecast_pb2.RestorePredictorRequest, context: Context
    ) -> forecast_pb2.RestorePredictorResponse:
        """The previous champion is the champion again."""
        try:
            await asyncio.to_thread(self._champions.restore)
        except LookupError as error:
            raise StatusError(grpc.StatusCode.FAILED_PRECONDITION, str(error)) from error
        except OSError as error:
            raise StatusError(grpc.StatusCode.UNAVAILABLE, f"it could not be saved: {error}") from error
        _log.info("the previous predictor was restored", predictor=self._champions.champion.info.name)
        self._remake()
        return forecast_pb2.RestorePredictorResponse(champion=self._champions.champion.info)

    def _check(self, models: Iterable[str]) -> None:
        unknown = sorted(set(models) - set(self._models.items))
        if unknown:
            raise StatusError(grpc.StatusCode.NOT_FOUND, f"not deployed: {', '.join(unknown)}")


def _ahead(ahead: int) -> int:
    if ahead > MAX_AHEAD:
        raise StatusError(grpc.StatusCode.INVALID_ARGUMENT, f"ahead is 1 to {MAX_AHEAD} windows, not {ahead}")
    return ahead or 1
