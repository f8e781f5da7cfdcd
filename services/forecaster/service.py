"""The forecaster's loop: at the end of each window it records what was, forecasts what will be, and publishes."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable, Collection

import numpy as np
from prometheus_client import Counter, Gauge
from redis.exceptions import RedisError

from services.common.load import start_of, window_index
from services.common.telemetry import logger
from services.forecaster.announced import per_load, raised
from services.forecaster.calendar import Calendar
from services.forecaster.champion import Champions
from services.forecaster.following import Following
from services.forecaster.forecast import Forecasting, message
from services.forecaster.history import History
from services.forecaster.past import PastForecasts
from services.forecaster.predictors import QUANTITIES, Floats, Predictor
from services.forecaster.publisher import Publisher
from services.forecaster.recorder import Recorder
from services.forecaster.settings import ForecasterSettings
from warmserve.cluster.mirror import Mirror
from warmserve.cluster.store import StoreUnavailableError
from warmserve.v1 import cluster_pb2

_log = logger(__name__)
_RETRY_S = 1.0
_LATE_S = 2.0  # at most, or a tenth of a window: routers report a window's last counts a little after its end
_ERROR = Counter(
    "warmserve_forecaster_absolute_error_total", "Sum of |median forecast - actual| of the next window", ["quantity"]
)
_ACTUAL = Counter("warmserve_forecaster_actual_total", "Sum of the actual values that forecasts were for", ["quantity"])
_LAST = Gauge("warmserve_forecaster_last_window_unix_seconds", "Begin of the newest recorded window")
_FELL_BACK = Counter(
    "warmserve_forecaster_fallbacks_total",
    "Forecasts for which the learned predictor failed and the published one spoke",
)


class Forecaster:
    """Records, forecasts and publishes. `remake` and `announced` tell it what else has happened."""

    def __init__(
        self,
        settings: ForecasterSettings,
        models: Mirror[cluster_pb2.ModelSpec],
        routers: Mirror[cluster_pb2.RouterRecord],
        history: History,
        recorder: Recorder,
        past: PastForecasts,
        calendar: Calendar,
        champions: Champions,
        publisher: Publisher,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._settings = settings
        self._models = models
        self._routers = routers
        self._history = history
        self._recorder = recorder
        self._past = past
        self._following = Following(past)
        self._calendar = calendar
        self._champions = champions
        self._publisher = publisher
        self._clock = clock
        self._forecasting: Forecasting | None = None
        self._behind = False  # windows have ended that could not be recorded yet
        self._stale = True  # forecasts are to be made anew
        self._announced: set[str] = set()  # models whose calendar has changed
        self._clean = False  # etcd holds no forecast of a model that is gone
        self._news = asyncio.Event()

    @property
    def last(self) -> int:
        """The number of the newest window that has ended."""
        late = min(_LATE_S, self._settings.window_s / 10)
        return window_index(self._clock() - late, self._settings.window_s) - 1

    def remake(self) -> None:
        """Has forecasts made anew at once: a model is new, its past was imported, or the predictor is another."""
        self._stale = True
        self._news.set()

    def announced(self, model: str) -> None:
        """Has a model's forecast published at once as the calendar now has it."""
        self._announced.add(model)
        self._news.set()

    def undeployed(self, model: str) -> None:
        """Takes the forecast of a model that is gone back. Its history stays."""
        self._publisher.withdraw(model)
        self._news.set()

    async def run(self) -> None:
        """Works until cancelled."""
        while True:
            self._news.clear()
            pause = _RETRY_S
            try:
                if await self._work():
                    pause = self._until_next()
            except StoreUnavailableError as error:
                _log.warning("forecasts are not all published yet", error=str(error))
            except sqlite3.OperationalError as error:
                _log.warning("the history cannot be used for now", error=str(error))
                self._stale = True
            try:
                await asyncio.wait_for(self._news.wait(), pause)
            except TimeoutError:
                continue

    async def _work(self) -> bool:
        """Does what is to be done; False where something is left. Raises StoreUnavailableError."""
        if self._behind:
            await self._record(self.last)
        if self._stale or self._forecasting is None or self._forecasting.first != self.last + 1:
            await self._forecast()
        elif self._announced:
            models, self._announced = self._announced, set()
            await self._publish(self._forecasting, models & set(self._forecasting.models))
        await self._publisher.flush()
        if not self._behind:  # what came is known, as far as it will be
            await self._calendar.settle(self.last)
        if not self._clean:
            await self._publisher.withdraw_others(self._models.items)
            await self._publisher.flush()
            self._clean = True
        return not self._behind

    def _until_next(self) -> float:
        """Seconds until the window that has begun is forecast no more."""
        due = start_of(self.last + 2, self._settings.window_s) + min(_LATE_S, self._settings.window_s / 10)
        return max(0.0, due - self._clock())

    async def _record(self, last: int) -> None:
        """Records what has ended, up to the window numbered `last`. What cannot be recorded now is later."""
        deployed = {name: spec.deployed_unix_ms / 1e3 for name, spec in self._models.items.items()}
        routers = {router: record.started_unix_ms / 1e3 for router, record in self._routers.items.items()}
        try:
            recorded = await self._recorder.catch_up(deployed, routers, start_of(last + 1, self._settings.window_s))
        except (RedisError, sqlite3.OperationalError) as error:
            if not self._behind:
                _log.warning("what has ended will be recorded later", error=str(error))
            self._behind = True
            return
        self._stale = self._stale or self._behind
        self._behind = False
        if recorded:
            _LAST.set(start_of(max(recorded), self._settings.window_s))

    async def _forecast(self) -> None:
        """Records what has ended, and forecasts what begins."""
        last = self.last
        await self._record(last)
        self._stale = self._clean = False
        self._announced.clear()
        names = tuple(sorted(self._models.items))
        forecasting, newest = await asyncio.to_thread(self._make, names, last)
        for name, actual in zip(names, newest, strict=True):
            self._compare(name, last, actual)
        self._forecasting = forecasting
        published = await self._publish(forecasting, names)
        try:
            await asyncio.to_thread(self._past.save, last + 1, names, published, forecasting.quantiles)
        except sqlite3.OperationalError as error:
            _log.warning("forecasts are not kept for later scores", error=str(error))

    def _make(self, names: tuple[str, ...], last: int) -> tuple[Forecasting, Floats]:
        """Forecasts, and what the window numbered `last` was: shape (models, 5), NaN where that was not recorded."""
        settings = self._settings
        series = self._history.series(names, last, round(settings.full_s / settings.window_s))
        champion = self._champions.champion
        raw, name = self._predict(series, champion.predictor)
        quantiles = self._following.adapt(names, series, last, raw)
        made = Forecasting(name, last + 1, names, quantiles, per_load(series))
        newest = series[:, -1] if series.shape[1] else np.full((len(names), len(QUANTITIES)), np.nan)
        return made, newest

    def _predict(self, series: Floats, predictor: Predictor) -> tuple[Floats, str]:
        horizon = self._settings.horizon
        if not len(series):
            return np.empty((0, horizon, len(QUANTITIES), 3)), predictor.name
        try:
            return predictor.forecast_all(series, horizon), predictor.name
        except Exception:
            fallback = self._champions.published.predictor
            if predictor is fallback:
                raise
            # Whatever is wrong with what was learned, there is a rule that needs no learning.
            _log.exception("the champion failed; the published predictor speaks", predictor=predictor.name)
            _FELL_BACK.inc()
            return fallback.forecast_all(series, horizon), fallback.name

    async def _publish(self, made: Forecasting, models: Collection[str]) -> Floats:
        """Publishes these models' forecasts with what is announced. Returns them all: shape (models, windows, 5, 3)."""
        window_s = self._settings.window_s
        expected = await self._calendar.expectations(made.models)
        begins = [float(start_of(made.first + step, window_s)) for step in range(self._settings.horizon)]
        now_ms = int(self._clock() * 1e3)
        all_quantiles = made.quantiles.copy()
        for row, name in enumerate(made.models):
            if name in expected:
                all_quantiles[row] = raised(made.quantiles[row], begins, window_s, expected[name], made.per_load[row])
            if name in models and name in self._models.items:  # not undeployed meanwhile
                self._publisher.publish(message(name, all_quantiles[row], now_ms, made.predictor, made.first, window_s))
        return all_quantiles

    def _compare(self, name: str, last: int, actuals: Floats) -> None:
        """Holds the window that has ended against what was forecast for it."""
        before = self._publisher.newest.get(name)
        begin = start_of(last, self._settings.window_s)
        window = next((w for w in before.windows if w.start_unix_s == begin), None) if before else None
        if window is None or np.isnan(actuals).any():
            return
        for quantity, actual in zip(QUANTITIES, actuals.tolist(), strict=True):
            _ERROR.labels(quantity).inc(abs(getattr(window, quantity).p50 - actual))
            _ACTUAL.labels(quantity).inc(actual)
