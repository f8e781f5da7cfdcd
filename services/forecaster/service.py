"""The forecaster's loop and its gRPC service."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import grpc
import numpy as np
from prometheus_client import Counter, Gauge
from redis.exceptions import RedisError

from services.common.grpc_frame import StatusError
from services.common.load import window_start
from services.common.telemetry import logger
from services.forecaster.forecast import make_forecast
from services.forecaster.history import QUANTITIES, History
from services.forecaster.predictors import Floats, Predictor
from services.forecaster.recorder import Recorder
from services.forecaster.settings import ForecasterSettings
from warmserve.cluster.keys import Keys
from warmserve.cluster.mirror import Mirror
from warmserve.cluster.store import Store, StoreUnavailableError
from warmserve.v1 import cluster_pb2, forecast_pb2, forecast_pb2_grpc

_log = logger(__name__)
_RETRY_S = 1.0
# Routers report a window's last counts a little after its end.
_LATE = 0.1
_ERROR = Counter(
    "warmserve_forecaster_absolute_error_total", "Sum of |median forecast - actual| of the next window", ["quantity"]
)
_ACTUAL = Counter("warmserve_forecaster_actual_total", "Sum of the actual values that forecasts were for", ["quantity"])
_AGE = Gauge("warmserve_forecaster_last_window_unix_seconds", "Begin of the newest recorded window")


class Forecasts:
    """The newest forecasts, and those who follow them."""

    def __init__(self) -> None:
        self.newest: dict[str, cluster_pb2.Forecast] = {}
        self._followers: set[asyncio.Queue[cluster_pb2.Forecast]] = set()

    def publish(self, forecast: cluster_pb2.Forecast) -> None:
        """Replaces the model's forecast."""
        self.newest[forecast.model] = forecast
        for follower in self._followers:
            follower.put_nowait(forecast)

    async def follow(self) -> AsyncIterator[cluster_pb2.Forecast]:
        """The newest forecasts, then each new one."""
        queue: asyncio.Queue[cluster_pb2.Forecast] = asyncio.Queue()
        self._followers.add(queue)
        try:
            for forecast in list(self.newest.values()):
                yield forecast
            while True:
                yield await queue.get()
        finally:
            self._followers.discard(queue)


class Forecaster:
    """At the end of each window: records it, forecasts all deployed models, publishes."""

    def __init__(
        self,
        settings: ForecasterSettings,
        keys: Keys,
        store: Store,
        models: Mirror[cluster_pb2.ModelSpec],
        history: History,
        recorder: Recorder,
        predictor: Predictor,
        forecasts: Forecasts,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._settings = settings
        self._keys = keys
        self._store = store
        self._models = models
        self._history = history
        self._recorder = recorder
        self._predictor = predictor
        self._forecasts = forecasts
        self._clock = clock

    async def run(self) -> None:
        """Works until cancelled."""
        window_s = self._settings.window_s
        while True:
            try:
                await self.forecast()
            except (RedisError, StoreUnavailableError) as error:
                _log.warning("no new forecasts for now", error=str(error))
                await asyncio.sleep(_RETRY_S)
                continue
            now = self._clock()
            await asyncio.sleep(window_s - (now - _LATE * window_s) % window_s)

    async def forecast(self) -> None:
        """Records what has ended and forecasts what begins. Raises redis.RedisError, StoreUnavailableError."""
        now = self._clock()
        names = sorted(self._models.items)
        last = await self._recorder.catch_up(names, now)
        _AGE.set(last)
        for name in names:
            forecast, actual = await asyncio.to_thread(self._forecast_one, name, last, now)
            if name not in self._models.items:
                continue  # undeployed meanwhile
            self._score(name, last, actual)
            self._forecasts.publish(forecast)
            await self._store.put(self._keys.forecast(name), forecast)
        await self._withdraw_undeployed()

    async def _withdraw_undeployed(self) -> None:
        """Deletes forecasts that outlived their models, because this process or etcd was away."""
        for entry in await self._store.get_all(self._keys.forecasts(), cluster_pb2.Forecast):
            if entry.value.model not in self._models.items:
                await self._store.delete(entry.key)

    def _forecast_one(self, name: str, last: int, now: float) -> tuple[cluster_pb2.Forecast, Floats | None]:
        """The forecast, and what the window that begins at `last` was; None where that was not recorded."""
        settings = self._settings
        series = self._history.series(name, last, round(settings.retention_s / settings.window_s))
        first = window_start(last + settings.window_s * 1.5, settings.window_s)
        forecast = make_forecast(name, series, self._predictor, settings.horizon, first, settings.window_s, now)
        return forecast, series[-1] if len(series) and not np.isnan(series[-1]).any() else None

    def _score(self, name: str, last: int, actuals: Floats | None) -> None:
        """Compares the window that has ended with what was forecast for it."""
        before = self._forecasts.newest.get(name)
        window = next((w for w in before.windows if w.start_unix_s == last), None) if before else None
        if window is None or actuals is None:
            return
        for quantity, actual in zip(QUANTITIES, actuals.tolist(), strict=True):
            _ERROR.labels(quantity).inc(abs(getattr(window, quantity).p50 - actual))
            _ACTUAL.labels(quantity).inc(actual)

    async def forget(self, name: str) -> None:
        """Drops an undeployed model's forecast and history."""
        self._forecasts.newest.pop(name, None)
        await asyncio.to_thread(self._history.forget, [name])
        try:
            await self._store.delete(self._keys.forecast(name))
        except StoreUnavailableError as error:
            # The next round of forecasts withdraws it.
            _log.warning("a forecast outlives its model until etcd is back", model=name, error=str(error))


class ForecastServicer(forecast_pb2_grpc.ForecastServiceServicer):
    """See forecast.proto."""

    def __init__(self, models: Mirror[cluster_pb2.ModelSpec], forecasts: Forecasts) -> None:
        self._models = models
        self._forecasts = forecasts

    async def GetForecasts(
        self, request: forecast_pb2.GetForecastsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> forecast_pb2.GetForecastsResponse:
        """The newest forecasts."""
        self._check(request.models)
        newest = self._forecasts.newest
        names = sorted(request.models or newest)
        return forecast_pb2.GetForecastsResponse(forecasts=[newest[name] for name in names if name in newest])

    async def WatchForecasts(
        self, request: forecast_pb2.WatchForecastsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[forecast_pb2.WatchForecastsResponse]:
        """The newest forecasts, then each new one."""
        self._check(request.models)
        async for forecast in self._forecasts.follow():
            if not request.models or forecast.model in request.models:
                yield forecast_pb2.WatchForecastsResponse(forecast=forecast)

    def _check(self, models: Iterable[str]) -> None:
        unknown = sorted(set(models) - set(self._models.items))
        if unknown:
            raise StatusError(grpc.StatusCode.NOT_FOUND, f"not deployed: {', '.join(unknown)}")
