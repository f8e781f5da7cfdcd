"""Whole plans, made in a process of their own: what is decided here meanwhile never waits for the interpreter."""

from __future__ import annotations

import asyncio
import os
import pickle
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

from services.common.telemetry import logger
from services.placer.decisions import Action
from services.placer.planning_frames import LENGTH_BYTES, Begin, Part, Plan, Publish, Published, frame, pieces
from services.placer.snapshot import Model, Snapshot

_log = logger(__name__)
_LIMIT_S = 60.0  # for an answer


class PlanningError(Exception):
    """The planning process gave no answer. The next call starts another one."""


class Planning:
    """The planning process. One call at a time."""

    def __init__(self) -> None:
        self._process: Process | None = None
        self._told: dict[str, Model] = {}  # the models that it knows

    async def start(self) -> None:
        """Starts the process, where there is none, without waiting until it is ready. Raises OSError."""
        if self._process is not None:
            return
        self._told.clear()
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "services.placer.planning_process"),
            stdin=PIPE,
            stdout=PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )

    async def close(self) -> None:
        """Ends the process, whatever it is doing."""
        process, self._process = self._process, None
        if process is not None:
            if process.returncode is None:
                process.kill()
            await process.wait()

    async def plan(self, snapshot: Snapshot) -> list[Action]:
        """The actions of a snapshot's plan. Raises PlanningError."""
        actions: list[Action] = []
        async with self._asking() as process:
            for message in self._messages(snapshot):
                await _send(process, message)
            await _send(process, Plan())
            while (piece := await _receive(process)) is not None:
                actions += piece
        return actions

    async def publish(self, wish: Publish) -> Published | None:
        """The last plan as etcd holds it; None where it is `wish.unless`. Raises PlanningError."""
        async with self._asking() as process:
            await _send(process, wish)
            published: Published | None = await _receive(process)
        return published

    def _messages(self, snapshot: Snapshot) -> Iterator[object]:
        models = snapshot.models
        yield Begin(snapshot.now_s, snapshot.refused, snapshot.rules, snapshot.nodes, tuple(models))
        news = [model for name, model in models.items() if self._told.get(name) is not model]
        self._told = dict(models)
        yield from (Part(models=some) for some in pieces(news))
        yield from (Part(agents=some) for some in pieces(list(snapshot.agents.values())))
        yield from (Part(replicas=some) for some in pieces(snapshot.replicas))

    @asynccontextmanager
    async def _asking(self) -> AsyncIterator[Process]:
        """The process, for one question; one that has not come to its answer is not asked again."""
        await self.start()
        process, answered = self._process, False
        assert process is not None
        try:
            async with asyncio.timeout(_LIMIT_S):
                yield process
            answered = True
        except TimeoutError:
            raise PlanningError(f"the planning process has not answered for {_LIMIT_S:g} s") from None
        except (asyncio.IncompleteReadError, BrokenPipeError, ConnectionResetError):
            status = await process.wait()
            raise PlanningError(f"the planning process has ended with status {status}") from None
        finally:
            if not answered:
                await self.close()


async def _send(process: Process, message: object) -> None:
    assert process.stdin is not None
    if process.stdin.is_closing():  # uvloop raises RuntimeError then
        raise BrokenPipeError
    process.stdin.write(frame(message))
    await process.stdin.drain()
    await asyncio.sleep(0)  # whoever waits comes in between


async def _receive(process: Process) -> Any:
    assert process.stdout is not None
    length = int.from_bytes(await process.stdout.readexactly(LENGTH_BYTES), "big")
    return pickle.loads(await process.stdout.readexactly(length))
