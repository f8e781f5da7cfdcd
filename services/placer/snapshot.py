"""What a plan is made from: plain values, no clock, no I/O. The simulator makes them too."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

GroupIds = tuple[str, ...]  # agent ids in shard order, all of one node
Key = tuple[str, GroupIds]  # a replica: its model and its group


class State(Enum):
    """States of a replica that is not cold. WAKING is WARMING that leads to ACTIVE."""

    WARMING = "warming"
    WAKING = "waking"
    WARM = "warm"
    ACTIVE = "active"
    DRAINING = "draining"


@dataclass(frozen=True)
class Agent:
    """One agent whose residency is known."""

    id: str
    node: str
    device_index: int
    page_bytes: int
    pages_total: int
    pages_kv: int = 0  # pages that hold KV blocks
    cordoned: bool = False  # nothing new here: the operator said so, or the agent is stopping
    drained: bool = False  # what is here has to go; implies cordoned


@dataclass(frozen=True)
class WindowLoad:
    """One window's forecast, in requests in progress."""

    start_s: float  # Unix seconds
    end_s: float
    mean: float
    peak: float


@dataclass(frozen=True)
class Model:
    """One deployed model."""

    name: str
    shard_bytes: int
    tp: int = 1  # agents per replica
    capacity: int = 8  # requests one instance carries at a time
    priority: float = 1.0
    min_replicas: int = 0
    max_replicas: int = 0  # 0: no bound
    cold_load_s: float = 1.0  # measured, or estimated from its size
    cold_load_measured: bool = False
    windows: tuple[WindowLoad, ...] = ()  # forecast, in order of time, the current window first
    waiting: int = 0  # requests that no instance has taken
    running: int = 0  # requests that instances have taken
    waited_s: float = 0.0  # how long requests have waited while no instance was active


@dataclass(frozen=True)
class Replica:
    """One replica of which something is resident or on its way."""

    model: str
    group: GroupIds
    state: State
    shard_pages: int  # pages of one whole shard
    resident: int  # pages of it that every agent of the group has
    kv_pages: int = 0  # most KV pages it holds on one agent
    running: int = 0  # requests in progress
    in_state_s: float = 0.0  # how long it has been in this state
    idle_s: float = 0.0  # since it was last loaded, woken or busy
    slots: int = 0  # requests it can run at a time, where it has told so

    @property
    def key(self) -> Key:
        """What identifies it."""
        return self.model, self.group

    @property
    def pages(self) -> int:
        """Pages it holds, or has been promised, on each agent of its group."""
        return self.resident if self.state is State.WARM else self.shard_pages

    @property
    def residency(self) -> float:
        """Share of its weights that is resident, 0 to 1."""
        return min(1.0, self.resident / self.shard_pages) if self.shard_pages else 1.0


@dataclass(frozen=True)
class Rules:
    """The numbers of the rule."""

    scale_up: float = 0.8  # load above this share of what the instances carry needs another instance
    scale_down: float = 0.5  # load below this share of what one instance less carries frees one
    min_stay_s: float = 2.0  # an instance stays active at least so long
    max_wait_s: float = 10.0  # requests wait at most so long before a busy instance is drained for them
    kv_reserve: float = 0.25  # share of an arena that weights leave to KV
    lookahead_s: float = 30.0  # forecast windows that begin within this count as now


@dataclass(frozen=True)
class Snapshot:
    """The cluster at one moment. Replicas of models that are not in `models` belong to undeployed ones."""

    now_s: float  # Unix seconds
    agents: Mapping[str, Agent] = field(default_factory=dict)
    models: Mapping[str, Model] = field(default_factory=dict)
    replicas: tuple[Replica, ...] = ()
    refused: Mapping[Key, str] = field(default_factory=dict)  # replicas not to try for now, with what failed
    rules: Rules = Rules()

    def shard_pages(self, model: Model, agent_id: str) -> int:
        """Pages of one of the model's shards on an agent."""
        return math.ceil(model.shard_bytes / self.agents[agent_id].page_bytes)

    def kv_reserve(self, agent: Agent, shard_pages: int = 0) -> int:
        """Pages that weights leave to KV; fewer where a shard could else not even be alone on the agent, at least 1."""
        wished = math.ceil(self.rules.kv_reserve * agent.pages_total)
        return max(1, min(wished, agent.pages_total - shard_pages))
