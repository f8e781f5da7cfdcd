"""Agents drawn for people, with rich. Pure: `now_ms` is given, and nothing is printed here."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from warmserve.admin import arena_map, units
from warmserve.admin.agent_views import AgentDescription, AgentSummary, Copy, Share
from warmserve.admin.drawing import because, fact_list, make_table, noted_table, state_text


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
            agent_state(agent),
            units.size(agent.pages_total * agent.page_bytes) if agent.registered else "-",
            arena_bar(agent),
            str(len(agent.models)),
            str(agent.instances),
            units.age(agent.started_unix_ms, now_ms).removesuffix(" ago"),
        )
    return table


def agent(description: AgentDescription, now_ms: int) -> RenderableType:
    """`agents describe`."""
    summary = description.agent
    head = [("state", agent_state(summary))]
    if not summary.registered:
        return Group(Text(summary.id, style="bold"), fact_list(head))
    page = summary.page_bytes
    head += [
        ("node", summary.node),
        ("device", f"{summary.device_index} {summary.device_name} ({summary.backend})"),
        ("address", summary.address),
        ("version", summary.version),
        ("up", units.age(summary.started_unix_ms, now_ms).removesuffix(" ago")),
        ("arena", f"{units.size(summary.pages_total * page)} in {summary.pages_total} pages of {units.size(page)}"),
        ("changed", units.age(description.updated_unix_ms, now_ms)),
    ]
    parts: list[RenderableType] = [Text(summary.id, style="bold"), fact_list(head), ""]
    if not description.updated_unix_ms:
        return Group(*parts, "It has not told yet what it holds.")
    parts += [
        *arena_map.draw(description),
        Text(f"  {arena_map.LEGEND}", style="dim"),
        "",
        _shares(description, now_ms),
    ]
    if description.copies:
        parts += ["", _copies(description.copies)]
    parts += ["", _tiers(description)]
    if description.images:
        parts += ["", _images(description)]
    return Group(*parts)


def _shares(description: AgentDescription, now_ms: int) -> RenderableType:
    if not description.shares:
        return "No model is resident."
    page = description.agent.page_bytes

    def row(label: str, share: Share) -> list[str | Text]:
        return [
            label,
            share.model,
            state_text(share.state),
            units.age(share.since_unix_ms, now_ms).removesuffix(" ago"),
            units.share(share.residency),
            units.size(share.weight_pages * page),
            units.size(share.lent_pages * page) if share.lent_pages else "-",
            units.size(share.kv_pages * page) if share.kv_pages else "-",
            str(share.running) if share.instance_id else "-",
            f"{share.score:.2g} s" if share.score else "-",
        ]

    columns = ("", "MODEL", "STATE", "FOR", "SHARE", "WEIGHTS", "LENT", "KV", "RUNS", "WORTH")
    labelled = zip(arena_map.letters(len(description.shares)), description.shares, strict=True)
    return noted_table(columns, [(row(label, share), because(share.reason)) for label, share in labelled])


def _copies(found: Sequence[Copy]) -> RenderableType:
    table = make_table("COPYING", "FROM → TO", "DONE", "", "OF", "AT", "READY IN")
    for copy in found:
        done = copy.bytes_done / copy.bytes_total if copy.bytes_total else 0.0
        table.add_row(
            _of(copy.models),
            f"{copy.source} → {copy.target}",
            units.bar([(copy.bytes_done, "█")], copy.bytes_total, 16),
            units.share(done),
            units.size(copy.bytes_total) if copy.bytes_total else "not known yet",
            units.speed(copy.bytes_per_s) if copy.bytes_per_s else "-",
            units.duration(copy.remaining_ms) if copy.remaining_ms is not None else "-",
        )
    return table


def _tiers(description: AgentDescription) -> RenderableType:
    summary = description.agent
    page = summary.page_bytes
    taken = summary.pages_total - summary.pages_free
    free = [f"{units.size(summary.pages_free * page)} free"]
    free += [f"of which {units.size(summary.pages_promised * page)} promised to KV"] if summary.pages_promised else []
    lent = f"{units.size(summary.pages_lent * page)} of weights lent" if summary.pages_lent else ""
    table = make_table("TIER", "USED", "", "OF", "")
    total = summary.pages_total * page
    table.add_row("gpu", *_used(taken * page, total), ", ".join([*free, *([lent] if lent else [])]))
    if description.host_budget_bytes:
        kept = sum(image.in_memory for image in description.images)
        used, budget = description.host_used_bytes, description.host_budget_bytes
        table.add_row("host", *_used(used, budget), f"{kept} image(s) in memory")
    else:
        table.add_row("host", "-", "", "-", "no images are kept in memory (host_tier_bytes is 0)")
    if description.disk_capacity_bytes:
        size = sum(image.bytes for image in description.images if image.on_disk)
        count = sum(image.on_disk for image in description.images)
        used = description.disk_capacity_bytes - description.disk_free_bytes
        said = f"{count} image(s) of {units.size(size)}; {units.size(description.disk_free_bytes)} free"
        table.add_row("disk", *_used(used, description.disk_capacity_bytes), said)
    return table


def _used(used: int, total: int) -> tuple[str, str, str]:
    share = used / total if total else 0.0
    return units.size(used), f"{units.bar([(used, '█')], total, 16)} {units.share(share)}", units.size(total)


def _images(description: AgentDescription) -> RenderableType:
    table = make_table(f"IMAGE ON {description.agent.node}, OF", "SIZE", "IN MEMORY", "WORTH", "ON DISK")
    for image in description.images:
        table.add_row(
            _of(image.models) if image.models else f"no deployed model ({image.name})",
            units.size(image.bytes),
            "yes" if image.in_memory else "-",
            f"{image.score:.3g} requests" if image.in_memory and image.score else "-",
            "yes" if image.on_disk else "-",
        )
    return table


def _of(models: Sequence[str]) -> str:
    return ", ".join(models) or "no deployed model"


def agent_state(agent: AgentSummary) -> str:
    """What an agent does, and what was asked of it."""
    words = [] if agent.registered else ["not registered"]
    words += ["stopping"] if agent.stopping else []
    words += [agent.control] if agent.control else []
    return ", ".join(words) or "ready"


def arena_bar(agent: AgentSummary) -> str:
    """What an arena holds, in a few characters."""
    if not agent.registered:
        return "-"
    used = agent.pages_weights + agent.pages_kv
    drawn = units.bar([(agent.pages_weights, "█"), (agent.pages_kv, "▓")], agent.pages_total, 16)
    return f"{drawn} {units.share(used / agent.pages_total if agent.pages_total else 0)}"
