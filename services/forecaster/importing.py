"""Windows of the past as others send them: checked, and joined to windows of our length. Pure."""

from __future__ import annotations

import math
import warnings

import grpc
import numpy as np
from numpy.typing import NDArray

from services.common.grpc_frame import StatusError
from services.forecaster.predictors import MEAN_LOAD, PEAK_LOAD, QUANTITIES
from warmserve.cluster.keys import check_model_name
from warmserve.v1 import forecast_pb2

_MOST = 1e15  # of any quantity; what is above is no traffic
_MOST_WINDOWS = 4_000_000  # in memory until all have been checked
_CLOSE = 1e-6


class Import:
    """Takes windows and checks each. Nothing of it is recorded yet."""

    def __init__(self, window_s: float, now_s: float) -> None:
        self._window_s = window_s
        self._now_s = now_s
        self._parts: dict[str, int] = {}  # by model, how many of its windows make one of ours
        self._taken: dict[str, list[NDArray[np.float64]]] = {}
        self._count = 0

    def take(self, request: forecast_pb2.ImportHistoryRequest) -> None:
        """Adds windows of one model. StatusError INVALID_ARGUMENT names what is wrong."""
        model = request.model
        try:
            check_model_name(model)
        except ValueError as error:
            raise _wrong(str(error)) from error
        parts = self._window_s / request.window_s if request.window_s > 0 else 0
        if parts < 1 - _CLOSE or abs(parts - round(parts)) > _CLOSE * parts:
            raise _wrong(
                f"{model}: windows of {request.window_s:g} s cannot be joined to those of {self._window_s:g} s that "
                "are kept here; send these, or a divisor of them"
            )
        if self._parts.setdefault(model, round(parts)) != round(parts):
            raise _wrong(f"{model}: all windows of a model must have one length")
        self._count += len(request.windows)
        if self._count > _MOST_WINDOWS:
            raise _wrong(f"more than {_MOST_WINDOWS:,} windows at once; send them in several calls")
        rows = np.empty((len(request.windows), 1 + len(QUANTITIES)))
        for row, window in enumerate(request.windows):
            rows[row] = self._row(model, window, request.window_s)
        self._taken.setdefault(model, []).append(rows)

    def _row(self, model: str, window: forecast_pb2.HistoryWindow, window_s: float) -> list[float]:
        start = window.start_unix_s
        where = f"{model}, window that begins at {start}"
        if not window.HasField("actual"):
            raise _wrong(f"{where}: it has no actual values; leave windows out of which nothing is known")
        if window.window_s and abs(window.window_s - window_s) > _CLOSE * window_s:
            raise _wrong(f"{where}: its length is {window.window_s:g} s and not {window_s:g} s")
        number = math.floor(start / window_s + 0.5)
        if start < 0 or math.floor(number * window_s) != start:
            raise _wrong(f"{where}: it does not begin at a multiple of {window_s:g} s since 1970")
        if start + window_s > self._now_s:
            raise _wrong(f"{where}: it has not ended yet")
        values = [getattr(window.actual, name) for name in QUANTITIES]
        for name, value in zip(QUANTITIES, values, strict=True):
            if not 0 <= value <= _MOST:
                raise _wrong(f"{where}: {name} is {value:g}, and must be 0 or more and finite")
        values[PEAK_LOAD] = max(values[PEAK_LOAD], values[MEAN_LOAD])  # for who knows means only
        return [number, *values]

    def joined(self) -> dict[str, tuple[NDArray[np.int64], NDArray[np.float64]]]:
        """By model the numbers of our windows, and their values of shape (n, 5).

        Of windows sent twice the later counts. Of a window of ours half must be known at least; else it is left out.
        """
        result = {}
        for model, taken in self._taken.items():
            rows = np.concatenate(taken)
            parts = self._parts[model]
            # The last of equal numbers.
            numbers, at = np.unique(rows[::-1, 0].astype(np.int64), return_index=True)
            values = rows[::-1][at, 1:]
            ours, begins = np.unique(numbers // parts, return_index=True)
            whole = np.full((len(ours), parts, len(QUANTITIES)), np.nan)
            place = np.repeat(np.arange(len(ours)), np.diff([*begins, len(numbers)]))
            whole[place, numbers % parts] = values
            known = ~np.isnan(whole[:, :, 0])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)
                means = np.nanmean(whole, axis=1)
                means[:, PEAK_LOAD] = np.nanmax(whole[:, :, PEAK_LOAD], axis=1)
            enough = known.mean(axis=1) >= 0.5
            if enough.any():
                result[model] = (ours[enough], means[enough])
        return result


def _wrong(message: str) -> StatusError:
    return StatusError(grpc.StatusCode.INVALID_ARGUMENT, message)
