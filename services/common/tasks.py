"""Tasks in the background: begun so that none fails unseen, and ended so that none goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

from services.common.telemetry import logger

_log = logger(__name__)
_AGAIN_S = 0.2
T = TypeVar("T")


def begin_task(work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
    """Begins a task whose failure is logged when it happens, whether or not anybody awaits it."""
    task = asyncio.create_task(work, name=name)
    task.add_done_callback(_log_failure)
    return task


def _log_failure(task: asyncio.Task[Any]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.error("background task failed", task=task.get_name(), exc_info=error)


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
