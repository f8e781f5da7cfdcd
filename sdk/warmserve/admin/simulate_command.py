"""`warmctl simulate`: hands its arguments to the simulator, which comes with the server and not with this package."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import typer

from warmserve.admin.target import Target, fail

# The simulator has its own options and help, so that they need not be told twice.
CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def simulate(ctx: typer.Context) -> None:
    """Replay traffic on a simulated cluster: how soon would it be answered, and how many GPUs would a target need?

    Needs no cluster and no GPU, but the server's simulator: pip install 'warmserve-server[simulator]'
    """
    if importlib.util.find_spec("simulator") is None:
        fail("the simulator is not installed here: pip install 'warmserve-server[simulator]'")
    target: Target = ctx.obj
    try:
        done = subprocess.run([sys.executable, "-m", "simulator", f"--output={target.output}", *ctx.args], check=False)
    except KeyboardInterrupt:  # the simulator got it too, and ended
        raise typer.Exit(130) from None
    raise typer.Exit(done.returncode if done.returncode >= 0 else 128 - done.returncode)
