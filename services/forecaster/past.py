"""What was forecast, and what was announced: kept on disk to be held against what came."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from services.forecaster.blocks import pack, pack_ids, unpack, unpack_ids
from services.forecaster.database import Database
from services.forecaster.predictors import LEVELS, PEAK_LOAD, Floats
from warmserve.v1 import cluster_pb2, forecast_pb2

KEEP_WINDOWS = 2_016  # windows of which forecasts are kept; a week of 300 s
_TRIM_EVERY = 16
_BITS = 11
_LOADS = PEAK_LOAD + 1  # mean and peak load are kept; of other quantities nobody asks afterwards
_KEEP_ENDED = 10_000
MAX_AHEAD = 12
LEARNT_AHEAD = (1, 3, 6, 12)  # windows; of so far ahead it is kept what forecasts were without announcements too
_UNRAISED = dict(zip(LEARNT_AHEAD, (0, 13, 14, 15), strict=True))  # by how many windows ahead: what it is kept under


class PastForecasts:
    """Forecasts of mean and peak load, by the window they were for and how many windows before they were made."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._saved = 0

    def save(self, first: int, models: Sequence[str], quantiles: Floats, unraised: Floats) -> None:
        """Keeps forecasts of shape (models, windows, 5, 3), of which the first window is that numbered `first`, and how
        they were without announcements. Those that were kept before of the same windows, as far ahead, stay."""
        if not models:
            return
        with self._database.transaction() as db:
            ids = np.array(self._database.model_ids(list(models)))
            loads = quantiles[:, :, :_LOADS]
            rows = [(first + step, step + 1, ids, loads[:, step]) for step in range(loads.shape[1])]
            for ahead in LEARNT_AHEAD:
                step = ahead - 1
                if (
                    step < loads.shape[1]
                    and (moved := (unraised[:, step] != quantiles[:, step]).any(axis=(1, 2))).any()
                ):
                    rows.append((first + step, _UNRAISED[ahead], ids[moved], unraised[moved, step, :_LOADS]))
            db.executemany(
                "insert or ignore into forecasts values (?, ?, ?)",
                [(window << 4 | ahead, pack_ids(ids), pack(values, _BITS)) for window, ahead, ids, values in rows],
            )
            # Of a clock that had leapt far ahead, and is right again: they would count as the newest.
            db.execute("delete from forecasts where id >= ?", (first + KEEP_WINDOWS << 4,))
            self._saved += 1
            if self._saved % _TRIM_EVERY == 1:
                windows = db.execute("select distinct id >> 4 from forecasts order by 1 desc").fetchall()
                if len(windows) > KEEP_WINDOWS:
                    db.execute("delete from forecasts where id < ?", (windows[KEEP_WINDOWS][0] + 1 << 4,))

    def of(self, models: Sequence[str], first: int, last: int, ahead: int) -> Floats:
        """What was forecast of each model for windows `first` to `last`, so many windows ahead (1 to 12).

        Shape (models, windows, 2, 3): mean and peak load, by quantile; NaN where nothing is kept.
        """
        return self._read(models, first, last, ahead)

    def unraised(self, models: Sequence[str], first: int, last: int, ahead: int) -> Floats:
        """The same, one of LEARNT_AHEAD windows ahead, as it would have been without announcements."""
        values = self._read(models, first, last, ahead)
        without = self._read(models, first, last, _UNRAISED[ahead])
        result: Floats = np.where(np.isnan(without), values, without)
        return result

    def unannounced(self, models: Sequence[str], first: int, last: int, ahead: int) -> Floats:
        """The same where nothing was announced; NaN where something was, and where nothing is kept."""
        values = self._read(models, first, last, ahead)
        values[~np.isnan(self._read(models, first, last, _UNRAISED[ahead]))] = np.nan
        return values

    def span(self) -> tuple[int, int]:
        """The numbers of the first and the last window of which forecasts are kept; of none, the last is before the
        first."""
        with self._database.reading() as db:
            first, last = db.execute("select min(id) >> 4, max(id) >> 4 from forecasts").fetchone()
        return (0, -1) if first is None else (max(first, last - 2 * KEEP_WINDOWS), last)

    def models(self) -> list[str]:
        """Models of which there are forecasts."""
        with self._database.reading() as db:
            names = {number: name for name, number in self._database.known_ids().items()}
            rows = db.execute("select distinct models from forecasts where id & 15 = 1").fetchall()
        numbers = {number for (ids,) in rows for number in unpack_ids(ids).tolist()}
        return sorted(names[number] for number in numbers if number in names)

    def _read(self, models: Sequence[str], first: int, last: int, ahead: int) -> Floats:
        values = np.full((len(models), last - first + 1, _LOADS, len(LEVELS)), np.nan)
        with self._database.reading() as db:
            ids = self._database.known_ids()
            row_of = np.full(max(ids.values(), default=0) + 1, -1)
            for row, name in enumerate(models):
                if name in ids:
                    row_of[ids[name]] = row
            rows = db.execute(
                "select id, models, data from forecasts where id between ? and ? and id & 15 = ?",
                (first << 4, last << 4 | 15, ahead),
            )
            for number, saved, data in rows:
                saved_ids = unpack_ids(saved)
                to = np.where(saved_ids < len(row_of), row_of[np.minimum(saved_ids, len(row_of) - 1)], -1)
                if (chosen := to >= 0).any():
                    kept = unpack(data, len(saved_ids), _LOADS, len(LEVELS))
                    values[to[chosen], (number >> 4) - first] = kept[chosen]
        return values


class EndedAnnouncements:
    """What came of announcements that have ended."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def save(self, score: forecast_pb2.CalendarScore) -> None:
        """Keeps a score; one that was kept before of the same entry stays."""
        entry = score.entry
        row = (entry.model, entry.id, entry.start_unix_s + entry.duration_s, score.SerializeToString())
        with self._database.transaction() as db:
            db.execute("insert or ignore into announcements values (?, ?, ?, ?)", row)
            db.execute(
                "delete from announcements where ended_s < (select ended_s from announcements order by ended_s desc "
                f"limit 1 offset {_KEEP_ENDED})"
            )

    def since(self, unix_s: float, models: Sequence[str] = ()) -> list[forecast_pb2.CalendarScore]:
        """Of entries that ended after a moment, of these models or all, in order of time."""
        with self._database.reading() as db:
            rows = db.execute(
                "select score from announcements where ended_s > ? order by ended_s, model, id", (unix_s,)
            ).fetchall()
        scores = [forecast_pb2.CalendarScore.FromString(score) for (score,) in rows]
        return [score for score in scores if not models or score.entry.model in models]

    def of_clients(self, model: str, count: int) -> list[tuple[float, float]]:
        """Of a model's newest client hints of which it is known what came: the announced load, and the largest."""
        with self._database.reading() as db:
            rows = db.execute(
                "select score from announcements where model = ? order by ended_s desc", (model,)
            ).fetchall()
        scores = [forecast_pb2.CalendarScore.FromString(score) for (score,) in rows]
        return [
            (score.entry.load, score.actual_peak)
            for score in scores
            if score.entry.source == cluster_pb2.CALENDAR_SOURCE_CLIENT and score.HasField("actual_peak")
        ][:count]
