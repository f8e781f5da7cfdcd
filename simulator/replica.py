"""What the cluster consists of beside GPUs: replicas, and models with their queues and counts."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from services.placer.snapshot import Key, State, WindowLoad
from simulator.cost import StepCost
from simulator.memory import Gpu
from simulator.results import Wakes
from simulator.spec import ModelSpec

if TYPE_CHECKING:
    from simulator.clock import Alarm
    from simulator.engine import Engine, Job
    from simulator.loads import Load


@dataclass(eq=False)
class ModelState:
    """A deployed model."""

    spec: ModelSpec
    index: int
    cost: StepCost
    shard_pages: int
    tokens_per_page: int
    capacity: int = 1  # requests that one instance carries within the model's targets, as computed
    most: int = 1  # requests that one instance has slots and KV pages for
    load_s: float = 0.0  # seconds that a whole replica takes to load from the host tier
    service_s: float = 0.0  # mean seconds of a request, at `capacity`
    tokens: float = 0.0  # mean tokens of a request, prompt and answer
    queue: deque[Job] = field(default_factory=deque)
    instances: deque[Replica] = field(default_factory=deque)  # active ones; the first is asked first
    replicas: dict[tuple[str, ...], Replica] = field(default_factory=dict)  # not cold, by group
    windows: tuple[WindowLoad, ...] = ()  # newest forecast
    in_progress: int = 0
    waiting_since: float | None = None  # requests wait and no instance is active
    wakes: Wakes = field(default_factory=Wakes)
    busy_gpu_s: float = 0.0
    active_gpu_s: float = 0.0
    resident_gpu_s: float = 0.0

    @property
    def name(self) -> str:
        """The spec's."""
        return self.spec.name

    @property
    def kv_bytes_per_request(self) -> float:
        """What a request takes on each GPU in the mean."""
        return self.tokens * self.spec.kv_bytes_per_token / self.spec.tp


@dataclass(eq=False)
class Replica:
    """A model's copy on a group of GPUs, of which something is resident or on its way."""

    model: ModelState
    gpus: tuple[Gpu, ...]
    state: State
    since: float  # when it came into its state
    used_at: float  # when it last was loaded, woken or busy
    pages: int = 0  # held or promised on each GPU
    resident: int = 0  # pages of them that hold weights
    engine: Engine | None = None
    load: Load | None = None
    starting: Alarm | None = None  # all resident, about to serve
    opens_at: float = 0.0  # when the instance that is being woken may take requests, weights or not
    unused_bytes: float = 0.0  # copied since it last served
    accounted: float = 0.0  # until when its pages are in the model's resident_gpu_s

    @property
    def group(self) -> tuple[str, ...]:
        """Ids of its GPUs."""
        return tuple(gpu.id for gpu in self.gpus)

    @property
    def key(self) -> Key:
        """As the planner names it."""
        return self.model.name, self.group

    @property
    def whole(self) -> bool:
        """Whether all of its weights are resident."""
        return self.resident >= self.model.shard_pages

    @property
    def running(self) -> int:
        """Requests that it has taken."""
        return self.engine.jobs if self.engine is not None else 0
