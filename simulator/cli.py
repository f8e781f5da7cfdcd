"""The command line of an operator's what-if."""

from __future__ import annotations

import json
import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from services.forecaster.predictors import PublishedPredictor
from simulator import report
from simulator.models_file import EXAMPLE, ModelsFileError, read_models
from simulator.policies.ours import Ours
from simulator.results import Results
from simulator.run import simulate
from simulator.spec import ClusterSpec, Forecasting, ImpossibleError, Settings, check
from simulator.trace_traffic import read_traffic
from simulator.whatif import WhatIf, cluster_of, what_if, with_target
from warmserve.traces import TraceError

app = typer.Typer(
    pretty_exceptions_enable=False, add_completion=False, context_settings={"help_option_names": ["-h", "--help"]}
)

_PIPE_WIDTH = 250  # lines for grep are not wrapped
_WINDOW_S = 300.0  # the services' default
_TICK_S = 30.0  # what waits is seen to at once; this is for warming ahead, of windows of minutes
_DAY_WINDOWS = round(86_400 / _WINDOW_S)
_EXAMPLES = """Examples:

  warmctl simulate --example-models > models.yaml

  warmctl simulate --trace my.csv --gpus 8 --models models.yaml

  warmctl simulate --trace access.log.gz --model chat --gpus 4 --models models.yaml --target-ttft 0.5 --html report.html
"""


class Output(StrEnum):
    """As warmctl's."""

    table = "table"
    json = "json"


def _print_example(wanted: bool) -> None:
    if wanted:
        print(EXAMPLE, end="")
        raise typer.Exit


@app.command(epilog=_EXAMPLES)
def main(
    trace: Annotated[
        Path,
        typer.Option(
            help="Who asks when: Azure's, BurstGPT's or ServeGen's format, plain CSV, JSON lines, access log."
        ),
    ],
    models: Annotated[Path, typer.Option(help="The models, as YAML; --example-models shows how.")],
    gpus: Annotated[int, typer.Option(help="GPUs (H100 80GB): up to 8 of one node, or nodes of 8.")],
    target_ttft: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            help="Seconds within which 95 % of each model's requests are to have their first token, where the models "
            "file has no target of its own for it: also finds the fewest GPUs that keep it.",
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="The model of all requests, where the trace does not tell.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a report with plots here, as one HTML file.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here, as JSON.")] = None,
    output: Annotated[Output, typer.Option("--output", "-o", help="How to print them.")] = Output.table,
    seed: Annotated[int, typer.Option(help="Of what is drawn at random.")] = 0,
    example_models: Annotated[
        bool,
        typer.Option("--example-models", is_eager=True, callback=_print_example, help="Print a models file and end."),
    ] = False,
) -> None:
    """Replay traffic on a simulated cluster: how soon would it be answered, and what would a target need?

    The planner, the predictor and the engine's measured step times are those of production; nothing is sent anywhere
    and no GPU is needed. Forecasts start with no history, as on a cluster's first day.
    """
    del example_models
    try:
        answer = _answer(trace, models, gpus, target_ttft, model, seed)
    except (ImpossibleError, ModelsFileError, TraceError) as error:
        print(f"simulate: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    command = "warmctl simulate " + shlex.join(sys.argv[1:])
    document = json.dumps(report.document(answer, command), indent=1) + "\n"
    if json_file is not None:
        _write(json_file, document)
    if output is Output.json:
        print(document, end="")
    else:
        _show(answer)
    if html is not None:
        _write(html, report.html(answer, command))
        print(f"report: {html}", file=sys.stderr)


def _answer(trace: Path, models_file: Path, gpus: int, target_s: float | None, model: str | None, seed: int) -> WhatIf:
    models = with_target(read_models(models_file), target_s)
    check(cluster_of(gpus), models)  # before a long trace is read
    forecasting = Forecasting(PublishedPredictor(_DAY_WINDOWS), window_s=_WINDOW_S)
    settings = Settings(tick_s=_TICK_S, forecasting=forecasting)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        reading = progress.add_task(f"reading {trace.name}")
        read = read_traffic(
            trace,
            models,
            model=model,
            seed=seed,
            on_progress=lambda done, total: progress.update(reading, completed=done, total=total),
        )
        progress.remove_task(reading)

        def run(cluster: ClusterSpec) -> Results:
            task = progress.add_task(f"simulating {cluster.gpus} GPUs", total=1.0)
            try:
                return simulate(
                    cluster,
                    models,
                    read.traffic,
                    Ours(),
                    settings=settings,
                    seed=seed,
                    progress=lambda share: progress.update(task, completed=share),
                )
            finally:
                progress.remove_task(task)

        return what_if(run, models, gpus, target_s=target_s, remarks=read.remarks)


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text)
    except OSError as error:
        print(f"simulate: {file} cannot be written: {error.strerror or error}", file=sys.stderr)
        raise typer.Exit(1) from None


def _show(answer: WhatIf) -> None:
    console = Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH)
    console.print(report.headline(answer), highlight=False)
    for remark in answer.remarks:
        console.print(remark, style="dim", highlight=False)
    if answer.target_s is not None:
        console.print(_table(*report.gpus_table(answer)))
    console.print(_table(*report.models_table(answer.results)))
    console.print(_table(*report.late_table(answer.results)))


def _table(header: report.Cells, rows: list[report.Cells]) -> Table:
    table = Table()
    for at, name in enumerate(header):
        table.add_column(str(name), justify="right" if at else "left")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    return table
