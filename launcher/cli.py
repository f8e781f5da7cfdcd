"""The command `warmserve`."""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ByteSize, TypeAdapter, ValidationError
from rich.console import Console

from launcher import interrupts
from launcher.children import ChildFailedError
from launcher.cluster import ClusterConfig
from launcher.demo import DemoConfig, demo
from launcher.folder import DataFolder, FolderError, default_data_folder, ports_of
from launcher.ports import PortTakenError
from launcher.programs import ProgramError
from launcher.progress import replay_with_progress
from launcher.report import print_report, summarise
from launcher.traces import Rotation, Scale, generate
from launcher.up import up
from warmserve import AsyncClient, WarmServeError
from warmserve.cluster.store import StoreUnavailableError
from warmserve.traces import Request, TraceError, from_zero, read_requests

_TRACE_OF_CHECKOUT = Path(__file__).parents[2] / "shared" / "traces" / "azure_2023_conv.csv.gz"

app = typer.Typer(
    help="WarmServe on one machine: many models share few GPUs, and are warm before the burst that needs them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """The console command."""
    app()


def _size(text: str) -> int:
    try:
        return int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        raise typer.BadParameter(f"{text!r} is no size; write for example 512MiB or 4GiB") from None


def _say(line: str) -> None:
    print(line, flush=True)


@contextmanager
def _readable_errors() -> Iterator[None]:
    """What a user can do something about ends the command with status 1 and a message instead of a traceback."""
    expected = (
        ChildFailedError,
        FileNotFoundError,
        FolderError,
        PortTakenError,
        ProgramError,
        StoreUnavailableError,
        TimeoutError,
        TraceError,
        WarmServeError,
    )
    try:
        yield
    except expected as error:
        print(f"warmserve: {error}", file=sys.stderr, flush=True)
        raise typer.Exit(1) from None


DataOption = Annotated[
    Path | None, typer.Option("--data", help="Folder for all data; by default warmserve in the user's data folder.")
]


@app.command(
    "up",
    epilog="Example: warmserve up --demo-models    Example: warmserve up --data ./one --agents 1 --model-root ~/models",
)
def up_command(
    data: DataOption = None,
    agents: Annotated[int, typer.Option(min=1, max=64, help="GPU agents, each with an arena of its own.")] = 2,
    http_port: Annotated[
        int,
        typer.Option(min=0, max=65535, help="Port of the OpenAI door. 0: that of the last start, else 8000, else any."),
    ] = 0,
    arena_bytes: Annotated[str, typer.Option(help="Size of each agent's arena, for example 4GiB.")] = "1GiB",
    model_root: Annotated[
        list[Path] | None,
        typer.Option(
            help="Folder that checkpoints may be deployed from; may be repeated.", exists=True, file_okay=False
        ),
    ] = None,
    demo_models: Annotated[bool, typer.Option("--demo-models", help="Make and deploy three small models.")] = False,
) -> None:
    """Run the whole system here until Ctrl-C. Started again on the same folder it still knows its models."""
    config = ClusterConfig(
        agents=agents,
        http_port=http_port,
        arena_bytes=_size(arena_bytes),
        model_roots=tuple(model_root or ()),
    )
    with _readable_errors(), DataFolder(data or default_data_folder()) as folder:
        try:
            interrupts.run(up(folder, config, demo_models, _say))
        except interrupts.InterruptedBySignal:
            _say("stopped")


@app.command("demo")
def demo_command(
    data: Annotated[Path | None, typer.Option(help="Folder to keep; by default a temporary one.")] = None,
    trace: Annotated[
        Path | None,
        typer.Option(help="A trace (Azure's, BurstGPT's, CSV, a log; may be gzipped); else a bundled or made-up one."),
    ] = None,
    duration: Annotated[float, typer.Option(min=1, help="Seconds of traffic.")] = 60.0,
    agents: Annotated[int, typer.Option(min=1, max=16, help="GPU agents.")] = 2,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here as JSON.")] = None,
) -> None:
    """Make three small models, deploy them, replay a trace in which they take turns, and show what clients saw.

    Status 0 only if no request was lost and the median time to the first token was shorter warm than cold.
    """
    if trace is None and _TRACE_OF_CHECKOUT.is_file():
        trace = _TRACE_OF_CHECKOUT
    console = Console()
    with (
        _readable_errors(),
        tempfile.TemporaryDirectory(prefix="warmserve-demo-") as temporary,
        DataFolder(data or Path(temporary)) as folder,
    ):
        try:
            report, wrong = interrupts.run(demo(folder, DemoConfig(trace, duration, agents), console))
        except interrupts.InterruptedBySignal as signal:
            raise typer.Exit(128 + signal.number) from None
    if json_file is not None:
        json_file.write_text(json.dumps(report.to_json(), indent=2) + "\n")
    for line in wrong:
        console.print(f"not as it should be: {line}", style="red", markup=False)
    if wrong:
        raise typer.Exit(1)
    console.print("Nothing was lost, and warm requests got their first token sooner than cold ones.", style="green")


@app.command(
    "replay", epilog="Example: warmserve replay --trace trace.csv.gz --duration 120 --tokens 0.1 --model a --model b"
)
def replay_command(
    router: Annotated[
        str | None, typer.Option(help="host:port of a router's gRPC server; by default that of the system in --data.")
    ] = None,
    data: DataOption = None,
    trace: Annotated[
        Path | None,
        typer.Option(help="A trace (Azure's, BurstGPT's, CSV, a log; may be gzipped); else made-up traffic."),
    ] = None,
    model: Annotated[list[str] | None, typer.Option(help="May be repeated; by default all that are deployed.")] = None,
    duration: Annotated[float, typer.Option(min=1, help="Seconds of replay.")] = 60.0,
    time: Annotated[float, typer.Option(min=0.001, help="Seconds of replay per second of the trace.")] = 1.0,
    tokens: Annotated[float, typer.Option(min=0.0001, help="Tokens of replay per token of the trace.")] = 1.0,
    max_prompt: Annotated[int, typer.Option(min=1, help="Longest prompt, in tokens.")] = 100_000,
    max_output: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 100_000,
    rate: Annotated[float, typer.Option(min=0.001, help="Requests per second of made-up traffic.")] = 1.0,
    period: Annotated[float, typer.Option(min=0.1, help="Seconds in which each model has its turn once.")] = 30.0,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds until a request is given up.")] = 600.0,
    seed: Annotated[int, typer.Option(help="Makes made-up traffic and prompts reproducible.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here as JSON.")] = None,
) -> None:
    """Replay a trace against a running system and show what its clients see. Status 1 if a request was lost."""
    folder = data or default_data_folder()
    port = ports_of(folder).get("router")
    if router is None and port is None:
        raise typer.BadParameter(f"there is no system in {folder}: start one with `warmserve up`, or name a --router")
    target = router or f"127.0.0.1:{port}"
    console = Console()

    def requests(models: list[str]) -> list[Request]:
        made = generate(duration / time, rate * time, seed) if trace is None else from_zero(read_requests(trace))
        return Rotation(models, period).apply(Scale(duration, 0.0, time, tokens, max_prompt, max_output).apply(made))

    async def run() -> bool:
        async with AsyncClient(target) as client:
            deployed = [info.name for info in await client.models()]
        models = model or deployed
        if not models:
            raise typer.BadParameter("no model is deployed: `warmctl models deploy NAME --source FOLDER` does that")
        outcomes = await replay_with_progress(target, requests(models), timeout_s=timeout, seed=seed, console=console)
        report = summarise(outcomes)
        print_report(report, console)
        if json_file is not None:
            await asyncio.to_thread(json_file.write_text, json.dumps(report.to_json(), indent=2) + "\n")
        return report.lost == 0

    with _readable_errors():
        try:
            nothing_lost = interrupts.run(run())
        except interrupts.InterruptedBySignal as signal:
            raise typer.Exit(128 + signal.number) from None
    raise typer.Exit(0 if nothing_lost else 1)


if __name__ == "__main__":
    main()
