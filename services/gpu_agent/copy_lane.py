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
    decided: asyncio.Event = field(default_factory=asyncio.Event)  # it need not wait any more


class CopyLane:
    """Hands out turns, urgent ones first, else in order of arrival. An urgent one cuts a running other one short.

    Whoever changes anything gives the turn on himself: nobody has to wake up to find out that he is next.
    """

    def __init__(self) -> None:
        self._waiting: list[CopyTurn] = []
        self._current: CopyTurn | None = None

    @asynccontextmanager
    async def turn(self, turn: CopyTurn) -> AsyncIterator[bool]:
        """Waits for the turn and holds it: True. The holder stops soon after `turn.cancel` is set, then may queue anew.

        False, without the turn, where it was withdrawn while it waited.
        """
        self._waiting.append(turn)
        self._go_on()
        try:
            await turn.decided.wait()
            yield turn is self._current
        finally:
            if turn in self._waiting:
                self._waiting.remove(turn)
            if turn is self._current:
                self._current = None
            self._go_on()

    def withdraw(self, turn: CopyTurn) -> None:
        """Cuts a turn short, waiting or held."""
        turn.cancel.set()
        if turn in self._waiting:
            self._waiting.remove(turn)
            turn.decided.set()

    def hurry(self, turn: CopyTurn) -> None:
        """Makes a turn urgent, waiting or held."""
        turn.urgent = True
        self._go_on()

    def _go_on(self) -> None:
        """Gives a free turn to who is next, or has a running one make way for an urgent one."""
        following = next((turn for turn in self._waiting if turn.urgent), None)
        if self._current is None and self._waiting:
            self._current = following or self._waiting[0]
            self._waiting.remove(self._current)
            self._current.decided.set()
        elif self._current is not None and following is not None and not self._current.urgent:
            self._current.cancel.set()
