"""Which cluster a command talks to, and how commands run: errors become one line and status 1, never a traceback."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, is_dataclass
from enum import StrEnum
from typing import Any, NoReturn, TypeVar

import typer
from redis.exceptions import RedisError
from rich.console import Console, RenderableType

from warmserve.cluster.keys import Keys
from warmserve.cluster.store import Store, StoreUnavailableError

T = TypeVar("T")

_PIPE_WIDTH = 250  # where nobody looks, lines are for grep and are not wrapped


class CommandError(Exception):
    """A command cannot be carried out; the message says why and what to do."""


class Output(StrEnum):
    """How results are written."""

    table = "table"
    json = "json"


@dataclass(frozen=True)
class Target:
    """The cluster."""

    etcd: list[str]
    redis_url: str
    keys: Keys
    output: Output

    @property
    def json(self) -> bool:
        """Whether programs read the output."""
        return self.output is Output.json


def run(target: Target, action: Callable[[Store], Awaitable[T]]) -> T:
    """Runs `action` on the cluster's etcd; on a failure, says what it was and ends the command with status 1."""

    async def main() -> T:
        store = Store(target.etcd)
        try:
            return await action(store)
        finally:
            await store.close()

    try:
        return asyncio.run(main())
    except (CommandError, StoreUnavailableError) as error:
        fail(str(error))
    except RedisError as error:
        fail(f"Redis at {target.redis_url} does not answer: {error}")
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def fail(message: str) -> NoReturn:
    """Ends the command with status 1."""
    print(f"Error: {message}", file=sys.stderr)
    raise typer.Exit(1)


def warn(message: str) -> None:
    """Tells people, beside the output."""
    print(f"Warning: {message}", file=sys.stderr)


def show(target: Target, document: Any, drawn: Callable[[], RenderableType]) -> None:
    """Writes a result: one JSON document, or what `drawn` makes of it."""
    if target.json:
        print(json.dumps(jsonable(document), indent=2, ensure_ascii=False))
    else:
        console().print(drawn())


def jsonable(document: Any) -> Any:
    """Dataclasses, alone or in lists, as dictionaries."""
    if isinstance(document, list):
        return [jsonable(item) for item in document]
    return asdict(document) if is_dataclass(document) and not isinstance(document, type) else document


def console(stderr: bool = False) -> Console:
    """Where to draw."""
    stream = sys.stderr if stderr else sys.stdout
    seen = stream.isatty() or "COLUMNS" in os.environ  # as `watch` sets it for what it runs
    return Console(file=stream, width=None if seen else _PIPE_WIDTH, highlight=False, markup=False)
