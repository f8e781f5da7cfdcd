"""Load history on the forecaster's disk: one row per model and window, in SQLite."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from services.common.load import LoadCounts

# The quantities of a window, in the order of the columns of `History.series`.
QUANTITIES = ("mean_load", "peak_load", "request_rate", "prompt_tokens_per_s", "output_tokens_per_s")
_SCHEMA = """
create table if not exists settings (name text primary key, value real) without rowid;
create table if not exists windows (start_s integer primary key, gap integer not null) without rowid;
create table if not exists loads (
    model text, start_s integer, mean_load real, peak_load real, request_rate real,
    prompt_tokens_per_s real, output_tokens_per_s real, primary key (model, start_s)
) without rowid;
"""


class History:
    """Windows recorded so far. Recording one again replaces it. Methods touch the disk: call them in threads, of which
    one at a time is let in."""

    def __init__(self, folder: Path, window_s: float) -> None:
        """Opens or makes the history in `folder`. ValueError where it was recorded with another window length."""
        folder.mkdir(parents=True, exist_ok=True)
        self._window_s = window_s
        self._path = folder / "history.sqlite"
        self._lock = threading.Lock()
        self._db = sqlite3.connect(self._path, check_same_thread=False)
        self._db.execute("pragma journal_mode=wal")
        self._db.executescript(_SCHEMA)
        found = self._db.execute("select value from settings where name = 'window_s'").fetchone()
        if found is not None and found[0] != window_s:
            self._db.close()
            raise ValueError(
                f"{self._path} holds windows of {found[0]:g} s and not of {window_s:g} s; use another data folder"
            )
        with self._db:
            self._db.execute("insert or ignore into settings values ('window_s', ?)", (window_s,))

    def newest(self) -> int | None:
        """Begin of the newest recorded window, gaps included, in Unix seconds."""
        with self._lock:
            found: int | None = self._db.execute("select max(start_s) from windows").fetchone()[0]
        return found

    def record(self, start_s: int, counts: Mapping[str, LoadCounts] | None) -> None:
        """Records one window of all models; None for a gap, in which nobody counted."""
        rows = [
            (
                model,
                start_s,
                count.load_seconds / self._window_s,
                float(count.peak),
                count.arrivals / self._window_s,
                count.prompt_tokens / self._window_s,
                count.output_tokens / self._window_s,
            )
            for model, count in (counts or {}).items()
        ]
        with self._lock, self._db:
            # A window that was counted once stays so, even if its counters have ended since.
            conflict = "do nothing" if counts is None else "do update set gap = 0"
            self._db.execute(
                f"insert into windows values (?, ?) on conflict (start_s) {conflict}", (start_s, counts is None)
            )
            self._db.executemany("insert or replace into loads values (?, ?, ?, ?, ?, ?, ?)", rows)

    def series(self, model: str, last_start_s: int, windows: int) -> NDArray[np.float64]:
        """A model's windows, up to `windows` of them and the one that begins at `last_start_s` last.

        Shape (n, 5), columns as in QUANTITIES, NaN in gaps; n is 0 for a model that has never been recorded.
        """
        first = last_start_s - (windows - 1) * self._window_s
        with self._lock:
            rows = self._db.execute(
                f"select start_s, {', '.join(QUANTITIES)} from loads join windows using (start_s) "
                "where model = ? and start_s between ? and ? and not gap order by start_s",
                (model, first, last_start_s),
            ).fetchall()
        if not rows:
            return np.empty((0, len(QUANTITIES)))
        length = round((last_start_s - rows[0][0]) / self._window_s) + 1
        values = np.full((length, len(QUANTITIES)), np.nan)
        for start_s, *row in rows:
            values[round((start_s - rows[0][0]) / self._window_s)] = row
        return values

    def trim(self, before_s: float) -> None:
        """Forgets windows that began before a moment, in Unix seconds."""
        with self._lock, self._db:
            self._db.execute("delete from loads where start_s < ?", (before_s,))
            self._db.execute("delete from windows where start_s < ?", (before_s,))

    def forget(self, models: Iterable[str]) -> None:
        """Forgets models, so that later ones of the same name begin anew."""
        with self._lock, self._db:
            self._db.executemany("delete from loads where model = ?", [(model,) for model in models])

    def close(self) -> None:
        """Closes the file."""
        with self._lock:
            self._db.close()
