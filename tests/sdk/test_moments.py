"""Times as people write them, in a zone that has summer time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest

from warmserve.admin.moments import distance, length, parse_duration, parse_moment, spell, spell_unix


@pytest.fixture(autouse=True)
def berlin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


NOW = datetime(2026, 10, 24, 13, 0, tzinfo=UTC)  # 15:00 CEST, on the day before summer time ends


@pytest.mark.parametrize(
    ("text", "moment", "told"),
    [
        ("16:30", "2026-10-24 16:30 CEST", ""),
        ("14:00", "2026-10-25 14:00 CET", "14:00 has passed today, so tomorrow is meant"),
        ("15:00", "2026-10-25 15:00 CET", "15:00 has passed today, so tomorrow is meant"),
        ("9:05:30", "2026-10-25 09:05:30 CET", "9:05:30 has passed today, so tomorrow is meant"),
        ("now", "2026-10-24 15:00 CEST", ""),
        ("+1h30m", "2026-10-24 16:30 CEST", ""),
        ("2026-10-24T15:01", "2026-10-24 15:01 CEST", ""),
        ("2026-12-24", "2026-12-24 00:00 CET", ""),
        ("2026-12-24 14:00", "2026-12-24 14:00 CET", ""),
        ("2026-12-24T14:00Z", "2026-12-24 15:00 CET", ""),
        ("2026-12-24T14:00-05:00", "2026-12-24 20:00 CET", ""),
    ],
)
def test_moments(text: str, moment: str, told: str) -> None:
    found, note = parse_moment(text, NOW.astimezone())
    assert (spell(found), note) == (moment, told)
    assert found.tzinfo is not None


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("2026-10-24T14:00", "2026-10-24 14:00 CEST has passed .1 h 0 min ago."),
        ("25:00", "no time of day"),
        ("soon", "write for example 14:00"),
        ("", "write for example 14:00"),
        ("+", "no length of time"),
        ("+0m", "above 0"),
    ],
)
def test_what_is_no_moment_to_come(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        parse_moment(text, NOW.astimezone())


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90s", 90), ("15m", 900), ("1h30m", 5400), ("1h 30min", 5400), ("2d", 172_800), ("1.5h", 5400)],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "h", "-5m", "5 parsecs", "0", "5m!", "nan", "9999999d"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="no length of time"):
        parse_duration(text)


def test_for_people() -> None:
    assert [length(s) for s in (45, 600, 3600, 5400, 86_400)] == ["45 s", "10 min", "1 h", "1 h 30 min", "1 d"]
    assert [distance(unix_s, 1000) for unix_s in (1000.4, 1010, 940)] == ["now", "in 10 s", "1 min ago"]
    assert spell_unix(0) == "1970-01-01 01:00 CET"
