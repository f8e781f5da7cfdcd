"""The planner's values as the protos have them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from services.placer import planner
from services.placer.decisions import Action, Competitor, Do, Outlook, Reason
from services.placer.measured import Capacity
from services.placer.planning_frames import Publish
from services.placer.snapshot import GroupIds
from warmserve.v1 import cluster_pb2, common_pb2

_KINDS = {
    Do.WAKE: cluster_pb2.ACTION_KIND_WAKE,
    Do.DRAIN: cluster_pb2.ACTION_KIND_DRAIN,
    Do.WARM: cluster_pb2.ACTION_KIND_WARM,
    Do.EVICT: cluster_pb2.ACTION_KIND_EVICT,
}


class Located(Protocol):
    """An agent, of which the node is known."""

    @property
    def node(self) -> str:
        """Where it is."""


def plan_record(wish: Publish, outlooks: Iterable[Outlook], agents: Mapping[str, Located]) -> cluster_pb2.Plan:
    """A plan as etcd holds it, without its date."""
    return cluster_pb2.Plan(
        fence=wish.fence,
        planner=planner.RULE,
        placer_id=wish.placer_id,
        actions=[action_record(action, agents) for action in wish.actions],
        outlooks=[outlook_record(outlook, wish.capacities.get(outlook.model), agents) for outlook in outlooks],
        advisory=wish.advisory,
    )


def group_record(group: GroupIds, agents: Mapping[str, Located]) -> common_pb2.Group:
    """A group as agents are told of it."""
    node = next((agents[agent_id].node for agent_id in group if agent_id in agents), "")
    return common_pb2.Group(agent_ids=group, node=node)


def reason_record(reason: Reason) -> common_pb2.Reason:
    """A reason as the protos have it."""
    return common_pb2.Reason(cause=reason.cause, text=reason.text, by_model=reason.by_model, score=reason.score)


def action_record(action: Action, agents: Mapping[str, Located]) -> cluster_pb2.Action:
    """An action as etcd holds it."""
    return cluster_pb2.Action(
        kind=_KINDS[action.do],
        model=action.model,
        group=group_record(action.group, agents),
        reason=reason_record(action.reason),
        keep_residency=action.keep,
    )


def outlook_record(
    outlook: Outlook, capacity: Capacity | None, agents: Mapping[str, Located]
) -> cluster_pb2.ModelOutlook:
    """An outlook as etcd holds it."""
    return cluster_pb2.ModelOutlook(
        model=outlook.model,
        foundation_replicas=outlook.foundation,
        burst_replicas=outlook.burst,
        active_replicas=outlook.active,
        warm_replicas=outlook.warm,
        reason=reason_record(outlook.reason),
        competitors=[_competitor_record(competitor, agents) for competitor in outlook.competitors],
        capacity=capacity.requests if capacity else 0,
        capacity_source=capacity.source if capacity else "",
    )


def _competitor_record(competitor: Competitor, agents: Mapping[str, Located]) -> cluster_pb2.Competitor:
    return cluster_pb2.Competitor(
        model=competitor.model,
        won=competitor.won,
        score=competitor.score,
        group=group_record(competitor.where, agents),
    )
