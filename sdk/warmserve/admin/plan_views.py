"""What the newest plan means to an operator: what it does, why, and what it would change. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from warmserve._enums import enum_word
from warmserve.admin import views
from warmserve.admin.plain import Plain, plain
from warmserve.admin.state import ClusterState
from warmserve.v1 import cluster_pb2

_THEN = {
    cluster_pb2.ACTION_KIND_WAKE: ("active", 1.0),
    cluster_pb2.ACTION_KIND_WARM: ("warm", 1.0),
}


@dataclass(frozen=True)
class PlanView:
    """The newest plan."""

    made_unix_ms: int
    """0 where none was made."""
    planner: str
    placer_id: str
    advisory: bool
    """Its actions are shown and not carried out."""
    actions: list[Plain]
    """Orders on their way; of an advisory plan, what would be ordered."""
    outlooks: list[Plain]
    """One of each deployed model."""
    notes: list[str]


@dataclass(frozen=True)
class Change:
    """One replica that a plan changes."""

    model: str
    agents: list[str]
    now: str
    """Its state; cold where nothing is resident."""
    then: str
    residency_now: float
    residency_then: float
    actions: list[str]
    why: str
    by_model: str
    score: float


@dataclass(frozen=True)
class PlanDiff:
    """What carrying out the newest plan changes, against what is now."""

    made_unix_ms: int
    advisory: bool
    changes: list[Change]
    unchanged: int
    """Replicas that stay as they are."""
    notes: list[str]


def plan_view(state: ClusterState) -> PlanView:
    """The newest plan, as it is in etcd."""
    plan = state.plan or cluster_pb2.Plan()
    return PlanView(
        made_unix_ms=plan.made_unix_ms,
        planner=plan.planner,
        placer_id=plan.placer_id,
        advisory=plan.advisory,
        actions=[plain(action) for action in plan.actions],
        outlooks=[plain(outlook) for outlook in plan.outlooks],
        notes=views.obstacles(state),
    )


def plan_diff(state: ClusterState) -> PlanDiff:
    """The replicas that the newest plan's actions change. Those that etcd shows carried out already are left out."""
    plan = state.plan or cluster_pb2.Plan()
    present = {(replica.model, tuple(replica.agents)): replica for replica in views.replicas(state)}
    by_replica: dict[tuple[str, tuple[str, ...]], list[cluster_pb2.Action]] = {}
    for action in plan.actions:
        by_replica.setdefault((action.model, tuple(action.group.agent_ids)), []).append(action)
    changes = []
    for (model, agents), actions in by_replica.items():
        replica = present.get((model, agents))
        now = replica.state if replica is not None else "cold"
        residency = replica.residency if replica is not None else 0.0
        then, residency_then = now, residency
        for action in actions:
            then, residency_then = _after(action, residency_then)
        if (then, residency_then) == (now, residency):
            continue
        last = actions[-1]
        changes.append(
            Change(
                model=model,
                agents=list(agents),
                now=now,
                then=then,
                residency_now=residency,
                residency_then=residency_then,
                actions=[enum_word(cluster_pb2.ActionKind.DESCRIPTOR, action.kind) for action in actions],
                why=last.reason.text,
                by_model=last.reason.by_model,
                score=last.reason.score,
            )
        )
    changed = {(change.model, tuple(change.agents)) for change in changes}
    return PlanDiff(
        made_unix_ms=plan.made_unix_ms,
        advisory=plan.advisory,
        changes=changes,
        unchanged=len(present.keys() - changed),
        notes=views.obstacles(state),
    )


def _after(action: cluster_pb2.Action, residency: float) -> tuple[str, float]:
    """State and residency once an action is carried out."""
    if action.kind in _THEN:
        return _THEN[action.kind]
    if action.kind == cluster_pb2.ACTION_KIND_EVICT:
        kept = min(action.keep_residency, residency)
        return ("warm" if kept else "cold"), kept
    return "warm", residency  # a drain, once its requests have ended
