"""What an operator does by hand, done by hand: warmctl, run as a program of its own."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

_WARMCTL = [sys.executable, "-P", "-m", "warmserve.admin.cli"]


class WarmctlError(RuntimeError):
    """warmctl ended with an error; the message is its output."""


async def warmctl(environment: Mapping[str, str], *arguments: str, report: Callable[[str], None] | None = None) -> str:
    """Runs warmctl and returns what it printed; `report` gets each line as it comes. Raises WarmctlError."""
    process = await asyncio.create_subprocess_exec(
        *_WARMCTL,
        *arguments,
        env={**os.environ, **environment, "COLUMNS": "140"},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    assert process.stdout is not None
    lines = []
    try:
        async for line in process.stdout:
            lines.append(line.decode(errors="replace").rstrip())
            if report is not None:
                report(lines[-1])
        status = await process.wait()
    except asyncio.CancelledError:
        process.kill()
        await process.wait()
        raise
    text = "\n".join(lines)
    if status != 0:
        raise WarmctlError(f"warmctl {' '.join(arguments)} ended with status {status}:\n{text}")
    return text


async def deploy(environment: Mapping[str, str], name: str, folder: Path, report: Callable[[str], None]) -> None:
    """Deploys a checkpoint. Raises WarmctlError."""
    report(f"$ warmctl models deploy {name} --source {folder}")
    arguments = ("models", "deploy", name, "--source", str(folder))
    await warmctl(environment, *arguments, report=lambda line: report(f"  {line}"))
