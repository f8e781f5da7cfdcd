"""Virtual time: what is due, in order of time and, at the same time, of arrangement."""

from __future__ import annotations

import heapq
from collections.abc import Callable


class Alarm:
    """Something due once. Cancelled by `Clock.cancel`, or by arranging it anew."""

    __slots__ = ("call", "due", "ticket")

    def __init__(self, call: Callable[[], None]) -> None:
        self.call = call
        self.due = float("inf")
        self.ticket = 0  # of its newest place in the heap; older ones are stale


class Clock:
    """The run's time, in seconds, and its alarms."""

    def __init__(self, start_s: float) -> None:
        self.now = start_s
        self._heap: list[tuple[float, int, Alarm]] = []
        self._tickets = 0

    def set(self, alarm: Alarm, due: float) -> None:
        """Has it called at `due` (now, where that is past), and not at the time it was set to before."""
        self._tickets += 1
        alarm.due = due if due > self.now else self.now
        alarm.ticket = self._tickets
        heapq.heappush(self._heap, (alarm.due, self._tickets, alarm))

    def cancel(self, alarm: Alarm) -> None:
        """It is not called."""
        alarm.ticket = 0
        alarm.due = float("inf")

    def at(self, due: float, call: Callable[[], None]) -> Alarm:
        """Has something called once."""
        alarm = Alarm(call)
        self.set(alarm, due)
        return alarm

    @property
    def next_due(self) -> float:
        """When the next alarm is due; inf where there is none."""
        heap = self._heap
        while heap and heap[0][2].ticket != heap[0][1]:
            heapq.heappop(heap)
        return heap[0][0] if heap else float("inf")

    def step(self) -> None:
        """Calls the next alarm, at its time. There must be one: see next_due."""
        due, _, alarm = heapq.heappop(self._heap)
        self.now = due
        alarm.ticket = 0
        alarm.due = float("inf")
        alarm.call()
