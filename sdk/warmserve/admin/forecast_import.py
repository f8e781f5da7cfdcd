"""`warmctl forecast import`."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Group, RenderableType
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from warmserve.admin.arguments import OutputOption, complete_model, duration_of, target_of
from warmserve.admin.drawing import note_lines
from warmserve.admin.forecaster import forecaster
from warmserve.admin.import_trace import Import, Renaming, messages, read
from warmserve.admin.moments import distance, length, spell_unix
from warmserve.admin.state import ClusterState, read_state
from warmserve.admin.target import Target, console, fail, run, show, warn
from warmserve.cluster.store import Store
from warmserve.traces import Format, TraceError, Window
from warmserve.traces.service_time import service_time_s

_OLD_S = 28 * 86_400  # how far predictors look back


@dataclass(frozen=True)
class Imported:
    """What was recorded."""

    windows: int
    """Of the forecaster's length."""
    models: list[str]
    begin_unix_s: float
    end_unix_s: float
    not_deployed: list[str]


def import_command(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A trace; may be gzipped.")],
    model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[FROM=]NAME",
            help="Record it as this model's; with FROM=, only traffic of the trace's model FROM. May be repeated.",
            autocompletion=complete_model,
        ),
    ] = None,
    shift_to_now: Annotated[
        bool, typer.Option("--shift-to-now", help="Move it in time, so that its last window is the last that ended.")
    ] = False,
    by_client: Annotated[
        bool, typer.Option("--by-client", help="ServeGen: each client is a model of its own, MODEL/CLIENT.")
    ] = False,
    format: Annotated[Format | None, typer.Option(help="By default it is found out from the first line.")] = None,
    window: Annotated[
        str | None, typer.Option(help="Length of the forecaster's windows, where it has made no forecast yet: 5m.")
    ] = None,
    output: OutputOption = None,
) -> None:
    """Give the forecaster a past, so that it need not begin with nothing. All of a file is recorded, or nothing.

    Requests: Azure's LLM traces, BurstGPT, CSV with columns time, prompt_tokens,
    output_tokens and perhaps model, JSON lines, access logs.

    Windows: ServeGen, CSV with columns window_start and rate or load.

    The time may also be called timestamp or ts: seconds, milli-, micro- or nanoseconds
    since 1970, or a date, in UTC unless it names its zone.

    How long requests took is not in a trace; it is taken as that of an 8B on an H100.
    Windows that are known already are replaced.

    Examples:

      warmctl forecast import AzureLLMInferenceTrace_conv.csv --model qwen3-8b --shift-to-now

      warmctl forecast import BurstGPT_1.csv --model ChatGPT=small --model GPT-4=large --shift-to-now

      warmctl forecast import servegen_windows.csv.gz --by-client --model m-large/12=qwen3-8b --shift-to-now
    """
    try:
        renaming = Renaming.parse(model or [])
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--model") from error
    target = target_of(ctx, output)
    state = run(target, lambda store: read_state(store, target.keys))
    window_s = duration_of(window, "--window") if window else _window_of(state)
    now_s = time.time()
    what = Import(file, format, renaming, shift_to_now, by_client, window_s, service_time_s)
    with _bar() as progress:
        task = progress.add_task(f"reading {file.name}", total=None)
        try:
            windows = read(what, now_s, lambda done, total: progress.update(task, completed=done, total=total))
        except TraceError as error:
            progress.stop()
            fail(str(error))
    recorded = _send(target, windows)
    if not recorded:
        fail("nothing was recorded: of none of the forecaster's windows half was known")
    end_s = max(one.start_s + one.window_s for one in windows)
    models = sorted({one.model for one in windows})
    if now_s - end_s > _OLD_S:
        warn(
            f"its last window ended {distance(end_s, now_s)}: forecasts look back {length(_OLD_S)} (see --shift-to-now)"
        )
    imported = Imported(
        windows=recorded,
        models=models,
        begin_unix_s=min(one.start_s for one in windows),
        end_unix_s=end_s,
        not_deployed=[name for name in models if name not in state.models],
    )
    show(target, imported, lambda: _imported(imported))


def _window_of(state: ClusterState) -> float:
    lengths = {forecast.window_s for forecast in state.forecasts.values()}
    if len(lengths) != 1:
        fail("there is no forecast yet that tells the length of the forecaster's windows: say it, as in --window 5m")
    return lengths.pop()


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )


def _send(target: Target, windows: list[Window]) -> int:
    """Returns how many of its own windows the forecaster has recorded."""

    async def action(store: Store) -> int:
        async with forecaster(store, target.keys) as stub:
            with _bar() as progress:
                task = progress.add_task("recording", total=len(windows))
                answer = await stub.ImportHistory(messages(windows, lambda sent: progress.advance(task, sent)))
        return answer.windows

    return run(target, action)


def _imported(imported: Imported) -> RenderableType:
    models = imported.models
    names = ", ".join(models[:8]) + (f" and {len(models) - 8} more" if len(models) > 8 else "")
    text = (
        f"Recorded {imported.windows:,} windows of {names}, from {spell_unix(imported.begin_unix_s)} "
        f"to {spell_unix(imported.end_unix_s)}."
    )
    waiting = imported.not_deployed
    notes = [f"{len(waiting)} of them not deployed: their forecasts begin with deployment"] if waiting else []
    return Group(text, *note_lines(notes))
