"""Ending tasks."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

_AGAIN_S = 0.2


async def end_tasks(tasks: Iterable[asyncio.Task[Any] | None]) -> None:
    """Cancels tasks, and returns once they have ended; what they raise is theirs.

    They are asked again, because before Python 3.12 `asyncio.wait_for`, which redis-py uses, may swallow a
    cancellation.
    """
    left = {task for task in tasks if task is not None}
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=_AGAIN_S)
