"""Times and numbers as traces write them. All raise ValueError, saying what was expected."""

from __future__ import annotations

import math
from datetime import UTC, datetime

TYPICAL_PROMPT_TOKENS = 1020
TYPICAL_OUTPUT_TOKENS = 129
"""Medians of Azure's conversation trace of 2023: taken where a trace tells no lengths."""

# From where on a number is taken to count a part of a second: as seconds each would be the year 5138 or later.
_PARTS = ((1e17, 1e9), (1e14, 1e6), (1e11, 1e3))


def time_of(value: str | float) -> float:
    """Seconds: a number as it is, or from 1e11 on as milli-, micro- or nanoseconds; a date as Unix time.

    A date without a zone is taken as UTC.
    """
    if isinstance(value, str) and (value[4:5] == "-" or not _is_number(value)):
        try:
            moment = datetime.fromisoformat(value.strip())
        except ValueError:
            raise _no_time(value) from None
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    seconds = number_of(value, "time")
    seconds /= next((parts for least, parts in _PARTS if seconds >= least), 1.0)
    if seconds >= _PARTS[-1][0]:
        raise _no_time(value)
    return seconds


def _no_time(value: str | float) -> ValueError:
    return ValueError(f"{value!r} is no time: write seconds, or a date such as 2024-05-10 00:00:00.5")


def tokens_of(value: str | float, name: str) -> int:
    """A count of tokens, at least 0."""
    if isinstance(value, str) and value.isdecimal():  # the common case, ten times in a microsecond
        return int(value)
    count = number_of(value, name)
    if count != int(count):
        raise ValueError(f"{name}: {value!r} is not a whole number")
    return int(count)


def number_of(value: str | float, name: str) -> float:
    """A finite number, at least 0."""
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not _is_number(value):
        raise ValueError(f"{name}: {value!r} is not a number")
    number = float(value)
    if not math.isfinite(number) or number < 0:
        raise ValueError(f"{name}: {value!r} is not a number of at least 0")
    return number


def _is_number(value: str | float) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True
