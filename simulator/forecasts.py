"""Load as routers count it, window by window, and what the real predictor makes of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from services.placer.snapshot import Quantiles, WindowLoad
from simulator.engine import Job
from simulator.replica import ModelState
from simulator.spec import Forecasting

Floats = NDArray[np.float64]
_QUANTITIES = 5  # mean load, peak load, requests/s, prompt tokens/s, output tokens/s: services.forecaster's columns


class LoadMeter:
    """Counts one model's requests in progress, arrivals and tokens in the current window."""

    def __init__(self, now: float) -> None:
        self._at = now
        self._seconds = 0.0  # requests in progress x seconds
        self._peak = 0
        self._arrivals = self._prompt = self._output = 0
        self.in_progress = 0

    def arrived(self, job: Job, now: float) -> None:
        """A request was accepted."""
        self._advance(now)
        self.in_progress += 1
        if self.in_progress > self._peak:
            self._peak = self.in_progress
        self._arrivals += 1
        self._prompt += job.prompt

    def ended(self, job: Job, now: float) -> None:
        """It is no longer in progress. Its answer's tokens count in the window in which it ends."""
        self._advance(now)
        self.in_progress -= 1
        self._output += job.output

    def cut(self, now: float, window_s: float) -> list[float]:
        """The window that ends now, and begins the next."""
        self._advance(now)
        counted = [
            self._seconds / window_s,
            float(self._peak),
            self._arrivals / window_s,
            self._prompt / window_s,
            self._output / window_s,
        ]
        self._seconds, self._peak = 0.0, self.in_progress
        self._arrivals = self._prompt = self._output = 0
        return counted

    def _advance(self, now: float) -> None:
        self._seconds += (now - self._at) * self.in_progress
        self._at = now


class Forecasts:
    """What the forecaster does at the end of each window: records it, and forecasts the next ones."""

    def __init__(self, settings: Forecasting, models: Sequence[ModelState], now: float) -> None:
        self._settings = settings
        self._models = models
        self.meters = [LoadMeter(now) for _ in models]
        past = max((len(series) for series in settings.history.values()), default=0)
        self._history = np.full((len(models), past, _QUANTITIES), np.nan)
        for model in models:
            series = np.asarray(settings.history.get(model.name, np.empty((0, _QUANTITIES))), dtype=np.float64)
            if series.ndim != 2 or series.shape[1] != _QUANTITIES:
                raise ValueError(
                    f"the history of {model.name} has the shape {series.shape}; (windows, {_QUANTITIES}) is needed"
                )
            if len(series):
                self._history[model.index, past - len(series) :] = series

    def begin(self, first_s: float, now: float) -> float:
        """Forecasts from the history alone, which ends where the window begins that holds the first arrival.

        The first forecast window reaches back to `now`, so that models can be placed before. Returns its end.
        """
        window = self._settings.window_s
        start = math.floor(first_s / window) * window
        self._forecast(start)
        for model in self._models:
            if model.windows:
                model.windows = (replace(model.windows[0], start_s=min(now, start)), *model.windows[1:])
        return start + window

    def window_ended(self, now: float) -> None:
        """Records the window and forecasts the next ones, unless the forecaster is silent."""
        counted = np.array([meter.cut(now, self._settings.window_s) for meter in self.meters])
        self._history = np.concatenate([self._history, counted[:, None, :]], axis=1)
        if not self._settings.silent_from_s <= now < self._settings.silent_to_s:
            self._forecast(now)

    def _forecast(self, start: float) -> None:
        predictor, window = self._settings.predictor, self._settings.window_s
        if predictor is None or not self._history.shape[1]:
            return
        horizon = self._settings.horizon
        quantiles = predictor.forecast_all(self._history, horizon)[:, :, :2, :].tolist()
        for model, windows in zip(self._models, quantiles, strict=True):
            model.windows = tuple(
                WindowLoad(
                    start + step * window, start + (step + 1) * window, Quantiles(*loads[0]), Quantiles(*loads[1])
                )
                for step, loads in enumerate(windows)
            )
