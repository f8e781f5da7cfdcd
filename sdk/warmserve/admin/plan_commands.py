"""`warmctl plan`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from warmserve.admin import render, units, views
from warmserve.admin.arguments import OutputOption, complete_model, target_of
from warmserve.admin.drawing import because, make_table, note_lines
from warmserve.admin.plan_views import PlanDiff, PlanView, plan_diff, plan_view
from warmserve.admin.state import ClusterState, read_state
from warmserve.admin.target import CommandError, run, show
from warmserve.cluster.store import Store
from warmserve.v1 import cluster_pb2

app = typer.Typer(help="See what the placer plans and why, and keep it from acting.", no_args_is_help=True)

_NO_PLAN = "No plan has been made yet."


class Switch(StrEnum):
    """On or off."""

    on = "on"
    off = "off"


@app.command("show")
def show_command(ctx: typer.Context, output: OutputOption = None) -> None:
    """Show the newest plan: each action with its reason and score, and what each model needs and has.

    A score is in seconds of waiting that the replica saves, or that the evicted one would have saved; a
    million more where it is pinned.

    Examples:

      warmctl plan show

      warmctl plan show -o json
    """
    target = target_of(ctx, output)
    view = plan_view(run(target, lambda store: read_state(store, target.keys)))
    show(target, view, lambda: _plan(view, units.now_ms()))


@app.command("explain")
def explain_command(
    ctx: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="A deployed model; all, if none.", autocompletion=complete_model),
    ] = None,
    output: OutputOption = None,
) -> None:
    """Explain the newest plan: each model's deciding sentence, and whom it won memory from or lost it to.

    `warmctl explain MODEL` tells in addition what is where now, and what happened lately.

    Examples:

      warmctl plan explain

      warmctl plan explain qwen3-8b
    """
    target = target_of(ctx, output)

    async def action(store: Store) -> tuple[ClusterState, list[views.Explanation]]:
        state = await read_state(store, target.keys)
        return state, _explanations(state, model)

    state, found = run(target, action)
    show(target, found, lambda: _explained(found, plan_view(state), units.now_ms()))


@app.command("diff")
def diff_command(ctx: typer.Context, output: OutputOption = None) -> None:
    """Show what the newest plan changes against what is now, replica by replica.

    Examples:

      warmctl plan diff

      warmctl plan advisory on; warmctl plan diff
    """
    target = target_of(ctx, output)
    diff = plan_diff(run(target, lambda store: read_state(store, target.keys)))
    show(target, diff, lambda: _diff(diff, units.now_ms()))


@app.command("advisory")
def advisory_command(
    ctx: typer.Context,
    switch: Annotated[Switch | None, typer.Argument(help="on, or off; what it is, if neither is given.")] = None,
    output: OutputOption = None,
) -> None:
    """Have plans shown and not carried out, or carried out again.

    While it is on, nothing is woken, warmed, drained or evicted, and requests for models that are not active wait; who
    waits is told why. Orders that were sent before are carried out.

    Examples:

      warmctl plan advisory on

      warmctl plan advisory off
    """
    target = target_of(ctx, output)

    async def action(store: Store) -> dict[str, object]:
        if switch is not None:
            mode = cluster_pb2.PlacerMode(advisory=switch is Switch.on, set_unix_ms=units.now_ms())
            await store.put(target.keys.placer_mode(), mode)
        state = await read_state(store, target.keys)
        said = state.mode is not None and state.mode.advisory
        started = not said and switch is None and state.plan is not None and state.plan.advisory
        return {"advisory": said or started, "by": "operator" if said else "placer's settings" if started else ""}

    told = run(target, action)
    show(target, told, lambda: _advisory(told))


def _advisory(told: dict[str, object]) -> str:
    if told["advisory"]:
        why = "" if told["by"] == "operator" else " (the placer was started with --advisory)"
        return f"Plans are shown and not carried out{why}."
    return "Plans are carried out, unless the placer was started with --advisory."


def _explanations(state: ClusterState, model: str | None) -> list[views.Explanation]:
    if model is not None and model not in state.models:
        raise CommandError(views.not_deployed(model, state))
    names = [model] if model is not None else list(state.models)
    return [views.explain(state, name, None, units.now_ms()) for name in names]


def _plan(view: PlanView, now_ms: int) -> RenderableType:
    if not view.made_unix_ms:
        return Group(_NO_PLAN, *note_lines(view.notes))
    parts: list[RenderableType] = [_head(view, now_ms), *note_lines(view.notes), ""]
    if view.actions:
        table = make_table("ACTION", "MODEL", "WHERE", "SCORE", "WHY")
        for action in view.actions:
            reason = action["reason"] or {}
            table.add_row(
                action["kind"],
                action["model"],
                " + ".join((action["group"] or {}).get("agent_ids", [])),
                f"{reason['score']:.3g}" if reason.get("score") else "-",
                because(reason),
            )
        parts.append(table)
    else:
        parts.append("Nothing is to be done.")
    outlooks = make_table("MODEL", "NEEDED", "ACTIVE", "WARM", "EACH CARRIES", "WHY")
    for outlook in view.outlooks:
        outlooks.add_row(
            outlook["model"],
            f"{outlook['foundation_replicas']} + {outlook['burst_replicas']}",
            str(outlook["active_replicas"]),
            str(outlook["warm_replicas"]),
            str(outlook["capacity"] or "-"),
            because(outlook["reason"] or {}),
        )
    return Group(*parts, "", outlooks)


def _head(view: PlanView, now_ms: int) -> Text:
    what = "Advisory plan" if view.advisory else "Plan"
    return Text(f"{what} made {units.age(view.made_unix_ms, now_ms)} by {view.placer_id}, by the {view.planner} rule")


def _explained(found: list[views.Explanation], view: PlanView, now_ms: int) -> RenderableType:
    parts: list[RenderableType] = [_head(view, now_ms) if view.made_unix_ms else _NO_PLAN, *note_lines(view.notes)]
    for explanation in found:
        parts += ["", Text.assemble((explanation.model, "bold"), f" is {explanation.state}: {explanation.why}")]
        for other in explanation.competitors:
            parts.append(f"  {'won' if other['won'] else 'lost'} {render.competitor(other)}")
        for action in explanation.actions:
            where = " + ".join((action["group"] or {}).get("agent_ids", []))
            parts.append(f"  {action['kind']} on {where}: {because(action['reason'] or {})}")
    return Group(*parts)


def _diff(diff: PlanDiff, now_ms: int) -> RenderableType:
    if not diff.made_unix_ms:
        return Group(_NO_PLAN, *note_lines(diff.notes))
    verb = "would change" if diff.advisory else "changes"
    head = (
        f"The plan made {units.age(diff.made_unix_ms, now_ms)} {verb} {len(diff.changes)} replica(s); "
        f"{diff.unchanged} other(s) stay as they are."
    )
    if not diff.changes:
        return Group(head, *note_lines(diff.notes))
    table = make_table("MODEL", "WHERE", "NOW", "THEN", "RESIDENT", "SCORE", "WHY")
    for change in diff.changes:
        table.add_row(
            change.model,
            " + ".join(change.agents),
            change.now,
            change.then,
            f"{units.share(change.residency_now)} -> {units.share(change.residency_then)}",
            f"{change.score:.3g}" if change.score else "-",
            change.why,
        )
    return Group(head, *note_lines(diff.notes), "", table)
