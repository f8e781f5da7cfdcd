"""Whose turn it is to copy weights in: one load at a time, and a wake before any prewarming."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field


@dataclass(eq=False)
class CopyTurn:
    """A load that waits for its turn, or has it. Its thread looks at `cancel` between pages."""

    urgent: bool
    cancel: threading.Event = field(default_factory=threading.Event)


class CopyLane:
    """Hands out turns, urgent ones first, else in order of arrival. An urgent one cuts a running other one short."""

    def __init__(self) -> None:
        self._waiting: list[CopyTurn] = []
        self._current: CopyTurn | None = None
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def turn(self, turn: CopyTurn) -> AsyncIterator[bool]:
        """Waits for the turn and holds it: True. The holder stops soon after `turn.cancel` is set, then may queue anew.

        False, without the turn, where it was withdrawn while it waited.
        """
        self._waiting.append(turn)
        self._preempt()
        try:
            async with self._changed:
                await self._changed.wait_for(
                    lambda: turn.cancel.is_set() or (self._current is None and self._next() is turn)
                )
                ours = not turn.cancel.is_set()
                if ours:
                    self._current = turn
        finally:
            self._waiting.remove(turn)
        try:
            yield ours
        finally:
            if ours:
                self._current = None
            async with self._changed:
                self._changed.notify_all()

    async def withdraw(self, turn: CopyTurn) -> None:
        """Cuts a turn short, waiting or held."""
        turn.cancel.set()
        async with self._changed:
            self._changed.notify_all()

    def hurry(self, turn: CopyTurn) -> None:
        """Makes a turn urgent, waiting or held."""
        turn.urgent = True
        self._preempt()

    def _next(self) -> CopyTurn:
        return next((turn for turn in self._waiting if turn.urgent), self._waiting[0])

    def _preempt(self) -> None:
        current = self._current
        if current is not None and not current.urgent and any(turn.urgent for turn in self._waiting):
            current.cancel.set()
