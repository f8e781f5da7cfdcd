"""One model's shard on this agent."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import dataclass, field

from services.gpu_agent.arena.arena import ArenaUsage
from services.gpu_agent.arena.weight_range import WeightRange
from services.gpu_agent.copy_lane import CopyTurn
from services.gpu_agent.engine.backend import Program
from services.gpu_agent.engine.grammar import GrammarCompiler
from services.gpu_agent.images import Blueprint
from services.gpu_agent.instance_server import InstanceServer
from services.gpu_agent.prewarming import Prewarming
from warmserve.v1 import cluster_pb2, common_pb2

COLD = common_pb2.REPLICA_STATE_COLD
WARMING = common_pb2.REPLICA_STATE_WARMING
WARM = common_pb2.REPLICA_STATE_WARM
ACTIVE = common_pb2.REPLICA_STATE_ACTIVE
DRAINING = common_pb2.REPLICA_STATE_DRAINING


@dataclass(eq=False)
class Shard:
    """A shard's state and all that belongs to it. Changed on the event loop only.

    The weight range and the program over it are made once and kept through evictions.
    """

    spec: cluster_pb2.ModelSpec
    group: common_pb2.Group
    state: common_pb2.ReplicaState.ValueType = COLD
    reason: common_pb2.Reason = field(default_factory=common_pb2.Reason)
    since: float = field(default_factory=time.time)  # Unix seconds
    entered: float = field(default_factory=time.monotonic)
    blueprint: Blueprint | None = None
    weights: WeightRange | None = None
    program: Program | None = None  # the model over the weight range
    preparing: asyncio.Task[None] | None = None  # of the program, while the shard serves
    unprepared: threading.Event = field(default_factory=threading.Event)  # that is to end, for the weights go
    grammars: GrammarCompiler | None = None  # made when it first serves
    tier: common_pb2.Tier.ValueType = common_pb2.TIER_REMOTE
    wanted_active: bool = False  # it is to serve as soon as it can; set by `want`
    score: float = 0.0  # what the placer's last order to warm it says it is worth
    abandoned: threading.Event = field(default_factory=threading.Event)  # the load in progress is not wanted any more
    abandoned_for: common_pb2.Reason = field(default_factory=common_pb2.Reason)  # why not
    turn: CopyTurn | None = None  # of the load in progress
    task: asyncio.Task[None] | None = None  # the transition in progress
    server: InstanceServer | None = None  # while active or draining, and just before, while the last weights come
    pausing: asyncio.Task[None] | None = None  # the server is kept from taking more: its wake was cancelled, or failed
    rewoken: asyncio.Event = field(default_factory=asyncio.Event)  # a wake came after the last drain
    wake_reason: common_pb2.Reason = field(default_factory=common_pb2.Reason)  # of that wake
    retiring: bool = False  # drained or failed: it will be warm before it can be active again
    damaged: bool = False  # it computed what is no number: its weights are not to be computed with again
    leaving: bool = False  # undeployed: it takes no orders any more
    orders: asyncio.Lock = field(default_factory=asyncio.Lock)  # held while an eviction is carried out
    prewarming: Prewarming = field(init=False)
    bytes_per_s: float = 0.0
    copied_bytes: int = 0  # by the newest load
    copy_s: float = 0.0  # seconds in which it did
    active_since: float = 0.0  # Unix seconds; of the newest instance, or since when it takes requests
    woken: float = 0.0  # when the newest wake was ordered; time.monotonic()
    cold_load_ms: float = 0.0
    gave_way: bool = False  # the load in progress, or the last one, left the bus to instances for a while

    def __post_init__(self) -> None:
        self.prewarming = Prewarming(self.spec.name)

    @property
    def name(self) -> str:
        """The model's name."""
        return self.spec.name

    @property
    def context_tokens(self) -> int:
        """The longest context served, prompt and answer together; known once there is a blueprint."""
        assert self.blueprint is not None
        return int(self.spec.facts.context_tokens or self.blueprint.facts.context_tokens)

    @property
    def pages_resident(self) -> int:
        """Weight pages that hold their data."""
        return self.weights.resident_pages if self.weights else 0

    @property
    def pages_total(self) -> int:
        """Weight pages in all; 0 while the checkpoint has not been looked at."""
        return self.weights.num_pages if self.weights else 0

    @property
    def complete(self) -> bool:
        """Whether every weight page is resident."""
        return self.weights is not None and self.weights.complete

    def enter(self, state: common_pb2.ReplicaState.ValueType, reason: common_pb2.Reason) -> float:
        """Changes state; returns how long the last one lasted, in milliseconds."""
        now = time.monotonic()
        lasted = (now - self.entered) * 1e3
        self.state, self.reason, self.since, self.entered = state, reason, time.time(), now
        self.lend()
        return lasted

    def want(self, active: bool) -> None:
        """Says whether it is to serve as soon as it can; until it does, nobody takes its weights."""
        self.wanted_active = active
        self.lend()

    def lend(self) -> None:
        """Offers the weights to instances that need KV pages, unless they are computed with or about to be."""
        if self.weights is None:
            return
        if self.server is not None or self.wanted_active:
            self.weights.withhold()
        else:
            self.weights.offer((self.score, self.entered))

    def to_proto(self, usage: ArenaUsage, pages_kv_most: int) -> cluster_pb2.ResidentShard:
        """The shard as etcd shows it. pages_kv_most: see there."""
        instance_id = self.server.instance_id if self.server else ""
        return cluster_pb2.ResidentShard(
            model=self.name,
            shard=0,
            group=self.group,
            state=self.state,
            residency=self.pages_resident / self.pages_total if self.pages_total else 0.0,
            pages_resident=self.pages_resident,
            pages_total=self.pages_total,
            tier=common_pb2.TIER_GPU if self.complete else self.tier,
            reason=self.reason,
            since_unix_ms=int(self.since * 1e3),
            instance_id=instance_id,
            pages_kv=usage.kv_by_instance.get(instance_id, 0),
            bytes_per_s=self.bytes_per_s,
            cold_load_ms=self.cold_load_ms,
            running=self.server.running if self.server else 0,
            score=self.score,
            pages_lent=self.pages_resident if self.weights and self.weights.is_lendable else 0,
            pages_kv_most=pages_kv_most,
        )
