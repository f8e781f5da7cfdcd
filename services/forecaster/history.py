"""Load history on the forecaster's disk.

The newest windows lie one in a row, all models together; once a block of them is full they go into one compressed row
per model. Blocks grow old: after `full_s` their windows are joined into hours, after `keep_s` they are forgotten. Both
count blocks that hold something, and no clock: one that leaps ahead makes nothing old.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.forecaster.blocks import BLOCK, Array, hourly, joined, pack, pack_ids, unpack, unpack_ids
from services.forecaster.database import Database
from services.forecaster.predictors import QUANTITIES, Floats

_WIDTH = len(QUANTITIES)
_BITS = 15
_FEW = 20  # models that are read one by one
_MOST_CACHED = 2_000  # models of a block that is kept in memory: 160 kB each for 28 days of 300 s
_MODELS = 1 << 20  # more cannot be told apart in the number of a block's row


@dataclass(frozen=True)
class Seen:
    """What was read of one window's counters."""

    times: int  # how often they had been written
    total_s: float  # how long all routers together had looked
    missing: frozenset[str] = frozenset()  # routers that should have reported, and had not


class History:
    """Windows by number (see services.common.load.window_index), per model. NaN is what nobody counted."""

    def __init__(self, database: Database, full_s: float, keep_s: float) -> None:
        """`full_s`, `keep_s`: seconds for which windows are kept as they are, and at all."""
        self._database = database
        span = BLOCK * database.window_s
        self._full = math.ceil(full_s / span) + 1
        self._keep = max(self._full, math.ceil(keep_s / span) + 1)
        self._factor = hourly(database.window_s)
        self._cache: dict[int, tuple[int, NDArray[np.int64], Array]] = {}  # blocks as read, of all their models
        if database.old_format:
            self._migrate()

    @property
    def window_s(self) -> float:
        """Length of a window, in seconds."""
        return self._database.window_s

    def seen(self) -> dict[int, Seen]:
        """What was read last of each window's counters."""
        with self._database.reading() as db:
            rows = db.execute("select window, times, total_s, missing from windows").fetchall()
        return {
            window: Seen(times, total_s, frozenset(missing.split(",")) - {""})
            for window, times, total_s, missing in rows
        }

    def record(self, window: int, values: Mapping[str, Sequence[float]], seen: Seen) -> None:
        """Records a window, by model, columns as in QUANTITIES. What it held of these models is replaced."""
        with self._database.transaction() as db:
            row = (window, seen.times, seen.total_s, ",".join(sorted(seen.missing)))
            db.execute("insert or replace into windows values (?, ?, ?, ?)", row)
            if values:
                ids = self._database.model_ids(list(values))
                data = np.array(list(values.values()), np.float32)
                self._write_recent(window, dict(zip(ids, data, strict=True)))
                self._file_away(window // BLOCK * BLOCK)

    def forget_seen(self, before: int) -> None:
        """Forgets what was read of the counters of windows before a number, of which Redis has none any more."""
        with self._database.transaction() as db:
            db.execute("delete from windows where window < ?", (before,))

    def add(self, values: Mapping[str, tuple[NDArray[np.int64], NDArray[np.floating]]]) -> None:
        """Adds windows of the past, all or none: by model their numbers, of shape (n,), and values, of shape (n, 5).

        What was known of them is replaced.
        """
        with self._database.transaction():
            self._file_away(None)
            ids = self._database.model_ids(list(values))
            for number, (windows, data) in zip(ids, values.values(), strict=True):
                for block in np.unique(windows // BLOCK).tolist():
                    inside = windows // BLOCK == block
                    part = np.full((BLOCK, _WIDTH), np.nan, np.float32)
                    part[windows[inside] % BLOCK] = data[inside]
                    self._merge(block, number, part)
            self._grow_old()

    def series(self, models: Sequence[str], last: int, windows: int) -> Floats:
        """Windows of several models, up to `windows` of them, of which that numbered `last` is the last.

        Shape (models, n, 5), columns as in QUANTITIES, NaN where unknown; it begins with the first that is known of
        any, so n may be 0.
        """
        first = last - windows + 1
        values = np.full((len(models), windows, _WIDTH), np.nan, np.float32)
        with self._database.reading():
            ids = self._database.known_ids()
            rows = {ids[name]: row for row, name in enumerate(models) if name in ids}
            for block in range(first // BLOCK, last // BLOCK + 1):
                begin, end = max(first, block * BLOCK), min(last + 1, (block + 1) * BLOCK)
                factor, numbers, parts = self._block(block, rows)
                chosen = [(rows[number], at) for at, number in enumerate(numbers.tolist()) if number in rows]
                if chosen:
                    to, source = np.array(chosen).T
                    whole = np.repeat(parts[source], factor, axis=1) if factor > 1 else parts[source]
                    values[to, begin - first : end - first] = whole[:, begin - block * BLOCK : end - block * BLOCK]
            self._cache = {block: kept for block, kept in self._cache.items() if block >= first // BLOCK}
            for window, recent_ids, recent in self._recent(first, last):
                chosen = [(rows[number], row) for row, number in enumerate(recent_ids.tolist()) if number in rows]
                if chosen:
                    to, source = np.array(chosen).T
                    values[to, window - first] = recent[source]
        known = np.flatnonzero(~np.isnan(values[:, :, 0]).all(axis=0))
        return (values[:, known[0] :] if len(known) else values[:, :0]).astype(float)

    def windows(self, model: str, first: int, last: int) -> list[tuple[int, int, list[float]]]:
        """What is known of one model: (number of the first window, windows joined, values), oldest first."""
        found: dict[int, tuple[int, list[float]]] = {}
        with self._database.reading() as db:
            number = self._database.known_ids().get(model)
            if number is None:
                return []
            spans = "select block from spans where block between ? and ? order by block"
            for (block,) in db.execute(spans, (first // BLOCK, last // BLOCK)).fetchall():
                factor, _, parts = self._block(block, {number})
                for part in parts:
                    for row in np.flatnonzero(~np.isnan(part[:, 0])).tolist():
                        found[block * BLOCK + row * factor] = (factor, part[row].tolist())
            for window, ids, values in self._recent(first, last):
                if len(at := np.flatnonzero(ids == number)):
                    found[window] = (1, values[at[0]].tolist())
        return [(window, *found[window]) for window in sorted(found) if first - found[window][0] < window <= last]

    def known_windows(self, last: int, most: int) -> int:
        """How many windows there are from the first that is known of any model, or the last `most`, to `last`."""
        with self._database.reading() as db:
            blocks = db.execute("select block from spans where block >= ?", ((last - most) // BLOCK,)).fetchall()
            recent = db.execute("select min(window) from recent where window > ?", (last - most,)).fetchone()[0]
        firsts = [block * BLOCK for (block,) in blocks] + ([] if recent is None else [recent])
        return 0 if not firsts else max(0, min(most, last - min(firsts) + 1))

    def models(self) -> list[str]:
        """Names of all models of which anything is known."""
        return sorted(self._database.known_ids())

    def knows(self, model: str) -> bool:
        """Whether anything was ever recorded of a model."""
        return model in self._database.known_ids()

    def _block(self, block: int, ids: Collection[int]) -> tuple[int, NDArray[np.int64], Array]:
        """Of a block: how many windows are joined into one, the numbers of the models in it (of those asked for at
        least), and their windows, shape (models, windows, 5)."""
        with self._database.reading() as db:
            span = db.execute("select joined from spans where block = ?", (block,)).fetchone()
            factor = 1 if span is None else span[0]
            few = len(ids) <= _FEW
            if not few and block in self._cache:
                return self._cache[block]
            if few:
                one = f"select id, data from {_table(factor)} where id = ?"
                rows = [row for number in ids for row in db.execute(one, (block * _MODELS + number,))]
            else:
                rows = self._rows(block, factor)
            numbers = np.array([row % _MODELS for row, _ in rows], np.int64)
            values = np.empty((len(rows), BLOCK // factor, _WIDTH), np.float32)
            for at, (_, data) in enumerate(rows):
                values[at] = unpack(data, BLOCK // factor, _WIDTH)
            if not few and span is not None and len(rows) <= _MOST_CACHED:
                self._cache[block] = (factor, numbers, values)
            return factor, numbers, values

    def _rows(self, block: int, factor: int) -> list[tuple[int, bytes]]:
        with self._database.reading() as db:
            between = (block * _MODELS, (block + 1) * _MODELS)
            return db.execute(f"select id, data from {_table(factor)} where id >= ? and id < ?", between).fetchall()

    def _recent(self, first: int, last: int) -> list[tuple[int, NDArray[np.int64], Array]]:
        with self._database.reading() as db:
            rows = db.execute(
                "select window, models, data from recent where window between ? and ?", (first, last)
            ).fetchall()
        return [(window, unpack_ids(models), unpack(data, -1, _WIDTH)) for window, models, data in rows]

    def _write_recent(self, window: int, values: dict[int, Array]) -> None:
        with self._database.transaction() as db:
            for _, ids, before in self._recent(window, window):
                values = {**dict(zip(ids.tolist(), before, strict=True)), **values}
            ids = np.array(sorted(values))
            data = pack(np.array([values[number] for number in ids.tolist()]), _BITS)
            db.execute("insert or replace into recent values (?, ?, ?)", (window, pack_ids(ids), data))

    def _file_away(self, before: int | None) -> None:
        """Puts the newest windows, or those before a number, into blocks."""
        with self._database.transaction() as db:
            newest = db.execute("select min(window), max(window) from recent").fetchone()
            if newest[0] is None or (before is not None and newest[0] >= before):
                return
            last = newest[1] if before is None else before - 1
            parts: dict[tuple[int, int], Array] = {}
            for window, ids, values in self._recent(newest[0], last):
                for number, row in zip(ids.tolist(), values, strict=True):
                    key = (window // BLOCK, number)
                    if key not in parts:
                        parts[key] = np.full((BLOCK, _WIDTH), np.nan, np.float32)
                    parts[key][window % BLOCK] = row
            for (block, number), part in parts.items():
                self._merge(block, number, part)
            db.execute("delete from recent where window <= ?", (last,))
            self._grow_old()

    def _merge(self, block: int, number: int, part: Array) -> None:
        """Lays the known windows of a full block over what is there."""
        with self._database.transaction() as db:
            db.execute("insert or ignore into spans values (?, 1)", (block,))
            factor = db.execute("select joined from spans where block = ?", (block,)).fetchone()[0]
            part = joined(part, factor) if factor > 1 else part
            for before in self._block(block, {number})[2]:
                part = np.where(np.isnan(part), before, part)
            row = (block * _MODELS + number, pack(part, _BITS))
            db.execute(f"insert or replace into {_table(factor)} values (?, ?)", row)
            self._cache.pop(block, None)

    def _grow_old(self) -> None:
        """Joins windows of old blocks into hours, and forgets the oldest."""
        with self._database.transaction() as db:
            spans = db.execute("select block, joined from spans order by block desc").fetchall()
            for block, factor in spans[self._full : self._keep]:
                if factor == 1 and self._factor > 1:
                    new = [
                        (row, pack(joined(unpack(data, BLOCK, _WIDTH), self._factor), _BITS))
                        for row, data in self._rows(block, factor)
                    ]
                    db.executemany("insert or replace into hours values (?, ?)", new)
                    db.execute("update spans set joined = ? where block = ?", (self._factor, block))
                    self._delete(block, "blocks")
            for block, factor in spans[self._keep :]:
                self._delete(block, _table(factor))
                db.execute("delete from spans where block = ?", (block,))
            if spans[self._keep :]:
                # Models of which nothing is left.
                left = {row % _MODELS for (row,) in db.execute("select id from blocks union all select id from hours")}
                left |= {number for _, ids, _ in self._recent(0, 1 << 62) for number in ids.tolist()}
                gone = set(self._database.known_ids().values()) - left
                db.executemany("delete from models where id = ?", [(number,) for number in gone])

    def _delete(self, block: int, table: str) -> None:
        with self._database.transaction() as db:
            db.execute(f"delete from {table} where id >= ? and id < ?", (block * _MODELS, (block + 1) * _MODELS))
            self._cache.pop(block, None)

    def _migrate(self) -> None:
        """Takes over what the first version of this program recorded, one row per model and window."""
        window_s = self.window_s
        with self._database.transaction() as db:
            columns = ", ".join(QUANTITIES)
            for (model,) in db.execute("select distinct model from old_loads").fetchall():
                rows = db.execute(
                    f"select start_s, {columns} from old_loads join old_windows using (start_s) "
                    "where model = ? and not gap",
                    (model,),
                ).fetchall()
                if rows:
                    table = np.array(rows, float)
                    self.add({model: (np.floor(table[:, 0] / window_s + 0.5).astype(np.int64), table[:, 1:])})
            db.execute("drop table old_loads")
            db.execute("drop table old_windows")


def _table(factor: int) -> str:
    return "blocks" if factor == 1 else "hours"
