"""`warmctl forecast`."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import grpc
import typer
from typer.core import TyperGroup

from warmserve.admin import forecast_render, picture, units, views
from warmserve.admin.arguments import OutputOption, complete_model, duration_of, target_of
from warmserve.admin.forecast_import import import_command
from warmserve.admin.forecast_views import Outlook, Quantity, outlook
from warmserve.admin.forecaster import forecaster
from warmserve.admin.plain import plain
from warmserve.admin.state import ClusterState, read_state
from warmserve.admin.target import CommandError, console, fail, run, show
from warmserve.cluster.store import Store
from warmserve.v1 import forecast_pb2


class _Group(TyperGroup):
    """`warmctl forecast MODEL` is `warmctl forecast show MODEL`, so that what is asked most is shortest."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "-h", "--help"):
            args = ["show", *args]
        return super().parse_args(ctx, args)

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        model = next(param for param in self.commands["show"].params if param.name == "model")
        return [*super().shell_complete(ctx, incomplete), *model.shell_complete(ctx, incomplete)]


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    help="""See what traffic is expected, how good forecasts have been, and give the forecaster a past.

    Examples:

      warmctl forecast qwen3-8b

      warmctl forecast score

      warmctl forecast import trace.csv.gz --model qwen3-8b --shift-to-now
    """,
)

KnownModel = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A model, deployed or once deployed.", autocompletion=complete_model, show_default=False
    ),
]
AheadOption = Annotated[
    int, typer.Option(min=1, max=12, help="Take past forecasts as they were made this many windows before.")
]


@app.command("show")
def show_command(
    ctx: typer.Context,
    model: KnownModel,
    ahead: AheadOption = 1,
    past: Annotated[str, typer.Option(help="How far to look back: 3h, 1d, 2w.")] = "1d",
    quantity: Annotated[Quantity, typer.Option(help="What to draw.")] = Quantity.load,
    png: Annotated[
        Path | None,
        typer.Option(help="Write the picture to this file as well (.png, .svg or .pdf).", dir_okay=False),
    ] = None,
    output: OutputOption = None,
) -> None:
    """Draw what came, what had been forecast for it, and what is expected next. `show` may be left out.

    With -o json: all quantities of all windows.

    Examples:

      warmctl forecast qwen3-8b

      warmctl forecast show qwen3-8b --past 1w --ahead 6 --png qwen.png

      warmctl forecast qwen3-8b --quantity output-tokens -o json
    """
    target = target_of(ctx, output)
    now_s = time.time()
    past_s = duration_of(past, "--past")

    async def action(store: Store) -> Outlook:
        state = await read_state(store, target.keys)
        async with forecaster(store, target.keys) as stub:
            history, forecast = forecast_pb2.GetHistoryResponse(), None
            request = forecast_pb2.GetHistoryRequest(model=model, from_unix_s=max(1, int(now_s - past_s)), ahead=ahead)
            try:
                history = await stub.GetHistory(request)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.NOT_FOUND:
                    raise
                if model not in state.models:
                    raise CommandError(_unknown(model, state)) from None
            if model in state.models:
                answer = await stub.GetForecasts(forecast_pb2.GetForecastsRequest(models=[model]))
                forecast = next(iter(answer.forecasts), None)
        announced = [entry for entry in state.calendar.values() if entry.model == model]
        return outlook(model, ahead, history, forecast, announced)

    view = run(target, action)
    if png is not None:
        try:
            picture.save(view, quantity, now_s, png)
        except CommandError as error:
            fail(str(error))
        print(f"Wrote {png}.", file=sys.stderr)
    screen = console()
    show(target, view, lambda: forecast_render.forecast(view, quantity, now_s, screen.width, screen.is_terminal))


def _unknown(model: str, state: ClusterState) -> str:
    commands = ", ".join(command.name for command in app.registered_commands if command.name)
    return (
        f"nothing is known of a model {model!r}, and no such model is deployed: {views.nearest(model, state.models)} "
        f"(commands of `warmctl forecast` are {commands})"
    )


app.command("import")(import_command)


@app.command("score")
def score_command(
    ctx: typer.Context,
    model: Annotated[
        list[str] | None,
        typer.Argument(metavar="[MODEL]...", help="By default all of them.", autocompletion=complete_model),
    ] = None,
    past: Annotated[str, typer.Option(help="How far to look back: 1d, 1w.")] = "1w",
    ahead: AheadOption = 1,
    output: OutputOption = None,
) -> None:
    """Show how good forecasts have been, what their errors cost, and what came of announcements.

    Examples:

      warmctl forecast score

      warmctl forecast score qwen3-8b --past 1d --ahead 6
    """
    target = target_of(ctx, output)
    request = forecast_pb2.GetScoresRequest(models=model or [], past_s=duration_of(past, "--past"), ahead=ahead)

    async def action(store: Store) -> forecast_pb2.GetScoresResponse:
        async with forecaster(store, target.keys) as stub:
            return await stub.GetScores(request)

    scores = run(target, action)
    show(target, plain(scores), lambda: forecast_render.scores(scores, ahead, past))


@app.command("predictor")
def predictor_command(
    ctx: typer.Context,
    restore: Annotated[bool, typer.Option("--restore", help="Make the previous champion the champion again.")] = False,
    output: OutputOption = None,
) -> None:
    """Show what forecasts are made with: the champion, the one before it, and how the last refit ended.

    Examples:

      warmctl forecast predictor

      warmctl forecast predictor --restore
    """
    target = target_of(ctx, output)

    async def action(store: Store) -> forecast_pb2.GetPredictorResponse:
        async with forecaster(store, target.keys) as stub:
            if restore:
                await stub.RestorePredictor(forecast_pb2.RestorePredictorRequest())
            return await stub.GetPredictor(forecast_pb2.GetPredictorRequest())

    found = run(target, action)
    show(target, plain(found), lambda: forecast_render.predictors(found, restore, units.now_ms()))
