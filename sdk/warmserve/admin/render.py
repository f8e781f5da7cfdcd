"""Views drawn for people, with rich. Pure: `now_ms` is given, and nothing is printed here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text

from warmserve.admin import units
from warmserve.admin.drawing import fact_list, make_table, note_lines
from warmserve.admin.plain import Plain
from warmserve.admin.views import (
    AgentSummary,
    Explanation,
    ModelDescription,
    ModelSummary,
    Replica,
    Status,
)

_STYLES = {"active": "green", "warm": "cyan", "draining": "yellow", "warming": "yellow", "cold": "dim"}


def models(found: Sequence[ModelSummary], now_ms: int) -> RenderableType:
    """`models list`."""
    if not found:
        return "No model is deployed. Deploy one with: warmctl models deploy NAME --source DIR"
    table = make_table("NAME", "STATE", "REPLICAS", "ARCHITECTURE", "PARAMETERS", "TP", "CONTEXT", "DEPLOYED")
    for model in found:
        counts = ", ".join(f"{count} {state}" for state, count in model.replicas.items() if count)
        table.add_row(
            model.name,
            _state(model.state),
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
        ("state", _state(description.state)),
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
    return Group(Text(description.name, style="bold"), fact_list(rows), "", _replicas(description.replicas, now_ms))


def agents(found: Sequence[AgentSummary], now_ms: int) -> RenderableType:
    """`agents list`."""
    if not found:
        return "No agent is registered."
    table = make_table("ID", "NODE", "DEVICE", "STATE", "ARENA", "WEIGHTS █  KV ▓  FREE ░", "MODELS", "INSTANCES", "UP")
    for agent in found:
        table.add_row(
            agent.id,
            agent.node or "-",
            f"{agent.device_index} {agent.device_name} ({agent.backend})" if agent.registered else "-",
            _agent_state(agent),
            units.size(agent.pages_total * agent.page_bytes) if agent.registered else "-",
            _arena(agent),
            str(len(agent.models)),
            str(agent.instances),
            units.age(agent.started_unix_ms, now_ms).removesuffix(" ago"),
        )
    return table


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
                _agent_state(agent),
                _arena(agent),
                *(units.size(pages * agent.page_bytes) if agent.registered else "-" for pages in sizes),
            )
        parts += [table, ""]
    models_table = make_table("MODELS", "", "")
    for state, names in view.models.items():
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        models_table.add_row(_state(state), str(len(names)), shown)
    parts.append(models_table if view.models else "No model is deployed.")
    return Group(*parts, *note_lines(view.notes))


def explanation(view: Explanation, now_ms: int) -> RenderableType:
    """`explain`."""
    parts: list[RenderableType] = [
        Text.assemble((view.model, "bold"), " is ", _state(view.state), f": {view.why}"),
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
            ("reason", _cause(reason)),
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
    parts += [f" ({units.size(event['bytes'])})"] if event["bytes"] else []
    why = because(event["reason"] or {})
    return Text.assemble(*parts, f": {why}" if why else "")


def _replicas(found: Sequence[Replica], now_ms: int) -> RenderableType:
    if not found:
        return "No replica: nothing of it is resident on any agent."
    table = make_table("REPLICA ON", "STATE", "SINCE", "RESIDENT", "WEIGHTS", "KV", "REST FROM", "WHY")
    for replica in found:
        copying = f" ({units.size(replica.bytes_per_s)}/s)" if replica.bytes_per_s else ""
        table.add_row(
            " + ".join(replica.agents),
            _state(replica.state),
            units.age(replica.since_unix_ms, now_ms),
            units.share(replica.residency) + copying,
            units.size(replica.weight_bytes),
            units.size(replica.kv_bytes) if replica.kv_bytes else "-",
            replica.tier if replica.residency < 1 else "-",
            because(replica.reason),
        )
    return table


def _events(found: Iterable[Plain], now_ms: int) -> Table:
    table = make_table("WHEN", "EVENT", "ON", "TOOK", "WHY")
    for event in found:
        table.add_row(
            units.age(event["unix_ms"], now_ms),
            event["kind"],
            " + ".join(event["agent_ids"]),
            units.duration(event["duration_ms"]) if event["duration_ms"] else "",
            because(event["reason"] or {}),
        )
    return table


def _state(state: str) -> Text:
    return Text(state, style=_STYLES.get(state, ""))


def _agent_state(agent: AgentSummary) -> str:
    words = [] if agent.registered else ["not registered"]
    words += ["stopping"] if agent.stopping else []
    words += [agent.control] if agent.control else []
    return ", ".join(words) or "ready"


def _arena(agent: AgentSummary) -> str:
    if not agent.registered:
        return "-"
    used = agent.pages_weights + agent.pages_kv
    drawn = units.bar([(agent.pages_weights, "█"), (agent.pages_kv, "▓")], agent.pages_total)
    return f"{drawn} {units.share(used / agent.pages_total if agent.pages_total else 0)}"


def because(reason: Plain) -> str:
    """A reason's sentence, or its cause, and whom it serves."""
    text = str(reason.get("text") or _cause(reason))
    return f"{text} (for {reason['by_model']})" if reason.get("by_model") and reason["by_model"] not in text else text


def _cause(reason: Plain) -> str:
    cause = str(reason.get("cause", "unspecified"))
    words = "" if cause == "unspecified" else cause.replace("_", " ")
    return f"{words}, score {reason['score']:.3g}" if words and reason.get("score") else words


def _or(value: int | None, otherwise: str) -> str:
    return str(value) if value else otherwise
