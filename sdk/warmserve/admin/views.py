"""What the cluster's state means to an operator: models, replicas, and why a model is warm or cold. Pure."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from warmserve._enums import enum_word
from warmserve.admin.agent_views import AgentSummary, agent_summaries
from warmserve.admin.plain import Plain, plain
from warmserve.admin.state import ClusterState
from warmserve.v1 import cluster_pb2, common_pb2

# Least ready first: the state of a replica is that of its least ready shard, of a model that of its readiest replica.
_READINESS = (
    common_pb2.REPLICA_STATE_COLD,
    common_pb2.REPLICA_STATE_WARMING,
    common_pb2.REPLICA_STATE_DRAINING,
    common_pb2.REPLICA_STATE_WARM,
    common_pb2.REPLICA_STATE_ACTIVE,
)
STATES = tuple(enum_word(common_pb2.ReplicaState.DESCRIPTOR, state) for state in reversed(_READINESS))


@dataclass(frozen=True)
class Replica:
    """One copy of a model's weights on a group of agents."""

    model: str
    agents: list[str]
    node: str
    state: str
    residency: float
    """Share of the weight pages of all shards that is resident, 0 to 1."""
    weight_bytes: int
    """Bytes of weights resident, on all agents."""
    kv_bytes: int
    tier: str
    """Where missing pages would come from."""
    reason: Plain
    since_unix_ms: int
    instance_id: str
    bytes_per_s: float
    """Of the copy in progress; 0 where none is."""


@dataclass(frozen=True)
class ModelSummary:
    """One deployed model in a list."""

    name: str
    state: str
    replicas: dict[str, int]
    """How many are in each state."""
    architecture: str
    parameters: int
    shard_bytes: int
    tp: int
    context_tokens: int
    min_replicas: int
    max_replicas: int
    source: str
    deployed_unix_ms: int


@dataclass(frozen=True)
class Instance:
    """One replica that serves."""

    id: str
    agents: list[str]
    state: str
    running: int
    """Sequences in progress."""
    slots: int
    """Sequences it can run at a time."""
    kv_bytes: int
    started_unix_ms: int
    token_ms: tuple[float, float] | None
    """Milliseconds between two tokens of a sequence while it runs one, and all that it can; None: not known."""


@dataclass(frozen=True)
class ModelDescription:
    """All about one deployed model."""

    name: str
    state: str
    spec: Plain
    replicas: list[Replica]
    instances: list[Instance]
    transitions: list[Plain] | None
    """The newest events about it, oldest first; None where Redis was not asked or did not answer."""


@dataclass(frozen=True)
class Explanation:
    """Why a model is warm or cold."""

    model: str
    state: str
    why: str
    """The deciding sentence of the newest plan, or why there is none."""
    notes: list[str]
    """What stands in the way of anything better."""
    outlook: Plain | None
    """What the newest plan holds of it: replicas needed and had, and the reason."""
    plan_made_unix_ms: int
    planner: str
    actions: list[Plain]
    """What the newest plan does about it, in order."""
    forecast: Plain | None
    """The forecast of the current window."""
    competitors: list[Plain]
    """The models it won memory from or lost it to, the dearest first."""
    replicas: list[Replica]
    events: list[Plain] | None
    """The newest events, oldest first; None where Redis was not asked or did not answer."""


@dataclass(frozen=True)
class Status:
    """The cluster on one screen."""

    etcd_version: str
    leader: Plain | None
    plan_made_unix_ms: int
    """0 where no plan was made."""
    planner: str
    plan_actions: int
    forecast_made_unix_ms: int
    """The newest forecast; 0 where none was made."""
    predictor: str
    routers: list[Plain]
    agents: list[AgentSummary]
    models: dict[str, list[str]]
    """Names of deployed models by state, readiest first."""
    notes: list[str]


def replicas(state: ClusterState) -> list[Replica]:
    """All replicas that agents tell of, in order of model and agents; cold ones too, with the reason why they are."""
    shards: dict[tuple[str, tuple[str, ...]], dict[str, cluster_pb2.ResidentShard]] = {}
    for agent_id, residency in state.residency.items():
        for shard in residency.shards:
            group = tuple(shard.group.agent_ids) or (agent_id,)
            shards.setdefault((shard.model, group), {})[agent_id] = shard
    return [_replica(state, model, group, found) for (model, group), found in sorted(shards.items())]


def _replica(
    state: ClusterState, model: str, group: tuple[str, ...], shards: dict[str, cluster_pb2.ResidentShard]
) -> Replica:
    # A shard that its agent does not report is cold.
    ranks = [_rank(shards[agent].state) if agent in shards else 0 for agent in group]
    least = min(shards.values(), key=lambda shard: _rank(shard.state))
    pages = max(shard.pages_total for shard in shards.values()) * len(group)

    def total(attribute: str) -> int:
        return sum(
            getattr(shard, attribute) * state.agents[agent].page_bytes
            for agent, shard in shards.items()
            if agent in state.agents
        )

    return Replica(
        model=model,
        agents=list(group),
        node=least.group.node,
        state=enum_word(common_pb2.ReplicaState.DESCRIPTOR, _READINESS[min(ranks)]),
        residency=sum(shard.pages_resident for shard in shards.values()) / pages if pages else 0.0,
        weight_bytes=total("pages_resident"),
        kv_bytes=total("pages_kv"),
        tier=enum_word(common_pb2.Tier.DESCRIPTOR, least.tier),
        reason=plain(least.reason),
        since_unix_ms=least.since_unix_ms,
        instance_id=least.instance_id,
        bytes_per_s=sum(shard.bytes_per_s for shard in shards.values()),
    )


def _rank(state: int) -> int:
    return _READINESS.index(state) if state in _READINESS else 0


def best_state(of: Iterable[Replica]) -> str:
    """The readiest state among replicas; cold where there is none."""
    present = {replica.state for replica in of}
    return next((state for state in STATES if state in present), "cold")


def model_summaries(state: ClusterState) -> list[ModelSummary]:
    """The deployed models, in order of name."""
    all_replicas = replicas(state)
    return [
        _summary(spec, [replica for replica in all_replicas if replica.model == name])
        for name, spec in state.models.items()
    ]


def _summary(spec: cluster_pb2.ModelSpec, own: list[Replica]) -> ModelSummary:
    return ModelSummary(
        name=spec.name,
        state=best_state(own),
        replicas={state: sum(replica.state == state for replica in own) for state in STATES},
        architecture=spec.facts.architecture,
        parameters=spec.facts.parameters,
        shard_bytes=spec.facts.shard_bytes,
        tp=spec.tp or 1,
        context_tokens=spec.facts.context_tokens,
        min_replicas=spec.min_replicas,
        max_replicas=spec.max_replicas,
        source=spec.source,
        deployed_unix_ms=spec.deployed_unix_ms,
    )


def describe(state: ClusterState, model: str, events: list[cluster_pb2.Event] | None) -> ModelDescription:
    """All about a model; `events` are the newest about it, oldest first. Raises KeyError where it is not deployed."""
    spec = state.models[model]
    own = [replica for replica in replicas(state) if replica.model == model]
    kv_bytes = {replica.instance_id: replica.kv_bytes for replica in own}
    running = {
        shard.instance_id: shard.running
        for residency in state.residency.values()
        for shard in residency.shards
        if shard.instance_id
    }
    return ModelDescription(
        name=model,
        state=best_state(own),
        spec=plain(spec),
        replicas=own,
        instances=[
            Instance(
                id=record.id,
                agents=list(record.group.agent_ids),
                state=enum_word(common_pb2.ReplicaState.DESCRIPTOR, record.state),
                running=running.get(record.id, 0),
                slots=record.slots,
                kv_bytes=kv_bytes.get(record.id, 0),
                started_unix_ms=record.started_unix_ms,
                token_ms=_token_ms(record) if record.HasField("pace") else None,
            )
            for record in state.instances.values()
            if record.model == model
        ],
        transitions=None if events is None else [plain(event) for event in events],
    )


def _token_ms(record: cluster_pb2.InstanceRecord) -> tuple[float, float]:
    pace = record.pace
    return pace.base_ms + pace.per_sequence_ms, pace.base_ms + record.slots * pace.per_sequence_ms


def explain(state: ClusterState, model: str, events: list[cluster_pb2.Event] | None, now_ms: int) -> Explanation:
    """Why a model is warm or cold. Raises KeyError where it is not deployed."""
    spec = state.models[model]
    own = [replica for replica in replicas(state) if replica.model == model]
    plan = state.plan or cluster_pb2.Plan()
    outlook = next((outlook for outlook in plan.outlooks if outlook.model == model), None)
    if outlook is not None:
        why = outlook.reason.text or enum_word(common_pb2.Cause.DESCRIPTOR, outlook.reason.cause).replace("_", " ")
    elif state.plan is None:
        why = "no plan has been made yet"
    elif spec.deployed_unix_ms > plan.made_unix_ms:
        why = "it was deployed after the newest plan was made; the next one will consider it"
    else:
        why = "the newest plan does not mention it"
    forecast = state.forecasts.get(model)
    return Explanation(
        model=model,
        state=best_state(own),
        why=why,
        notes=obstacles(state),
        outlook=plain(outlook) if outlook is not None else None,
        plan_made_unix_ms=plan.made_unix_ms,
        planner=plan.planner,
        actions=[plain(action) for action in plan.actions if action.model == model],
        forecast=_current_window(forecast, now_ms) if forecast is not None else None,
        competitors=[plain(competitor) for competitor in outlook.competitors] if outlook is not None else [],
        replicas=own,
        events=None if events is None else [plain(event) for event in events],
    )


def _current_window(forecast: cluster_pb2.Forecast, now_ms: int) -> Plain | None:
    for window in forecast.windows:
        if window.start_unix_s <= now_ms / 1000 < window.start_unix_s + forecast.window_s:
            return {
                "made_unix_ms": forecast.made_unix_ms,
                "window_s": forecast.window_s,
                "predictor": forecast.predictor,
                **plain(window),
            }
    return None


def status(state: ClusterState, etcd_version: str) -> Status:
    """The cluster on one screen."""
    plan = state.plan or cluster_pb2.Plan()
    newest = max(state.forecasts.values(), key=lambda forecast: forecast.made_unix_ms, default=cluster_pb2.Forecast())
    summaries = model_summaries(state)
    by_state = {name: [model.name for model in summaries if model.state == name] for name in STATES}
    return Status(
        etcd_version=etcd_version,
        leader=plain(state.leader) if state.leader is not None else None,
        plan_made_unix_ms=plan.made_unix_ms,
        planner=plan.planner,
        plan_actions=len(plan.actions),
        forecast_made_unix_ms=newest.made_unix_ms,
        predictor=newest.predictor,
        routers=[plain(router) for router in state.routers.values()],
        agents=agent_summaries(state),
        models={name: models for name, models in by_state.items() if models},
        notes=obstacles(state),
    )


def advisory(state: ClusterState) -> bool:
    """Whether plans are shown only: an operator has said so, or the placer was started so."""
    return (state.mode is not None and state.mode.advisory) or (state.plan is not None and state.plan.advisory)


def obstacles(state: ClusterState) -> list[str]:
    """What keeps the cluster as a whole from serving or from placing anything anew."""
    notes = []
    if state.leader is None:
        notes.append("no placer leads: nothing is placed anew until one does")
    elif advisory(state):
        notes.append("the placer only advises: plans are shown and not carried out (warmctl plan advisory)")
    usable = [
        agent for agent in agent_summaries(state) if agent.registered and not agent.control and not agent.stopping
    ]
    if not state.agents:
        notes.append("no agent is registered: nothing can be warmed or served")
    elif not usable:
        notes.append("every agent is cordoned, draining or stopping: nothing is placed anew")
    if not state.routers:
        notes.append("no router is registered: no requests come in")
    return notes + [f"unreadable: {what}" for what in state.unreadable]


def not_deployed(model: str, state: ClusterState) -> str:
    """What to say of a model that is not there."""
    return f"no model {model!r} is deployed: {nearest(model, state.models)}"


def nearest(name: str, names: Iterable[str]) -> str:
    """A hint after "no such ...": the nearest names, or all there are where they are few."""
    known = sorted(names)
    near = difflib.get_close_matches(name, known, 3)
    if near:
        return f"did you mean {' or '.join(near)}?"
    if not known:
        return "there is none"
    return f"there are {', '.join(known)}" if len(known) <= 8 else f"there are {len(known)}"
