"""Programs that are run to their end, with their output shown line by line."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path


class ProgramError(RuntimeError):
    """A program ended with an error; the message has its output."""


Report = Callable[[str], None]


async def run_module(
    module: str, arguments: Sequence[str], environment: Mapping[str, str] | None = None, report: Report | None = None
) -> str:
    """Runs `python -m MODULE` and returns what it printed; `report` gets each line as it comes. Raises ProgramError.

    Cancelled, it kills the program.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",  # modules in the folder that the user happens to be in are not ours
        "-m",
        module,
        *arguments,
        env={**os.environ, **(environment or {})},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,  # Ctrl-C reaches the launcher alone, which ends it
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
        raise ProgramError(f"{module} {' '.join(arguments)} ended with status {status}:\n{text}")
    return text


async def warmctl(environment: Mapping[str, str], *arguments: str, report: Report | None = None) -> str:
    """Runs warmctl, as an operator would. Raises ProgramError."""
    return await run_module("warmserve.admin.cli", arguments, environment, report)


async def deploy(environment: Mapping[str, str], name: str, folder: Path, report: Report) -> None:
    """Deploys a checkpoint. Raises ProgramError."""
    report(f"$ warmctl models deploy {name} --source {folder}")
    arguments = ("models", "deploy", name, "--source", str(folder))
    await warmctl(environment, *arguments, report=lambda line: report(f"  {line}"))


async def make_checkpoints(folder: Path, report: Report) -> None:
    """Makes the demo's checkpoints in `folder` where they are not there yet. Raises ProgramError.

    In a process of its own, so that the launcher needs no torch.
    """
    await run_module("launcher.checkpoints", [str(folder)], report=report)
