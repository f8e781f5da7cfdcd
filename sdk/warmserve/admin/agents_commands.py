"""`warmctl agents`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated

import typer

from warmserve.admin import agent_render, agent_views, units, views
from warmserve.admin.arguments import AgentId, OutputOption, target_of
from warmserve.admin.state import ClusterState, read_state
from warmserve.admin.target import CommandError, Output, run, show
from warmserve.cluster.store import Store
from warmserve.v1 import cluster_pb2

app = typer.Typer(help="Look at GPU agents, and cordon or drain them.", no_args_is_help=True)


@app.command("list")
def list_command(ctx: typer.Context, output: OutputOption = None) -> None:
    """List the agents: what their memory holds, and whether they are cordoned, draining or drained.

    Examples:

      warmctl agents list

      warmctl -o json agents list
    """
    target = target_of(ctx, output)
    found = agent_views.agent_summaries(run(target, lambda store: read_state(store, target.keys)))
    show(target, found, lambda: agent_render.agents(found, units.now_ms()))


@app.command("describe")
def describe_command(ctx: typer.Context, agent: AgentId, output: OutputOption = None) -> None:
    """Describe an agent: draw what its arena holds, the tiers beside it, and what is copied now.

    Examples:

      warmctl agents describe node1-gpu0

      watch warmctl agents describe node1-gpu0
    """
    target = target_of(ctx, output)

    async def action(store: Store) -> agent_views.AgentDescription:
        state = await read_state(store, target.keys)
        _check_known(state, agent)
        return agent_views.describe_agent(state, agent)

    description = run(target, action)
    show(target, description, lambda: agent_render.agent(description, units.now_ms()))


@app.command("drain")
def drain_command(
    ctx: typer.Context,
    agent: AgentId,
    undo: Annotated[bool, typer.Option("--undo", help="Take the wish back: place on it again.")] = False,
    output: OutputOption = None,
) -> None:
    """Drain an agent: place nothing new on it, finish its requests, move away what it holds.

    The wish stays until --undo, also when the agent restarts. Repeat the command to see how far it is.

    Examples:

      warmctl agents drain node1-gpu0

      warmctl agents drain node1-gpu0 --undo
    """

    async def action(store: Store, state: ClusterState, key: str) -> None:
        if undo:
            if not _drained(state, agent):
                raise CommandError(f"{agent} is not being drained")
            await store.delete(key)
        elif not _drained(state, agent):
            await store.put(key, cluster_pb2.AgentControl(cordoned=True, drained=True, set_unix_ms=units.now_ms()))

    _control(ctx, agent, output, action)


@app.command("cordon")
def cordon_command(ctx: typer.Context, agent: AgentId, output: OutputOption = None) -> None:
    """Cordon an agent: place nothing new on it; what is there stays and serves.

    Examples:

      warmctl agents cordon node1-gpu0
    """

    async def action(store: Store, state: ClusterState, key: str) -> None:
        if _drained(state, agent):
            raise CommandError(f"{agent} is being drained already: to cordon it only, first warmctl agents uncordon it")
        if agent not in state.controls:
            await store.create(key, cluster_pb2.AgentControl(cordoned=True, set_unix_ms=units.now_ms()))

    _control(ctx, agent, output, action)


@app.command("uncordon")
def uncordon_command(ctx: typer.Context, agent: AgentId, output: OutputOption = None) -> None:
    """Uncordon an agent: place on it again, whether it was cordoned or drained.

    Examples:

      warmctl agents uncordon node1-gpu0
    """

    async def action(store: Store, state: ClusterState, key: str) -> None:
        if not await store.delete(key):
            raise CommandError(f"{agent} is neither cordoned nor drained")

    _control(ctx, agent, output, action)


def _control(
    ctx: typer.Context,
    agent: str,
    output: Output | None,
    action: Callable[[Store, ClusterState, str], Awaitable[None]],
) -> None:
    """Does something about the operator's wish at a key, and says how the agent stands then."""
    target = target_of(ctx, output)

    async def act(store: Store) -> agent_views.AgentSummary:
        state = await read_state(store, target.keys)
        _check_known(state, agent)
        await action(store, state, target.keys.control(agent))
        state = await read_state(store, target.keys)
        # An agent that is not registered is forgotten with the wish about it.
        known = {summary.id: summary for summary in agent_views.agent_summaries(state)}
        return known.get(agent) or agent_views.agent_summary(state, cluster_pb2.AgentRecord(id=agent))

    summary = run(target, act)
    show(target, summary, lambda: _sentence(summary))


def _check_known(state: ClusterState, agent: str) -> None:
    if not any(summary.id == agent for summary in agent_views.agent_summaries(state)):
        raise CommandError(f"no agent {agent!r}: {views.nearest(agent, state.agents)}")


def _drained(state: ClusterState, agent: str) -> bool:
    return agent in state.controls and state.controls[agent].drained


def _sentence(summary: agent_views.AgentSummary) -> str:
    if not summary.control:
        return f"{summary.id} takes replicas again."
    if summary.control == "cordoned":
        return f"{summary.id} is cordoned: nothing new is placed on it; what is there stays."
    if summary.control == "drained":
        return f"{summary.id} is drained: nothing is left on it."
    return (
        f"{summary.id} is draining: {summary.instances} instance(s) and weights of "
        f"{len(summary.models)} model(s) ({', '.join(summary.models)}) are still on it."
    )
