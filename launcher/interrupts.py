"""Ctrl-C, SIGTERM and a closed terminal end a command in order."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class InterruptedBySignal(Exception):
    """The command was ended by a signal, and has cleaned up."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(f"ended by {number.name}")
        self.number = number


def run(main: Coroutine[Any, Any, T]) -> T:
    """Runs `main` in a new event loop. A signal cancels it; a second one cancels what it does to clean up.

    Raises InterruptedBySignal when it has ended because of that.
    """

    async def guarded() -> T:
        loop = asyncio.get_running_loop()
        task = asyncio.ensure_future(main)
        caught: list[signal.Signals] = []

        def stop(number: signal.Signals) -> None:
            caught.append(number)
            task.cancel()

        for number in _SIGNALS:
            loop.add_signal_handler(number, stop, number)
        try:
            return await task
        except asyncio.CancelledError:
            if caught:
                raise InterruptedBySignal(caught[0]) from None
            raise

    return asyncio.run(guarded())
