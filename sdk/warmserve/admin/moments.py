"""Moments and lengths of time as people write and read them, in the zone of this machine."""

from __future__ import annotations

import re
from datetime import datetime, time, timedelta

from warmserve.admin import units

_UNITS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86_400, "w": 604_800}
_PART = re.compile(r"(\d+(?:\.\d+)?)\s*(s|min|m|h|d|w)\s*")


def parse_duration(text: str) -> float:
    """Seconds, above 0: 90, 90s, 15m, 1h30m, 2d, 1w. Raises ValueError."""
    rest, seconds = text.strip().lower(), 0.0
    if re.fullmatch(r"\d+(\.\d+)?", rest):
        rest, seconds = "", float(rest)
    while rest:
        part = _PART.match(rest)
        if part is None:
            raise ValueError(f"{text!r} is no length of time: write for example 90s, 15m, 1h30m or 2d")
        seconds += float(part[1]) * _UNITS[part[2]]
        rest = rest[part.end() :]
    if not 0 < seconds <= 10 * 365 * 86_400:
        raise ValueError(f"{text!r} is no length of time: it must be above 0, and at most ten years")
    return seconds


def parse_moment(text: str, now: datetime) -> tuple[datetime, str]:
    """The moment, in local time, and what to tell about how it was understood ("" where nothing).

    14:00 or 14:00:30 (today, or tomorrow where it has passed), 2026-12-24, 2026-12-24T14:00 with or without a zone,
    now, +30m. Raises ValueError where it is none, or has passed.
    """
    written = text.strip()
    if written.lower() == "now":
        return now, ""
    if written.startswith("+"):
        return now + timedelta(seconds=parse_duration(written[1:])), ""
    clock = _clock(written)
    if clock is not None:
        moment = datetime.combine(now.date(), clock).astimezone()
        if moment > now:
            return moment, ""
        tomorrow = now.date() + timedelta(days=1)
        return datetime.combine(tomorrow, clock).astimezone(), f"{written} has passed today, so tomorrow is meant"
    try:
        moment = datetime.fromisoformat(written).astimezone()
    except ValueError:
        raise ValueError(
            f"{text!r} is no time: write for example 14:00, 2026-12-24T14:00, 2026-12-24T14:00+01:00, now or +30m"
        ) from None
    if moment <= now:
        raise ValueError(f"{spell(moment)} has passed ({units.duration(1000 * (now - moment).total_seconds())} ago)")
    return moment, ""


def spell(moment: datetime) -> str:
    """A moment with its zone: 2026-12-24 14:00 CET."""
    return moment.strftime("%Y-%m-%d %H:%M:%S %Z" if moment.second else "%Y-%m-%d %H:%M %Z")


def spell_unix(unix_s: float) -> str:
    """The same of Unix seconds, in local time."""
    return spell(datetime.fromtimestamp(unix_s).astimezone())


def distance(unix_s: float, now_s: float) -> str:
    """How far away a moment is: in 2 h 5 min, 10 s ago, now."""
    ahead_s = round(unix_s - now_s)
    if ahead_s == 0:
        return "now"
    return f"in {length(ahead_s)}" if ahead_s > 0 else f"{length(-ahead_s)} ago"


def length(seconds: float) -> str:
    """A length without what is 0: 1 h, 1 h 30 min, 45 s."""
    words = units.duration(1000 * seconds)
    return re.sub(r"\.0 s$", " s", re.sub(r" 0 (s|min|h)$", "", words))


def _clock(text: str) -> time | None:
    if not re.fullmatch(r"\d{1,2}:\d\d(:\d\d)?", text):
        return None
    try:
        return time.fromisoformat(text.zfill(len(text) + 1) if text[1] == ":" else text)
    except ValueError as error:
        raise ValueError(f"{text!r} is no time of day: {error}") from error
