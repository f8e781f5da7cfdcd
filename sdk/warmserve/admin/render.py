"""Views drawn for people, with rich. Pure: `now_ms` is given, and nothing is printed here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text

from warmserve.admin import units
from warmserve.admin.agent_render import agent_state, arena_bar
from warmserve.admin.drawing import because, cause, fact_list, make_table, note_lines, noted_table, state_text
from warmserve.admin.plain import Plain
from warmserve.admin.views import (
    Explanation,
    Instance,
    ModelDescription,
    ModelSummary,
    Replica,
    Status,
)


def models(found: Sequence[ModelSummary], now_ms: int) -> RenderableType:
    """`models list`."""
    if not found:
        return "No model is deployed. Deploy one with: warmctl models deploy NAME --source DIR"
    table = make_table("NAME", "STATE", "REPLICAS", "ARCHITECTURE", "PARAMETERS", "TP", "CONTEXT", "DEPLOYED")
    for model in found:
        counts = ", ".join(f"{count} {state}" for state, count in model.replicas.items() if count and state != "cold")
        table.add_row(
            model.name,
            state_text(model.state),
            counts or "-",
            model.architecture,
            units.quantity(model.parameters),
            str(model.tp),
            str(model.context_tokens),
            units.age(model.deployed_unix_ms, now_ms),
        )
    return table


def model(description: ModelDescription, now_ms: int) -> RenderableType:
    """`models describe`."""
    spec = description.spec
    facts, limits, target = spec["facts"] or {}, spec["limits"] or {}, spec["target"] or {}
    rows = [
        ("state", state_text(description.state)),
        ("source", spec["source"]),
        ("deployed", f"{units.clock(spec['deployed_unix_ms'])} ({units.age(spec['deployed_unix_ms'], now_ms)})"),
        ("architecture", facts.get("architecture", "-")),
        ("parameters", units.quantity(facts.get("parameters", 0))),
        ("dtype", "as the checkpoint says" if spec["dtype"] == "unspecified" else spec["dtype"]),
        ("layers", str(facts.get("layers", 0))),
        ("tensor parallel", str(spec["tp"] or 1)),
        ("weights per shard", units.size(facts.get("shard_bytes", 0))),
        ("KV per token", f"{units.size(facts.get('kv_bytes_per_token', 0))} per shard"),
        ("context", f"{facts.get('context_tokens', 0)} tokens"),
        ("most sequences", _or(limits.get("max_batch"), "the agent's default")),
        ("replicas active", f"{spec['min_replicas']} to {_or(spec['max_replicas'], 'any number')}"),
        ("replicas pinned", _or(spec["pinned_replicas"], "none")),
        ("priority", f"{spec['priority'] or 1:g}"),
        ("TTFT p95 target", units.duration(target["ttft_p95_ms"]) if target.get("ttft_p95_ms") else "none"),
        ("time per token target", units.duration(target["tpot_ms"]) if target.get("tpot_ms") else "none"),
        ("fingerprint", facts.get("fingerprint", "-")),
    ]
    return Group(Text(description.name, style="bold"), fact_list(rows), "", *_served(description, now_ms))


def _served(description: ModelDescription, now_ms: int) -> list[RenderableType]:
    parts: list[RenderableType] = [_replicas(description.replicas, now_ms)]
    if description.instances:
        parts += ["", _instances(description.instances, now_ms)]
    if description.transitions is not None:
        parts += ["", _events(description.transitions, now_ms) if description.transitions else "No events about it."]
    return parts


def status(view: Status, now_ms: int) -> RenderableType:
    """`status`: one screen."""
    leader = f"{view.leader['id']} at {view.leader['address']}" if view.leader else Text("none leads", style="red")
    plan = (
        f"made {units.age(view.plan_made_unix_ms, now_ms)} by the {view.planner} rule, {view.plan_actions} action(s)"
        if view.plan_made_unix_ms
        else "none made yet"
    )
    forecast = (
        f"made {units.age(view.forecast_made_unix_ms, now_ms)} by the {view.predictor} predictor"
        if view.forecast_made_unix_ms
        else "none made yet"
    )
    head = fact_list(
        [
            ("etcd", view.etcd_version),
            ("placer", leader),
            ("newest plan", plan),
            ("newest forecast", forecast),
            ("routers", ", ".join(f"{r['id']} ({r['address']}, {r['http_url']})" for r in view.routers) or "none"),
        ]
    )
    parts: list[RenderableType] = [head, ""]
    if view.agents:
        table = make_table("AGENT", "NODE", "STATE", "WEIGHTS █  KV ▓  FREE ░", "WEIGHTS", "KV", "FREE")
        for agent in view.agents:
            sizes = [agent.pages_weights, agent.pages_kv, agent.pages_free]
            table.add_row(
                agent.id,
                agent.node or "-",
                agent_state(agent),
                arena_bar(agent),
                *(units.size(pages * agent.page_bytes) if agent.registered else "-" for pages in sizes),
            )
        parts += [table, ""]
    models_table = make_table("MODELS", "", "")
    for state, names in view.models.items():
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        models_table.add_row(state_text(state), str(len(names)), shown)
    parts.append(models_table if view.models else "No model is deployed.")
    return Group(*parts, *note_lines(view.notes))


def explanation(view: Explanation, now_ms: int) -> RenderableType:
    """`explain`."""
    parts: list[RenderableType] = [
        Text.assemble((view.model, "bold"), " is ", state_text(view.state), f": {view.why}"),
        *note_lines(view.notes),
        "",
    ]
    rows: list[tuple[str, str | Text]] = []
    if view.outlook is not None:
        outlook = view.outlook
        reason = outlook["reason"] or {}
        rows += [
            ("plan", f"made {units.age(view.plan_made_unix_ms, now_ms)} by the {view.planner} rule"),
            ("needed", f"{outlook['foundation_replicas']} for the mean load, {outlook['burst_replicas']} for its peak"),
            ("had", f"{outlook['active_replicas']} active; {outlook['warm_replicas']} warm once the plan is done"),
            ("reason", cause(reason)),
        ]
        if outlook["capacity"]:
            carried = f"{outlook['capacity']} requests each ({outlook['capacity_source']})"
            rows.append(("instances carry", carried))
        rows += [("won" if other["won"] else "lost", competitor(other)) for other in view.competitors]
    if view.forecast is not None:
        mean, peak = view.forecast["mean_load"] or {}, view.forecast["peak_load"] or {}
        text = (
            f"mean {mean.get('p50', 0):.2f} (p90 {mean.get('p90', 0):.2f}), "
            f"peak {peak.get('p50', 0):.2f} (p90 {peak.get('p90', 0):.2f}) requests in progress, "
            f"window of {units.duration(view.forecast['window_s'] * 1000)}"
        )
        rows.append(("forecast", text))
    parts.append(fact_list(rows))
    if view.actions:
        table = make_table("THE PLAN'S ACTIONS", "WHERE", "WHY")
        for action in view.actions:
            where = " + ".join((action["group"] or {}).get("agent_ids", []))
            table.add_row(action["kind"], where, because(action["reason"] or {}))
        parts += ["", table]
    parts += ["", _replicas(view.replicas, now_ms)]
    if view.events is not None:
        parts += ["", _events(view.events, now_ms) if view.events else "No events about it."]
    return Group(*parts)


def competitor(other: Plain) -> str:
    """ "against qwen on g0, worth 0.25 s of waiting to it"."""
    where = " + ".join((other["group"] or {}).get("agent_ids", []))
    place = f" on {where}" if where else ""
    return (
        f"{'against' if other['won'] else 'to'} {other['model']}{place}, worth {other['score']:.3g} s of waiting to it"
    )


def event_line(event: Plain) -> RenderableType:
    """One line of `events`."""
    parts: list[str | Text | tuple[str, str | Style]] = [(units.clock(event["unix_ms"]), "dim")]
    parts += [f"  {event['kind']:<15}"]
    parts += [f" {event['model']}"] if event["model"] else []
    parts += [f" on {' + '.join(event['agent_ids'])}"] if event["agent_ids"] else []
    parts += [f" in {units.duration(event['duration_ms'])}"] if event["duration_ms"] else []
    parts += [f" ({_moved(event)})"] if event["bytes"] else []
    why = because(event["reason"] or {})
    return Text.assemble(*parts, f": {why}" if why else "")


def _replicas(found: Sequence[Replica], now_ms: int) -> RenderableType:
    if not found:
        return "No replica: nothing of it is resident on any agent."

    def row(replica: Replica) -> list[str | Text]:
        copying = f" ({units.speed(replica.bytes_per_s)})" if replica.bytes_per_s else ""
        return [
            " + ".join(replica.agents),
            state_text(replica.state),
            units.age(replica.since_unix_ms, now_ms),
            units.share(replica.residency) + copying,
            units.size(replica.weight_bytes),
            units.size(replica.kv_bytes) if replica.kv_bytes else "-",
            replica.tier if replica.residency < 1 else "-",
        ]

    columns = ("REPLICA ON", "STATE", "SINCE", "RESIDENT", "WEIGHTS", "KV", "REST FROM")
    return noted_table(columns, [(row(replica), because(replica.reason)) for replica in found])


def _instances(found: Sequence[Instance], now_ms: int) -> Table:
    table = make_table("INSTANCE", "ON", "STATE", "RUNNING", "PER TOKEN", "KV", "SINCE")
    for instance in found:
        table.add_row(
            instance.id,
            " + ".join(instance.agents),
            state_text(instance.state),
            f"{instance.running} of {instance.slots}",
            "{:.3g} to {:.3g} ms".format(*instance.token_ms) if instance.token_ms else "-",
            units.size(instance.kv_bytes),
            units.age(instance.started_unix_ms, now_ms),
        )
    return table


def _events(found: Iterable[Plain], now_ms: int) -> RenderableType:
    def row(event: Plain) -> list[str | Text]:
        return [
            units.age(event["unix_ms"], now_ms),
            event["kind"],
            _change(event),
            " + ".join(event["agent_ids"]),
            units.duration(event["duration_ms"]) if event["duration_ms"] else "",
            _moved(event),
        ]

    columns = ("WHEN", "EVENT", "FROM → TO", "ON", "TOOK", "BYTES")
    return noted_table(columns, [(row(event), because(event["reason"] or {})) for event in found])


def _change(event: Plain) -> Text:
    """ "warm → active"; nothing where the event is not about a replica's state."""
    before, after = event["from_state"], event["to_state"]
    if after == "unspecified":
        return Text("")
    return state_text(after) if before == after else Text.assemble(state_text(before), " → ", state_text(after))


def _moved(event: Plain) -> str:
    """ "16.1 GiB at 54.0 GB/s from host"."""
    if not event["bytes"]:
        return ""
    speed = f" at {units.speed(event['bytes'] / event['copy_ms'] * 1e3)}" if event["copy_ms"] else ""
    source = f" from {event['tier']}" if event["tier"] != "unspecified" else ""
    return f"{units.size(event['bytes'])}{speed}{source}"


def _or(value: int | None, otherwise: str) -> str:
    return str(value) if value else otherwise
