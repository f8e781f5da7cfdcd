"""Numbers for people: sizes, speeds, times, ages, shares, bars."""

from __future__ import annotations

import time
from datetime import datetime


def size(count: float) -> str:
    """Bytes: 1.50 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{_digits(count)} {unit}"
        count /= 1024
    return f"{_digits(count)} TiB"


def speed(bytes_per_s: float) -> str:
    """Bytes per second, in the units in which buses and disks are sold: 54.3 GB/s."""
    for unit in ("B", "kB", "MB"):
        if bytes_per_s < 999.5:
            return f"{bytes_per_s:.0f} B/s" if unit == "B" else f"{_digits(bytes_per_s)} {unit}/s"
        bytes_per_s /= 1000
    return f"{_digits(bytes_per_s)} GB/s"


def quantity(count: float) -> str:
    """A large number of things: 8.03B, 125M."""
    for unit in ("", "K", "M"):
        if count < 999.5:
            return f"{count:.0f}" if unit == "" else f"{_digits(count)}{unit}"
        count /= 1000
    return f"{_digits(count)}B"


def _digits(value: float) -> str:
    """Three significant digits."""
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


def duration(ms: float) -> str:
    """Milliseconds: 350 ms, 1.2 s, 3 min 4 s, 2 h 5 min, 3 d 4 h."""
    if ms < 999.5:
        return f"{ms:.0f} ms"
    seconds = ms / 1000
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86_400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86_400} d {whole % 86_400 // 3600} h"


def age(unix_ms: int, now_ms: int) -> str:
    """How long ago a moment was; "now" where clocks differ so that it seems to come."""
    if not unix_ms:
        return "-"
    return f"{duration(now_ms - unix_ms)} ago" if unix_ms < now_ms else "now"


def clock(unix_ms: int) -> str:
    """A moment in local time."""
    return datetime.fromtimestamp(unix_ms / 1000).strftime("%Y-%m-%d %H:%M:%S")


def share(part: float) -> str:
    """0 to 1 as a percentage. Only what is whole is 100 %."""
    return f"{min(99, round(part * 100)) if part < 1 else 100} %"


def bar(parts: list[tuple[float, str]], total: float, width: int = 24) -> str:
    """A bar of `width` characters: each part drawn in its character, in order; the rest is "░"."""
    if total <= 0:
        return "░" * width
    drawn, done = "", 0.0
    for amount, character in parts:
        done += amount
        drawn += character * (min(width, round(width * done / total)) - len(drawn))
    return drawn + "░" * (width - len(drawn))


def now_ms() -> int:
    """Now, in Unix milliseconds."""
    return time.time_ns() // 1_000_000
