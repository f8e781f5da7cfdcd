"""What a plan is made from: plain values, no clock, no I/O. The simulator makes them too."""

from __future__ import annotations

import functools
import math
from collections import Counter
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


class Tier(Enum):
    """Where weights are copied from."""

    PEER = "peer"  # another GPU of the node
    HOST = "host"  # the node's memory
    DISK = "disk"  # the node's disk
    REMOTE = "remote"  # the checkpoint's source


@dataclass(frozen=True)
class Node:
    """What the agents of one machine share. A node that is not in the snapshot has no bounds."""

    name: str
    copy_bytes_per_s: float = 0.0  # most that all its agents' loads copy together; 0: no bound
    host_bytes: int = 0  # host tier's size, all images together; 0: not known


@dataclass(frozen=True)
class Agent:
    """One agent whose residency is known. Agents may differ in page size and in pages."""

    id: str
    node: str
    device_index: int
    page_bytes: int
    pages_total: int
    pages_kv: int = 0  # pages that hold KV blocks, or are kept for requests that run: never given to weights
    pages_promised: int = 0  # further pages that the agent keeps for the KV of what runs: only a wake may fill them
    cordoned: bool = False  # nothing new here: the operator said so, or the agent is stopping
    drained: bool = False  # what is here has to go; implies cordoned


@dataclass(frozen=True)
class Quantiles:
    """What a forecast says of one number: it is at most p50 in half of all cases, at most p99 in all but one of 100."""

    p50: float
    p90: float
    p99: float

    @classmethod
    def exactly(cls, value: float) -> Quantiles:
        """Of a number that is known."""
        return cls(value, value, value)


@dataclass(frozen=True)
class WindowLoad:
    """One window's forecast, in requests in progress. The planner leaves out what is not finite or negative."""

    start_s: float  # Unix seconds
    end_s: float
    mean: Quantiles  # over the window
    peak: Quantiles  # at any moment of it


@dataclass(frozen=True)
class Model:
    """One deployed model."""

    name: str
    shard_bytes: int
    tp: int = 1  # agents per replica: 1, 2, 4 or 8
    capacity: int = 8  # requests one instance carries at a time, measured
    batch: int = 0  # requests it has room for, later as their tokens may come; never below `capacity`, where it is 0
    priority: float = 1.0  # weight of its seconds of waiting against other models'
    min_replicas: int = 0  # instances kept active
    max_replicas: int = 0  # most instances, and most replicas warmed; 0: no bound
    pinned: int = 0  # replicas kept wholly resident, warm or active, whatever the forecast
    ttft_p95_s: float = 0.0  # seconds to the first token that the operator finds good enough; 0: none said
    cold_load_s: float = 1.0  # of a whole replica from where its image usually is; measured, or estimated from its size
    cold_load_measured: bool = False
    load_s: Mapping[Tier, float] = field(default_factory=dict)  # of a whole replica, per tier that is known
    images: Mapping[str, Tier] = field(default_factory=dict)  # per node: the best tier that has its shards (not PEER)
    service_s: float = 0.0  # mean seconds that a request is in progress; 0: not known
    kv_bytes_per_request: float = 0.0  # mean on one agent while a request runs; 0: not known
    kv_bytes_per_context: float = 0.0  # on one agent, of a request as long as the model takes any; 0: not known
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
    since_s: float = math.inf  # Unix time since which it is in this state; infinite: from now on
    used_s: float = math.inf  # Unix time when it was last loaded, woken or busy; infinite: now
    slots: int = 0  # requests it can run at a time, where it has told so
    score: float | None = None  # what its agents were last told it is worth; None: nobody needs to be told

    @functools.cached_property
    def key(self) -> Key:
        """What identifies it."""
        return self.model, self.group

    @functools.cached_property
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
    kv_reserve: float = 0.25  # most of an arena that weights leave to KV where no instance runs, or nothing is measured
    lookahead_s: float = 30.0  # forecast windows that begin within this count as now
    margin: float = 1.25  # what comes must be worth so many times what goes, or each forecast would turn the two round
    interference: float = 0.5  # share of its value that a replica loses when one that shares its GPU is woken with it
    least_chance: float = 0.02  # what is less likely to be needed is not warmed; what is warm already may stay
    widening_per_hour: float = 1.0  # growth of a forecast's spread per hour that it is older than its last window


@dataclass(frozen=True)
class Snapshot:
    """The cluster at one moment. Replicas of models that are not in `models` belong to undeployed ones."""

    now_s: float  # Unix seconds
    agents: Mapping[str, Agent] = field(default_factory=dict)
    models: Mapping[str, Model] = field(default_factory=dict)
    replicas: tuple[Replica, ...] = ()
    refused: Mapping[Key, str] = field(default_factory=dict)  # replicas not to try for now, with what failed
    rules: Rules = Rules()
    nodes: Mapping[str, Node] = field(default_factory=dict)  # by name

    @functools.cached_property
    def active(self) -> Mapping[str, int]:
        """Active instances, by model."""
        return Counter(replica.model for replica in self.replicas if replica.state is State.ACTIVE)

    def in_state_s(self, replica: Replica) -> float:
        """How long a replica has been in its state."""
        return max(0.0, self.now_s - replica.since_s)

    def idle_s(self, replica: Replica) -> float:
        """How long ago a replica was last loaded, woken or busy."""
        idle_s = self.now_s - replica.used_s
        return idle_s if idle_s > 0 and not replica.running else 0.0

    def shard_pages(self, model: Model, agent_id: str) -> int:
        """Pages of one of the model's shards on an agent."""
        return math.ceil(model.shard_bytes / self.agents[agent_id].page_bytes)

    def kv_reserve(self, agent: Agent, shard_pages: int = 0) -> int:
        """The rules' share of an arena, for KV; less where a shard could else not even be alone there, at least 1."""
        wished = math.ceil(self.rules.kv_reserve * agent.pages_total)
        return max(1, min(wished, agent.pages_total - shard_pages))
