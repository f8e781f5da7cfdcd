"""Refits in the background, and how the champion does meanwhile."""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime

import numpy as np
from prometheus_client import Counter, Gauge

from services.common.load import window_index
from services.common.telemetry import logger
from services.forecaster import stored
from services.forecaster.champion import Champions
from services.forecaster.history import History
from services.forecaster.learned import LearnedPredictor
from services.forecaster.past import PastForecasts
from services.forecaster.predictors import MEAN_LOAD
from services.forecaster.refit import Outcome, Task, held_out
from services.forecaster.scoring import DISTANCES, pinball
from services.forecaster.settings import ForecasterSettings

_log = logger(__name__)
_CHECKS = 24  # in a season: whether a refit is due, and of drift
_LIMIT_S = 3600.0
_ALERT = 1.5  # drift from which on the alert is raised; it ends a little below
_CALM = 1.3
_REFITS = Counter("warmserve_forecaster_refits_total", "Refits, by how they ended", ["outcome"])
_DRIFT = Gauge("warmserve_forecaster_drift", "Loss of the newest forecasts over that when their predictor was fitted")
_DRIFTING = Gauge("warmserve_forecaster_drift_alert", f"1 while the drift is above {_ALERT}")
_LEARNED = Gauge("warmserve_forecaster_learned", "1 while the champion is a learned predictor")


class RefitError(Exception):
    """A refit that did not end as it should."""


class Refitter:
    """Has a challenger fitted in a process of its own, once there is enough history and then every `refit_s`, and makes
    it champion where it is better on the newest data."""

    def __init__(
        self,
        settings: ForecasterSettings,
        history: History,
        past: PastForecasts,
        champions: Champions,
        remake: Callable[[], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._settings = settings
        self._history = history
        self._past = past
        self._champions = champions
        self._remake = remake
        self._clock = clock
        self.drift = 0.0
        """Of the champion; 0 while it is not known."""
        self._alert = False
        self._tried_unix_s = 0.0

    async def run(self) -> None:
        """Works until cancelled."""
        pause = max(self._settings.window_s, self._settings.season_s / _CHECKS)
        while True:
            _LEARNED.set(self._champions.champion.info.name != stored.PUBLISHED)
            try:
                await self.watch_drift()
                if self._settings.refit_s and await asyncio.to_thread(self._due):
                    await self.refit()
            except sqlite3.OperationalError as error:
                _log.warning("the history cannot be read for now", error=str(error))
            await asyncio.sleep(pause)

    def _due(self) -> bool:
        now, every = self._clock(), self._settings.refit_s
        last = self._champions.challenger_unix_s()
        if last is not None and 0 <= now - last < every:
            return False
        if 0 <= now - self._tried_unix_s < every / 4:  # without success
            return False
        windows = self._history.known_windows(self._last, self._windows)
        return held_out(windows, self._settings.season) > 0

    @property
    def _last(self) -> int:
        return window_index(self._clock(), self._settings.window_s) - 1

    @property
    def _windows(self) -> int:
        return round(self._settings.full_s / self._settings.window_s)

    async def refit(self) -> None:
        """One refit. What goes wrong with it is said, and changes nothing."""
        began = self._tried_unix_s = self._clock()
        try:
            outcome = await self._in_a_process()
            if outcome.better:
                await asyncio.to_thread(self._champions.crown_challenger)
            else:
                await asyncio.to_thread(self._champions.keep)
        except (RefitError, ValueError, OSError) as error:
            words, how = f"the refit failed: {error}", "failed"
            _log.error("a refit failed", error=str(error))
        else:
            words, how = outcome.words, "kept" if outcome.better else "not_kept"
            _log.info("the predictor was fitted anew", outcome=words, seconds=round(self._clock() - began, 1))
        _REFITS.labels(how).inc()
        self._champions.last_refit = f"{datetime.fromtimestamp(began, UTC):%Y-%m-%d %H:%M} UTC: {words}"
        if how == "kept":
            self._remake()

    async def _in_a_process(self) -> Outcome:
        settings, champions = self._settings, self._champions
        task = Task(
            folder=str(settings.data_dir),
            window_s=settings.window_s,
            season=settings.season,
            windows=self._windows,
            last=self._last,
            fitted_unix_ms=int(self._clock() * 1e3),
            memory_bytes=settings.refit_memory_bytes,
            champion=str(champions.champion_file),
            challenger=str(champions.challenger_file),
        )
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "services.forecaster.refit", json.dumps(asdict(task))),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        try:
            async with asyncio.timeout(_LIMIT_S):
                output, errors = await process.communicate()
        except TimeoutError:
            raise RefitError(f"it took longer than {_LIMIT_S:g} s") from None
        finally:
            if process.returncode is None:
                with suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        if process.returncode:
            last = errors.decode(errors="replace").strip().rpartition("\n")[2]
            raise RefitError(f"its process ended with status {process.returncode}: {last}")
        return Outcome(**json.loads(output))

    async def watch_drift(self) -> None:
        """Measures how the champion does, and raises the alert where it does far worse than when it was fitted."""
        self.drift = await asyncio.to_thread(self._measure)
        _DRIFT.set(self.drift)
        if self.drift > _ALERT and not self._alert:
            _log.warning("forecasts are far worse than when their predictor was fitted", drift=round(self.drift, 2))
            self._alert = True
        elif self.drift < _CALM and self._alert:
            _log.info(
                "forecasts are about as good again as when their predictor was fitted", drift=round(self.drift, 2)
            )
            self._alert = False
        _DRIFTING.set(self._alert)

    def _measure(self) -> float:
        """The champion's loss on the newest season of forecasts that it made over that at its fit; 0 where unknown."""
        champion, season = self._champions.champion, self._settings.season
        if not isinstance(champion.predictor, LearnedPredictor) or not champion.predictor.loss > 0:
            return 0.0
        last = self._last
        since = window_index(champion.info.fitted_unix_ms / 1e3, self._settings.window_s) + max(DISTANCES)
        first = max(last - season + 1, since)
        models = self._past.models()
        if last - first < season / 4 or not models:
            return 0.0
        actual = self._history.series(models, last, last - first + 1)[:, :, MEAN_LOAD]
        lost = came = 0.0
        for ahead in DISTANCES:
            forecast = self._past.unannounced(models, last - actual.shape[1] + 1, last, ahead)[:, :, MEAN_LOAD]
            known = ~np.isnan(actual) & ~np.isnan(forecast).any(axis=2)
            lost += float(pinball(forecast, actual)[known].mean(axis=1).sum())
            came += float(actual[known].sum())
        return lost / came / champion.predictor.loss if came > 0 else 0.0
