"""The history on disk: what was recorded is there, as it was, for as long as it should be."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from services.forecaster.blocks import BLOCK, joined, pack, unpack
from services.forecaster.database import Database
from services.forecaster.history import History, Seen
from services.forecaster.past import PastForecasts

SEEN = Seen(1, 10.0)
DAY = BLOCK * 300.0


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(tmp_path, 300)
    yield database
    database.close()


def history(database: Database, full_days: float = 28, keep_days: float = 365) -> History:
    return History(database, full_days * DAY, keep_days * DAY)


def values(load: float) -> tuple[float, ...]:
    return load, 2 * load, load / 2, load * 100, load * 10


def loads(history: History, model: str, last: int, windows: int = 10_000) -> list[float]:
    series: list[float] = history.series([model], last, windows)[0, :, 0].tolist()
    return series


def test_windows_are_there_after_a_restart_and_gaps_are_unknown(tmp_path: Path) -> None:
    database = Database(tmp_path, 300)
    first = history(database)
    first.record(1000, {"m": values(4), "n": values(1)}, SEEN)
    first.record(1002, {"m": values(0), "n": values(2)}, SEEN)
    database.close()
    database = Database(tmp_path, 300)
    again = history(database)
    series = again.series(["n", "m", "other"], 1003, 50)
    assert series.shape == (3, 4, 5)
    np.testing.assert_allclose(series[1, 0], values(4))
    np.testing.assert_allclose(series[0, 2], values(2))
    assert (series[1, 2] == 0).all()  # nothing came, and that is known
    assert np.isnan(series[:, [1, 3]]).all()
    assert np.isnan(series[2]).all()
    assert again.series(["other"], 1003, 50).shape == (1, 0, 5)
    assert again.seen() == {1000: SEEN, 1002: SEEN}
    database.close()


def test_a_window_recorded_again_is_replaced(database: Database) -> None:
    one = history(database)
    one.record(1000, {"m": values(4), "n": values(1)}, SEEN)
    one.record(1000, {"m": values(5)}, SEEN)
    assert loads(one, "m", 1000) == [5]
    assert loads(one, "n", 1000) == [1]  # of which nothing new was said


def test_windows_come_out_of_order_and_late(database: Database) -> None:
    one = history(database)
    for window in (1000, 2000, 1500, 3000, 1001):  # days apart, so that blocks are written in between
        one.record(window, {"m": values(window)}, SEEN)
    series = one.series(["m"], 3000, 2001)[0, :, 0]
    assert {window: series[window - 1000] for window in (1000, 1001, 1500, 2000, 3000)} == {
        window: window for window in (1000, 1001, 1500, 2000, 3000)
    }
    assert np.isnan(series).sum() == 2001 - 5


def test_old_windows_are_joined_into_hours_and_the_oldest_are_forgotten(database: Database) -> None:
    one = history(database, full_days=2, keep_days=5)
    windows = np.arange(8 * BLOCK)
    data = np.stack([values(float(window % 12)) for window in windows])
    one.add({"m": (windows, data), "gone": (windows[:100], data[:100])})
    found = one.windows("m", 0, int(windows[-1]))
    assert {joined for _, joined, _ in found} == {1, 12}
    hours = [(window, row) for window, joined, row in found if joined == 12]
    days = [window for window, joined, _ in found if joined == 1]
    assert (hours[0][0], days[0]) == (2 * BLOCK, 5 * BLOCK)  # each with the day in progress
    for _, row in hours:
        np.testing.assert_allclose(row, [5.5, 22, 2.75, 550, 55])  # means, and the largest peak
    assert one.models() == ["m"]
    one.record(2 * BLOCK + 5, {"m": values(99)}, SEEN)  # very late: it counts into its hour
    one.record(9 * BLOCK, {"m": values(1)}, SEEN)
    assert one.windows("m", 2 * BLOCK, 2 * BLOCK + 11)[0][1] == 12


def test_a_clock_that_leaps_ahead_makes_nothing_old(database: Database) -> None:
    one = history(database, full_days=2, keep_days=5)
    for window in range(1000, 1400):
        one.record(window, {"m": values(1)}, SEEN)
    one.record(1_000_000, {"m": values(7)}, SEEN)
    one.record(1_000_000 + 2 * BLOCK, {"m": values(7)}, SEEN)
    assert loads(one, "m", 1399) == [1] * 400
    one.record(1400, {"m": values(2)}, SEEN)  # and the clock is right again
    assert loads(one, "m", 1400) == [1] * 400 + [2]


def test_what_is_imported_replaces_what_was_known(database: Database) -> None:
    one = history(database)
    one.record(1000, {"m": values(4), "n": values(1)}, SEEN)
    one.record(1001, {"m": values(4), "n": values(1)}, SEEN)
    one.add({"m": (np.array([998, 1001]), np.array([values(8), values(9)]))})
    assert loads(one, "m", 1001)[0] == 8
    np.testing.assert_array_equal(loads(one, "m", 1001), [8, np.nan, 4, 9])
    assert loads(one, "n", 1001) == [1, 1]


def test_an_import_that_fails_leaves_nothing(database: Database) -> None:
    one = history(database)
    good = (np.array([1000]), np.array([values(1)]))
    with pytest.raises(ValueError, match="shape"):
        one.add({"a": good, "b": (np.array([1000]), np.zeros((1, 2)))})
    assert one.models() == []
    assert one.series(["a"], 1000, 5).shape[1] == 0


def test_another_window_length_is_refused(tmp_path: Path) -> None:
    Database(tmp_path, 10).close()
    with pytest.raises(ValueError, match="windows of 10 s and not of 20 s"):
        Database(tmp_path, 20)
    Database(tmp_path, 10).close()


def test_a_newer_versions_file_is_refused(tmp_path: Path) -> None:
    Database(tmp_path, 10).close()
    with sqlite3.connect(tmp_path / "history.sqlite") as db:
        db.execute("pragma user_version = 99")
    with pytest.raises(ValueError, match="newer version"):
        Database(tmp_path, 10)


def test_a_history_of_the_first_version_is_taken_over(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "history.sqlite") as db:
        db.executescript(
            """
            create table settings (name text primary key, value real) without rowid;
            create table windows (start_s integer primary key, gap integer not null) without rowid;
            create table loads (
                model text, start_s integer, mean_load real, peak_load real, request_rate real,
                prompt_tokens_per_s real, output_tokens_per_s real, primary key (model, start_s)
            ) without rowid;
            insert into settings values ('window_s', 300);
            insert into windows values (300000, 0), (300300, 1), (300600, 0);
            insert into loads values ('m', 300000, 1, 2, 3, 4, 5), ('m', 300600, 6, 7, 8, 9, 10);
            """
        )
    db.close()
    for _ in range(2):
        database = Database(tmp_path, 300)
        one = history(database)
        np.testing.assert_array_equal(one.series(["m"], 1002, 9)[0], [[1, 2, 3, 4, 5], [np.nan] * 5, [6, 7, 8, 9, 10]])
        database.close()


@given(hnp.arrays(np.float32, (6, 5), elements=st.one_of(st.just(np.nan), st.floats(0, 2.0**100, width=32))))
def test_packing_keeps_four_digits_and_all_gaps(array: np.ndarray) -> None:
    found = unpack(pack(array, 15), 6, 5)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(array))
    np.testing.assert_allclose(found, array, rtol=2**-15, atol=1e-38)


def test_joining_knows_gaps() -> None:
    hour = np.full((12, 5), np.nan)
    hour[:5] = 1
    assert np.isnan(joined(hour, 12)).all()  # fewer than half are known
    hour[5] = 7
    np.testing.assert_array_equal(joined(hour, 12), [[2, 7, 2, 2, 2]])


def test_past_forecasts_are_kept_as_first_made_and_bounded(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.forecaster.past.KEEP_WINDOWS", 30)
    past = PastForecasts(database)
    for first in range(1000, 1100):
        made = np.full((2, 12, 5, 3), float(first))
        made[1] *= 2
        past.save(first, ["a", "b"], made, made)
    past.save(1099, ["a"], np.zeros((1, 12, 5, 3)), np.zeros((1, 12, 5, 3)))  # again in the same window
    np.testing.assert_allclose(past.of(["b"], 1098, 1100, 1)[0, :, 1, 2], [2196, 2198, np.nan], rtol=1e-3)
    np.testing.assert_allclose(past.of(["a"], 1110, 1111, 12)[0, :, 0, 0], [1099, np.nan], rtol=1e-3)
    assert past.models() == ["a", "b"]
    first, last = past.span()
    assert last == 1110
    assert 1110 - 30 - 16 <= first <= 1110 - 30


def test_what_was_forecast_without_announcements_is_kept_where_it_differs(database: Database) -> None:
    past = PastForecasts(database)
    plain = np.ones((2, 12, 5, 3))
    raised = plain.copy()
    raised[0] += 4
    past.save(1000, ["a", "b"], raised, plain)
    assert past.of(["a"], 1000, 1000, 1)[0, 0, 0, 0] == 5
    assert past.unraised(["a"], 1000, 1000, 1)[0, 0, 0, 0] == 1
    assert past.unraised(["b"], 1000, 1000, 1)[0, 0, 0, 0] == 1
    assert past.unannounced(["b", "a"], 1000, 1000, 1)[:, 0, 0, 0].tolist() == pytest.approx([1, np.nan], nan_ok=True)


def test_a_clock_that_had_leapt_far_ahead_does_not_hide_what_is_forecast_now(database: Database) -> None:
    past = PastForecasts(database)
    made = np.ones((1, 12, 5, 3))
    for first in (1000, 1001 + 10_000_000, 1001):
        past.save(first, ["a"], made, made)
    assert past.span() == (1000, 1012)


def test_many_models_are_read_as_they_are_now(database: Database) -> None:
    one = history(database)
    names = [f"m{number}" for number in range(30)]
    for window in (1000, 1001, 2000):  # the first two are in a block by then
        one.record(window, {name: values(number) for number, name in enumerate(names)}, SEEN)
    np.testing.assert_array_equal(one.series(names, 2000, 1001)[:, 0, 0], np.arange(30))
    one.record(1000, {"m7": values(99)}, SEEN)  # late
    one.record(2001, {"new": values(5)}, SEEN)
    one.add({"new": (np.array([1001]), np.array([values(6)]))})
    series = one.series([*names, "new"], 2001, 1002)
    assert series[7, 0, 0] == 99
    assert series[8, 0, 0] == 8
    assert series[30, 1, 0] == 6
