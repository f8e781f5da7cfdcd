"""Snapshots for tests of the planner, and what carrying out a plan would make of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from services.placer.decisions import Action, Do, Plan
from services.placer.snapshot import Agent, GroupIds, Key, Model, Quantiles, Replica, Snapshot, State, WindowLoad

PAGE = 1 << 20
NOW = 1_000_000.0


def agent(name: str, pages: int = 64, node: str = "n0", **more: Any) -> Agent:
    """An agent g<index>."""
    return Agent(name, node, int(name[1:]), PAGE, pages, **more)


def window(start_s: float, mean: float, peak: float = 0.0) -> WindowLoad:
    """A forecast of 300 s that is sure of itself."""
    return WindowLoad(start_s, start_s + 300, Quantiles.exactly(mean), Quantiles.exactly(max(mean, peak)))


def model(name: str, pages: int = 16, mean: float = 0.0, peak: float = 0.0, **more: Any) -> Model:
    """A model whose shard takes so many pages; with a forecast for this window where a load is given."""
    windows = (window(NOW - 10, mean, peak),) if mean or peak else ()
    return Model(name, pages * PAGE, windows=windows, **more)


def replica(name: str, group: str, state: State = State.WARM, pages: int = 16, **more: Any) -> Replica:
    """A replica on agents given as "g0" or "g0+g1"; resident unless said otherwise, long in its state."""
    values = {"resident": pages, "in_state_s": 100.0, "idle_s": 100.0} | more
    since_s, used_s = NOW - values.pop("in_state_s"), NOW - values.pop("idle_s")
    return Replica(name, tuple(group.split("+")), state, pages, since_s=since_s, used_s=used_s, **values)


def snapshot(agents: list[Agent], models: list[Model], replicas: list[Replica] | None = None, **more: Any) -> Snapshot:
    """A snapshot of these."""
    return Snapshot(NOW, {a.id: a for a in agents}, {m.name: m for m in models}, tuple(replicas or []), **more)


def after(before: Snapshot, plan: Plan) -> dict[Key, Replica]:
    """The replicas once the plan is carried out, in order. Fails where an order does not fit the replica's state."""
    present = {r.key: r for r in before.replicas}
    for action in plan.actions:
        key = (action.model, action.group)
        there = present.get(key)
        if action.do is Do.EVICT:
            assert there is not None
            assert there.state in (State.WARM, State.WARMING)
            keep = round(action.keep * there.shard_pages)
            if keep:
                present[key] = replace(there, resident=keep, state=State.WARM)
            else:
                del present[key]
        elif action.do is Do.DRAIN:
            assert there is not None
            assert there.state in (State.ACTIVE, State.WAKING)
            present[key] = replace(there, state=State.DRAINING)
        else:
            assert there is None or there.state in (State.WARM, State.WARMING, State.DRAINING)
            pages = max(before.shard_pages(before.models[action.model], a) for a in action.group)
            state = State.WAKING if action.do is Do.WAKE else State.WARMING
            present[key] = Replica(action.model, action.group, state, pages, 0)
    return present


def pages_on(replicas: dict[Key, Replica], agent_id: str) -> int:
    """Weight pages on an agent."""
    return sum(r.pages for r in replicas.values() if agent_id in r.group)


def done(plan: Plan, do: Do) -> list[tuple[str, str]]:
    """Models and agents of the plan's actions of one kind."""
    return [(a.model, "+".join(a.group)) for a in plan.actions if a.do is do]


def action(plan: Plan, do: Do, name: str) -> Action:
    """The plan's one action of that kind on a model."""
    [found] = [a for a in plan.actions if a.do is do and a.model == name]
    return found


def group(text: str) -> GroupIds:
    """A group from "g0+g1"."""
    return tuple(text.split("+"))
