"""Arguments that several commands take, and how they are completed in a shell."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated

import typer

from warmserve.admin.moments import parse_duration
from warmserve.admin.target import Output, Target
from warmserve.cluster.keys import Keys
from warmserve.cluster.store import Store, StoreUnavailableError

_COMPLETION_TIMEOUT_S = 2.0


def target_of(ctx: typer.Context, output: Output | None) -> Target:
    """The cluster from the global options; a command's own --output goes before the global one."""
    target: Target = ctx.find_root().obj
    return target if output is None else replace(target, output=output)


def duration_of(text: str, option: str) -> float:
    """Seconds, as an option says them. Ends the command with a usage error where they are none."""
    try:
        return parse_duration(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from error


def complete_model(ctx: typer.Context, incomplete: str) -> list[str]:
    """Names of deployed models."""
    return _complete(ctx, incomplete, Keys.models)


def _complete_agent(ctx: typer.Context, incomplete: str) -> list[str]:
    return _complete(ctx, incomplete, Keys.agents)


def _complete(ctx: typer.Context, incomplete: str, folder: Callable[[Keys], str]) -> list[str]:
    given = ctx.find_root().params  # the shell runs no callbacks, so there is no Target yet
    endpoints = given.get("etcd") or os.environ.get("WARMSERVE_ETCD_ENDPOINTS") or "127.0.0.1:2379"
    prefix = given.get("prefix") or os.environ.get("WARMSERVE_PREFIX") or "warmserve"
    under = folder(Keys(prefix))

    async def names() -> list[str]:
        store = Store(endpoints.split(","))
        try:
            async with asyncio.timeout(_COMPLETION_TIMEOUT_S):
                changes, _ = await store.snapshot(under + incomplete)
        finally:
            await store.close()
        return [change.key.removeprefix(under) for change in changes]

    try:
        return asyncio.run(names())
    except (StoreUnavailableError, TimeoutError, ValueError):
        return []  # nothing to offer, and a prompt is no place for complaints


ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="A deployed model.", autocompletion=complete_model)]
AgentId = Annotated[str, typer.Argument(metavar="AGENT", help="An agent's id.", autocompletion=_complete_agent)]
OutputOption = Annotated[
    Output | None,
    typer.Option(
        "--output", "-o", help="How to write the result; given here or before the command.", show_default=False
    ),
]
