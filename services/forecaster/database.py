"""The forecaster's file on disk: SQLite, one process writing and others reading."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_VERSION = 2
_SCHEMA = """
create table settings (name text primary key, value real) without rowid;
-- Models that anything is known of. No number is given twice.
create table models (id integer primary key autoincrement, name text not null unique);
-- What was read last of each window's counters, while Redis has them.
create table windows (window integer primary key, times integer not null, total_s real not null, missing text not null);
-- The newest windows: all models of a window in one row.
create table recent (window integer primary key, models blob not null, data blob not null);
-- All others: a block of windows of one model in one row, id = block << 20 | model. Those that were joined (spans says
-- how many) are in a table of their own, to which they are only ever added at the end, so that its pages are full.
create table spans (block integer primary key, joined integer not null);
create table blocks (id integer primary key, data blob not null);
create table hours (id integer primary key, data blob not null);
-- Forecasts of the past: all models of a window, as forecast so many windows before. id = window << 4 | ahead.
create table forecasts (id integer primary key, models blob not null, data blob not null);
create table announcements (
    model text, id text, ended_s integer not null, score blob not null, primary key (model, id)
) without rowid;
create index announcements_ended on announcements (ended_s);
"""


class Database:
    """The file. Methods touch the disk: call them in threads, of which one at a time is let in."""

    def __init__(self, folder: Path, window_s: float) -> None:
        """Opens or makes the file in `folder`. ValueError where it was made with another window length, or by a newer
        version of this program."""
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "history.sqlite"
        self.window_s = window_s
        self.old_format = False
        """Windows of the first version are there, in tables `old_windows` and `old_loads`."""
        self._lock = threading.RLock()
        self._db = sqlite3.connect(self.path, check_same_thread=False, isolation_level=None, timeout=30)
        try:
            self._open()
        except BaseException:
            self._db.close()
            raise

    def _open(self) -> None:
        self._db.execute("pragma page_size=16384")  # of a new file: rows of some kB fill it well
        self._db.execute("pragma journal_mode=wal")
        self._db.execute("pragma synchronous=normal")
        with self.transaction() as db:
            version = db.execute("pragma user_version").fetchone()[0]
            if version > _VERSION:
                raise ValueError(
                    f"{self.path} was written by a newer version of this program; use that, or another folder"
                )
            tables = {name for (name,) in db.execute("select name from sqlite_master where type = 'table'")}
            if version < _VERSION:
                if "loads" in tables:
                    self._check_window(db)
                    db.execute("drop table settings")
                    db.execute("alter table windows rename to old_windows")
                    db.execute("alter table loads rename to old_loads")
                for statement in _SCHEMA.split(";"):
                    db.execute(statement)
                db.execute(f"pragma user_version = {_VERSION}")
            self._check_window(db)
            db.execute("insert or ignore into settings values ('window_s', ?)", (self.window_s,))
            self.old_format = "loads" in tables or "old_loads" in tables

    def _check_window(self, db: sqlite3.Connection) -> None:
        found = db.execute("select value from settings where name = 'window_s'").fetchone()
        if found is not None and found[0] != self.window_s:
            raise ValueError(
                f"{self.path} holds windows of {found[0]:g} s and not of {self.window_s:g} s; use another data folder"
            )

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Lets one thread in; what it changes is changed as a whole, or not at all where it raises."""
        with self._lock:
            if self._db.in_transaction:  # within another one of this thread
                yield self._db
                return
            self._db.execute("begin immediate")
            try:
                yield self._db
            except BaseException:
                self._db.execute("rollback")
                raise
            self._db.execute("commit")

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Lets one thread in to read; all that it reads is of one moment, though another process may write."""
        with self._lock:
            if self._db.in_transaction:
                yield self._db
                return
            self._db.execute("begin")
            try:
                yield self._db
            finally:
                self._db.execute("commit")

    def model_ids(self, names: list[str]) -> list[int]:
        """The numbers of models, given now to those that have none."""
        with self.transaction() as db:
            known = self.known_ids()
            new = [name for name in dict.fromkeys(names) if name not in known]
            if new:
                db.executemany("insert into models (name) values (?)", [(name,) for name in new])
                known = self.known_ids()
            return [known[name] for name in names]

    def known_ids(self) -> dict[str, int]:
        """The numbers of all models, by name."""
        with self.reading() as db:
            return {name: number for number, name in db.execute("select id, name from models")}

    def close(self) -> None:
        """Closes the file."""
        with self._lock:
            self._db.close()
