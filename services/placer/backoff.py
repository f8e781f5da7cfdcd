"""What failed a moment ago and is not tried again yet, longer each time. Pure: every method is told the time."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
_FIRST_S = 0.25
_MOST_S = 30.0


@dataclass
class _Failure:
    times: int
    until: float
    text: str


@dataclass
class Backoff(Generic[K]):
    """Pauses by key: a quarter of a second after the first failure, twice as long after each further one."""

    _failures: dict[K, _Failure] = field(default_factory=dict)

    def failed(self, key: K, text: str, now: float) -> None:
        """It failed, with these words."""
        times = self._failures[key].times + 1 if key in self._failures else 1
        pause = min(_MOST_S, _FIRST_S * 2 ** min(times - 1, 16))
        self._failures[key] = _Failure(times, now + pause, text)

    def succeeded(self, key: K) -> None:
        """It went well: the next failure is a first one again."""
        self._failures.pop(key, None)

    def refused(self, now: float) -> dict[K, str]:
        """What is not to be tried now, with what failed."""
        return {key: failure.text for key, failure in self._failures.items() if failure.until > now}

    def forget(self, gone: Callable[[K], bool]) -> None:
        """Drops the keys that are no more."""
        for key in [key for key in self._failures if gone(key)]:
            del self._failures[key]
