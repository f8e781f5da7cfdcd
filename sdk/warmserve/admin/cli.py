"""warmctl: the command and its global options, `status`, `explain` and `events`."""

from __future__ import annotations

import json
import re
from typing import Annotated

import typer

from warmserve.admin import (
    agents_commands,
    calendar_commands,
    forecast_commands,
    models_commands,
    plan_commands,
    render,
    units,
    views,
)
from warmserve.admin.arguments import ModelName, OutputOption, complete_model, target_of
from warmserve.admin.plain import plain
from warmserve.admin.simulate_command import CONTEXT, simulate
from warmserve.admin.state import read_state
from warmserve.admin.target import CommandError, Output, Target, console, run, show, warn
from warmserve.admin.timeline import Item, latest_about, newest, open_events
from warmserve.cluster.keys import Keys
from warmserve.cluster.store import Store

app = typer.Typer(
    name="warmctl",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(models_commands.app, name="models")
app.add_typer(agents_commands.app, name="agents")
app.add_typer(plan_commands.app, name="plan")
app.add_typer(calendar_commands.app, name="calendar")
app.add_typer(forecast_commands.app, name="forecast")
app.command("simulate", context_settings=CONTEXT, add_help_option=False)(simulate)

_EXPLAIN_EVENTS = 10


@app.callback()
def target(
    ctx: typer.Context,
    etcd: Annotated[
        str,
        typer.Option(envvar="WARMSERVE_ETCD_ENDPOINTS", metavar="HOST:PORT[,...]", help="etcd's endpoints."),
    ] = "127.0.0.1:2379",
    redis: Annotated[
        str, typer.Option(envvar="WARMSERVE_REDIS_URL", metavar="URL", help="Redis; only events are read from it.")
    ] = "redis://127.0.0.1:6379/0",
    prefix: Annotated[
        str, typer.Option(envvar="WARMSERVE_PREFIX", help="Prefix of the cluster's keys in etcd and Redis.")
    ] = "warmserve",
    output: Annotated[Output, typer.Option("--output", "-o", help="How to write results.")] = Output.table,
) -> None:
    """Operate a WarmServe cluster by reading and writing its state in etcd.

    Examples:

      warmctl status

      warmctl --etcd 10.0.0.1:2379,10.0.0.2:2379 models list -o json

      warmctl explain qwen3-8b
    """
    endpoints = [endpoint for endpoint in etcd.split(",") if endpoint]
    try:
        Store(endpoints)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--etcd") from error
    if not re.fullmatch(r"[A-Za-z0-9._-]+", prefix):
        raise typer.BadParameter(f"{prefix!r}: use letters, digits, '.', '_' and '-'", param_hint="--prefix")
    ctx.obj = Target(endpoints, redis, Keys(prefix), output)


@app.command()
def status(ctx: typer.Context, output: OutputOption = None) -> None:
    """Show the cluster on one screen: who leads, what runs, what memory holds, how old the plan is.

    Examples:

      warmctl status

      watch warmctl status
    """
    target = target_of(ctx, output)

    async def action(store: Store) -> views.Status:
        return views.status(await read_state(store, target.keys), await store.ping())

    view = run(target, action)
    show(target, view, lambda: render.status(view, units.now_ms()))


@app.command()
def explain(ctx: typer.Context, model: ModelName, output: OutputOption = None) -> None:
    """Explain why a model is warm or cold: the plan's reason, its replicas, and what happened to it lately.

    Examples:

      warmctl explain qwen3-8b
    """
    target = target_of(ctx, output)

    async def action(store: Store) -> views.Explanation:
        state = await read_state(store, target.keys)
        if model not in state.models:
            raise CommandError(views.not_deployed(model, state))
        events = await latest_about(target, model, _EXPLAIN_EVENTS)
        return views.explain(state, model, events, units.now_ms())

    view = run(target, action)
    show(target, view, lambda: render.explanation(view, units.now_ms()))


@app.command()
def events(
    ctx: typer.Context,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with events as they come.")] = False,
    count: Annotated[int, typer.Option("-n", min=0, help="How many past events to show.")] = 20,
    model: Annotated[
        str | None, typer.Option(help="Only events about this model.", autocompletion=complete_model)
    ] = None,
    output: OutputOption = None,
) -> None:
    """Show what happened: models deployed, replicas warmed, woken, evicted and why, agents come and gone.

    With -o json, one JSON array; with -f, one JSON object per line.

    Examples:

      warmctl events -n 50

      warmctl events -f --model qwen3-8b -o json
    """
    target = target_of(ctx, output)

    def line(item: Item) -> None:
        document = {"id": item[0], **plain(item[1])}
        if target.json:
            print(json.dumps(document, ensure_ascii=False), flush=True)
        else:
            console().print(render.event_line(document))

    async def action(store: Store) -> list[Item]:
        async with open_events(target) as stream:
            items, last = await newest(stream, count, model)
            if model is not None and count and not items:
                state = await read_state(store, target.keys)
                if model not in state.models:
                    warn(views.not_deployed(model, state))
            if follow:
                for item in items:
                    line(item)
                async for item in stream.follow(last):
                    if model in (None, item[1].model):
                        line(item)
            return items

    items = run(target, action)
    if target.json:
        print(json.dumps([{"id": item[0], **plain(item[1])} for item in items], indent=2, ensure_ascii=False))
    else:
        for item in items:
            line(item)


def main() -> None:
    """The command `warmctl`."""
    app(prog_name="warmctl")


if __name__ == "__main__":
    main()
