"""What agents' records mean to an operator: who has which share of an arena, where images lie, what is copied. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from warmserve._enums import enum_word
from warmserve.admin.plain import Plain, plain
from warmserve.admin.state import ClusterState
from warmserve.v1 import cluster_pb2, common_pb2

_FINGERPRINT_DIGITS = 32  # of a checkpoint's fingerprint, with which the names of its images begin


@dataclass(frozen=True)
class AgentSummary:
    """One agent in a list. What an agent that is not registered would say is empty."""

    id: str
    registered: bool
    control: str
    """"", cordoned, draining or drained: what an operator asked for, and how far it is."""
    stopping: bool
    node: str
    device_index: int
    device_name: str
    backend: str
    address: str
    version: str
    page_bytes: int
    pages_total: int
    pages_weights: int
    """Those that are being written included."""
    pages_lent: int
    """Of those of weights, which KV takes back where it finds no free page."""
    pages_kv: int
    pages_free: int
    pages_promised: int
    """Of the free ones, those that warming leaves to running instances."""
    models: list[str]
    """Models with a shard here that is not cold."""
    instances: int
    """Active or draining replicas with a shard here."""
    started_unix_ms: int


@dataclass(frozen=True)
class Share:
    """What one model has of an agent's arena."""

    model: str
    state: str
    residency: float
    """Share of its weight pages that is resident, 0 to 1."""
    weight_pages: int
    """Resident ones."""
    weight_pages_total: int
    lent_pages: int
    """Of the resident ones, those that KV may take back."""
    kv_pages: int
    running: int
    """Sequences in progress."""
    score: float
    """What the placer's last order to warm it says it is worth; the lowest goes first."""
    tier: str
    """Where missing pages would come from."""
    reason: Plain
    since_unix_ms: int
    instance_id: str


@dataclass(frozen=True)
class Copy:
    """Bytes on their way between two tiers."""

    models: list[str]
    """Those that the image is of; none where no deployed model is."""
    source: str
    target: str
    bytes_done: int
    bytes_total: int
    bytes_per_s: float
    """0 where nothing is measured, because it waits for its turn or has just begun."""
    remaining_ms: float | None
    """Estimated; None where nothing is measured."""


@dataclass(frozen=True)
class ImagePlace:
    """One image on the agent's node."""

    name: str
    models: list[str]
    bytes: int
    on_disk: bool
    in_memory: bool
    score: float
    """What it is worth in memory: the requests that are expected, times priorities; the lowest goes first."""


@dataclass(frozen=True)
class AgentDescription:
    """All about one agent: its arena, the tiers beside it, and what is copied between them."""

    agent: AgentSummary
    shares: list[Share]
    """The largest first."""
    pages_arriving: int
    """Pages that are being written, or claimed for it."""
    copies: list[Copy]
    host_budget_bytes: int
    """0 where images are not kept in the node's memory."""
    host_used_bytes: int
    disk_capacity_bytes: int
    disk_free_bytes: int
    images: list[ImagePlace]
    """In order of model."""
    updated_unix_ms: int
    """When the agent wrote this."""


def agent_summaries(state: ClusterState) -> list[AgentSummary]:
    """Registered agents in order of node and device, then those that only an operator's wish remembers."""
    ordered = sorted(state.agents.values(), key=lambda agent: (agent.node, agent.device_index, agent.id))
    absent = [
        cluster_pb2.AgentRecord(id=agent_id)
        for agent_id in {**state.controls, **state.residency}
        if agent_id not in state.agents
    ]
    return [agent_summary(state, record) for record in ordered + absent]


def agent_summary(state: ClusterState, record: cluster_pb2.AgentRecord) -> AgentSummary:
    """One agent; `record` has nothing but the id where it is not registered."""
    residency = state.residency.get(record.id, cluster_pb2.AgentResidency())
    present = [shard for shard in residency.shards if shard.state != common_pb2.REPLICA_STATE_COLD]
    serving = [shard for shard in present if shard.instance_id]
    control = state.controls.get(record.id, cluster_pb2.AgentControl())
    wish = ("draining" if present else "drained") if control.drained else "cordoned"
    return AgentSummary(
        id=record.id,
        registered=record.id in state.agents,
        control=wish if control.drained or control.cordoned else "",
        stopping=record.stopping,
        node=record.node,
        device_index=record.device_index,
        device_name=record.device_name,
        backend=enum_word(common_pb2.Backend.DESCRIPTOR, record.backend),
        address=record.address,
        version=record.version,
        page_bytes=record.page_bytes,
        pages_total=record.pages_total,
        pages_weights=residency.pages_weights,
        pages_lent=residency.pages_lent,
        pages_kv=residency.pages_kv,
        pages_free=residency.pages_free,
        pages_promised=residency.pages_promised,
        models=sorted({shard.model for shard in present}),
        instances=len(serving),
        started_unix_ms=record.started_unix_ms,
    )


def describe_agent(state: ClusterState, agent_id: str) -> AgentDescription:
    """All about an agent that is registered, has residency or was spoken of. What it has not said is empty."""
    record = state.agents.get(agent_id, cluster_pb2.AgentRecord(id=agent_id))
    residency = state.residency.get(agent_id, cluster_pb2.AgentResidency())
    shares = [_share(shard) for shard in residency.shards if shard.state != common_pb2.REPLICA_STATE_COLD]
    return AgentDescription(
        agent=agent_summary(state, record),
        shares=sorted(shares, key=lambda share: (-share.weight_pages - share.kv_pages, share.model)),
        pages_arriving=max(0, residency.pages_weights - sum(shard.pages_resident for shard in residency.shards)),
        copies=_copies(state, record, residency),
        host_budget_bytes=residency.host_tier.budget_bytes,
        host_used_bytes=residency.host_tier.used_bytes,
        disk_capacity_bytes=residency.disk.capacity_bytes,
        disk_free_bytes=residency.disk.free_bytes,
        images=_images(state, residency),
        updated_unix_ms=residency.updated_unix_ms,
    )


def _share(shard: cluster_pb2.ResidentShard) -> Share:
    return Share(
        model=shard.model,
        state=enum_word(common_pb2.ReplicaState.DESCRIPTOR, shard.state),
        residency=shard.residency,
        weight_pages=shard.pages_resident,
        weight_pages_total=shard.pages_total,
        lent_pages=shard.pages_lent,
        kv_pages=shard.pages_kv,
        running=shard.running,
        score=shard.score,
        tier=enum_word(common_pb2.Tier.DESCRIPTOR, shard.tier),
        reason=plain(shard.reason),
        since_unix_ms=shard.since_unix_ms,
        instance_id=shard.instance_id,
    )


def _copies(state: ClusterState, record: cluster_pb2.AgentRecord, residency: cluster_pb2.AgentResidency) -> list[Copy]:
    found = [
        _copy(
            [shard.model],
            enum_word(common_pb2.Tier.DESCRIPTOR, shard.tier),
            "gpu",
            shard.pages_resident * record.page_bytes,
            shard.pages_total * record.page_bytes,
            shard.bytes_per_s,
        )
        for shard in residency.shards
        if shard.state == common_pb2.REPLICA_STATE_WARMING
    ]
    if residency.host_tier.HasField("filling"):
        fill = residency.host_tier.filling
        models = _models_of(state, fill.name)
        found.append(_copy(models, "disk", "host", fill.bytes_done, fill.bytes_total, fill.bytes_per_s))
    for image in residency.disk.preparing:
        models = _models_of(state, image.name)
        found.append(_copy(models, "remote", "disk", image.bytes_done, image.bytes_total, 0.0))
    return found


def _copy(models: list[str], source: str, target: str, done: int, total: int, bytes_per_s: float) -> Copy:
    remaining_ms = (total - done) / bytes_per_s * 1e3 if bytes_per_s else None
    return Copy(models, source, target, done, total, bytes_per_s, remaining_ms)


def _images(state: ClusterState, residency: cluster_pb2.AgentResidency) -> list[ImagePlace]:
    in_memory = {image.name: image for image in residency.host_tier.images}
    on_disk = {image.name: image for image in residency.disk.images}
    found = [
        ImagePlace(
            name=name,
            models=_models_of(state, name),
            bytes=on_disk[name].bytes if name in on_disk else in_memory[name].bytes,
            on_disk=name in on_disk,
            in_memory=name in in_memory,
            score=in_memory[name].score if name in in_memory else 0.0,
        )
        for name in {**on_disk, **in_memory}
    ]
    return sorted(found, key=lambda image: (not image.models, image.models, image.name))


def _models_of(state: ClusterState, image: str) -> list[str]:
    """The deployed models whose checkpoint an image is made of."""
    return [
        name
        for name, spec in state.models.items()
        if (known := spec.facts.fingerprint[:_FINGERPRINT_DIGITS]) and image.startswith(known)
    ]
