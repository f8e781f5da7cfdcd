"""`warmctl calendar`."""

from __future__ import annotations

import math
import uuid
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated

import typer
from rich.console import Group, RenderableType

from warmserve.admin import units, views
from warmserve.admin.arguments import ModelName, OutputOption, complete_model, duration_of, target_of
from warmserve.admin.drawing import make_table, note_lines
from warmserve.admin.moments import distance, length, parse_moment, spell_unix
from warmserve.admin.plain import Plain, plain
from warmserve.admin.state import read_state
from warmserve.admin.target import CommandError, run, show
from warmserve.cluster.store import Store
from warmserve.v1 import cluster_pb2

app = typer.Typer(
    help="Announce traffic that no forecast can know of, so that models are warm when it comes.", no_args_is_help=True
)


@dataclass(frozen=True)
class Announced:
    """An entry, and what to tell about how its time was understood."""

    entry: Plain
    note: str


@app.command("add")
def add_command(
    ctx: typer.Context,
    model: ModelName,
    at: Annotated[
        str,
        typer.Option(help="When it begins, in local time: 14:00, 2026-12-24T14:00 (a zone may follow), now, +30m."),
    ],
    load: Annotated[float, typer.Option(help="Requests in progress to expect, on average.")],
    lasting: Annotated[str, typer.Option("--for", help="How long it lasts: 90s, 15m, 1h30m, 2d.")] = "1h",
    note: Annotated[str, typer.Option(help="What it is for; operators see it.")] = "",
    output: OutputOption = None,
) -> None:
    """Announce traffic: the model's forecast is raised to it for that time, and what came of it is scored afterwards.

    A time of day that has passed means tomorrow's.

    Examples:

      warmctl calendar add qwen3-8b --at 14:00 --load 20

      warmctl calendar add qwen3-8b --at 2026-12-24T09:30 --for 2h --load 50 --note "launch"

      warmctl calendar add qwen3-8b --at +30m --for 10m --load 8
    """
    now = datetime.now().astimezone()
    try:
        begin, told = parse_moment(at, now)
    except (OverflowError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="--at") from error
    duration_s = math.ceil(duration_of(lasting, "--for"))
    if not 0 < load < math.inf:
        raise typer.BadParameter(f"{load:g} is no number of requests above 0", param_hint="--load")
    target = target_of(ctx, output)
    entry = cluster_pb2.CalendarEntry(
        model=model,
        start_unix_s=math.floor(begin.timestamp()),
        duration_s=duration_s,
        load=load,
        note=note,
        source=cluster_pb2.CALENDAR_SOURCE_OPERATOR,
        created_unix_ms=units.now_ms(),
    )

    async def action(store: Store) -> None:
        state = await read_state(store, target.keys)
        if model not in state.models:
            raise CommandError(views.not_deployed(model, state))
        while True:
            entry.id = uuid.uuid4().hex[:8]
            if await store.create(target.keys.calendar(model, entry.id), entry) is not None:
                return

    run(target, action)
    show(
        target,
        Announced(plain(entry), told),
        lambda: (
            (f"{told[0].upper()}{told[1:]}.\n" if told else "")
            + f"Announced {entry.id}: {load:g} request(s) in progress of {model} from {spell_unix(entry.start_unix_s)} "
            f"({distance(entry.start_unix_s, units.now_ms() / 1000)}) for {length(duration_s)}."
        ),
    )


@app.command("list")
def list_command(
    ctx: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]", help="Only of this model.", autocompletion=complete_model, show_default=False
        ),
    ] = None,
    output: OutputOption = None,
) -> None:
    """List what is announced and has not ended, earliest first. `warmctl forecast score` tells what came of the rest.

    Examples:

      warmctl calendar list

      warmctl calendar list qwen3-8b -o json
    """
    target = target_of(ctx, output)
    state = run(target, lambda store: read_state(store, target.keys))
    found = [entry for entry in state.calendar.values() if model in (None, entry.model)]
    found.sort(key=lambda entry: (entry.start_unix_s, entry.model, entry.id))
    show(target, [plain(entry) for entry in found], lambda: _draw(found, state.unreadable, units.now_ms() / 1000))


@app.command("remove")
def remove_command(
    ctx: typer.Context,
    entry_id: Annotated[str, typer.Argument(metavar="ID", help="As `warmctl calendar list` shows it.")],
    output: OutputOption = None,
) -> None:
    """Take an announcement back.

    Examples:

      warmctl calendar remove 3f2a91c0
    """
    target = target_of(ctx, output)

    async def action(store: Store) -> cluster_pb2.CalendarEntry:
        entries = (await read_state(store, target.keys)).calendar
        found = [key for key, entry in entries.items() if entry_id in (entry.id, key)]
        if not found:
            known = [entry.id for entry in entries.values()]
            raise CommandError(f"no announcement {entry_id!r}: {views.nearest(entry_id, known)}")
        if len(found) > 1:
            raise CommandError(f"{entry_id!r} is the id of several: say one of {', '.join(found)}")
        if not await store.delete(target.keys.calendars() + found[0]):
            raise CommandError(f"{entry_id} has just ended, or somebody else has removed it")
        return entries[found[0]]

    removed = run(target, action)
    show(
        target,
        plain(removed),
        lambda: (
            f"Removed {removed.id}: {removed.load:g} request(s) in progress of {removed.model} from "
            f"{spell_unix(removed.start_unix_s)} for {length(removed.duration_s)}."
        ),
    )


def _draw(found: list[cluster_pb2.CalendarEntry], unreadable: list[str], now_s: float) -> RenderableType:
    notes = note_lines([f"cannot be read: {what}" for what in unreadable])
    if not found:
        return Group("Nothing is announced. Announce with: warmctl calendar add MODEL --at 14:00 --load 20", *notes)
    table = make_table("ID", "MODEL", "BEGINS", "", "LASTS", "LOAD", "SAID BY", "NOTE")
    for entry in found:
        source = plain(entry)["source"]
        begins = distance(entry.start_unix_s, now_s)
        if entry.start_unix_s <= now_s:
            left_s = round(entry.start_unix_s + entry.duration_s - now_s)
            begins = f"goes on for {length(left_s)}" if left_s > 0 else "has ended"
        table.add_row(
            entry.id,
            entry.model,
            spell_unix(entry.start_unix_s),
            begins,
            length(entry.duration_s),
            f"{entry.load:g}",
            source,
            entry.note,
        )
    return Group(table, *notes)
