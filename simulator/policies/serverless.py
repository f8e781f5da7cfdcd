"""Autoscaling as ServerlessLLM does it (Fu et al., OSDI 2024): reactive, host-memory and locality aware, keep-alive.

An instance has its GPUs to itself. It is started when requests ask for it, on free GPUs where its checkpoint loads
fastest, else in place of instances that idle; it is kept alive for a while after its last request. What it is given
beyond its paper, so that the comparison is about prewarming alone: our engine and its batching, our scaling thresholds,
and our bound on waiting, after which the least busy instance gives way. Live migration is left out: with images in the
memory of every node there is nothing to migrate for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from services.placer.decisions import Action, Do, Reason
from services.placer.snapshot import Key, State
from simulator.cluster import Cluster
from simulator.memory import Gpu
from simulator.policies.base import Future
from simulator.replica import ModelState, Replica
from warmserve.v1 import common_pb2

Group = tuple[Gpu, ...]
_SCALE_DOWN = 0.6  # of the share at which one is started: below that one less suffices


@dataclass
class Serverless:
    """`start_s`: what its engine takes to start beside the weights. 0 is ours, whose graphs outlive eviction. A vLLM
    cold start of an 8B takes 59 s, of which weights are 4 (its makers' figure, on a B200): 55."""

    start_s: float = 0.0
    keep_alive_s: float = 60.0
    scale_up: float = 0.8  # load above this share of what a model's instances carry starts another
    kv_pages: Mapping[Key, int] = field(default_factory=dict)
    lends: bool = False
    _promised: dict[int, Group] = field(default_factory=dict)  # model -> GPUs that drain for it

    @property
    def name(self) -> str:
        """With the engine start."""
        return f"serverless, engine start {self.start_s:g} s"

    def begin(self, cluster: Cluster, future: Future) -> None:
        """See Policy."""
        self._promised = {}

    def decide(self, cluster: Cluster, asked: Sequence[str]) -> Iterable[Action]:
        """See Policy."""
        return _Round(cluster, self, self._promised).actions()


class _Round:
    """One decision."""

    def __init__(self, cluster: Cluster, policy: Serverless, promised: dict[int, Group]) -> None:
        self._cluster = cluster
        self._rules = cluster.settings.rules
        self._keep_alive_s, self._full = policy.keep_alive_s, policy.scale_up
        self._promised = promised
        self._actions: list[Action] = []
        self._gone: set[Replica] = set()
        self._open: set[Gpu] = set()  # GPUs that are free, or whose instances idle

    def actions(self) -> list[Action]:
        for model in self._cluster.models:
            self._release(model)
        now = self._cluster.clock.now
        self._open = {gpu for gpu in self._cluster.gpus.values() if all(map(_idle, gpu.replicas.values()))}
        for model in sorted(self._cluster.models, key=lambda m: (m.waiting_since or now, -len(m.queue), m.index)):
            self._scale_up(model)
        return self._actions

    def _release(self, model: ModelState) -> None:
        """What has drained gives its GPUs back, and so does what has been idle for long or is not needed any more."""
        now = self._cluster.clock.now
        for replica in model.replicas.values():
            if replica.state is State.WARM:
                self._go(replica)
        running = _load(model)
        kept = [replica for replica in model.instances if replica not in self._gone]
        for replica in sorted(kept, key=lambda r: (r.running, r.used_at)):
            idle = not replica.running and not model.queue and now - replica.used_at >= self._keep_alive_s
            enough = running <= self._full * _SCALE_DOWN * model.capacity * (len(kept) - 1)
            if idle:
                self._go(replica)
                kept.remove(replica)
            elif running and enough and now - replica.since >= self._keep_alive_s:
                self._order(Do.DRAIN, replica.model, replica.gpus)
                kept.remove(replica)

    def _scale_up(self, model: ModelState) -> None:
        serving = sum(
            replica.state in (State.ACTIVE, State.WAKING)
            for replica in model.replicas.values()
            if replica not in self._gone
        )
        load = _load(model)
        carried = self._full * model.capacity
        wanted = math.ceil(load / carried) if model.queue or load > carried * serving else serving
        while serving < wanted:
            group = self._place(model)
            if group is None:
                if not serving:
                    self._ask_to_drain(model)
                return
            for replica in self._on(group):
                self._go(replica)
                self._open.update(replica.gpus)
            self._order(Do.WAKE, model, group)
            self._open.difference_update(group)
            self._promised.pop(model.index, None)
            serving += 1

    def _place(self, model: ModelState) -> Group | None:
        """GPUs that are free or idle: nothing displaced before something, the fastest tier, the tightest fit, and what
        has been idle for longest."""
        kept_for_others = {gpu for other, group in self._promised.items() if other != model.index for gpu in group}
        free = self._open - kept_for_others
        best: tuple[tuple[object, ...], Group] | None = None
        for order, group in enumerate(self._cluster.groups(model.spec.tp) if free else []):
            if not free.issuperset(group):
                continue
            occupants = list(self._on(group))
            if any(replica.model is model for replica in occupants):
                continue
            loads = self._cluster.loads(group[0].node)
            seconds = loads.seconds(model, loads.tier(model, group))
            last_used = max((replica.used_at for replica in occupants), default=0.0)
            rank = (bool(occupants), seconds, last_used, -self._neighbours(group), order)
            if best is None or rank < best[0]:
                best = rank, group
        return best[1] if best else None

    def _neighbours(self, group: Group) -> int:
        """GPUs in use beside it in the next larger aligned group: small models should not spread over large blocks."""
        for larger in self._cluster.groups(2 * len(group)):
            if group[0] in larger:
                return sum(bool(gpu.replicas) or gpu not in self._open for gpu in larger)
        return 0

    def _ask_to_drain(self, model: ModelState) -> None:
        """Has waited for long and nothing is free: the least busy instances give way, after what they run."""
        since, now = model.waiting_since, self._cluster.clock.now
        if model.index in self._promised or since is None or now - since < self._rules.max_wait_s:
            return
        promised = {gpu for group in self._promised.values() for gpu in group}
        choices = [
            (sum(replica.running for replica in self._on(group)), order, group)
            for order, group in enumerate(self._cluster.groups(model.spec.tp))
            if promised.isdisjoint(group) and all(r.state is not State.WAKING for r in self._on(group))
        ]
        if choices:
            group = min(choices, key=lambda choice: choice[:2])[2]
            self._promised[model.index] = group
            for replica in self._on(group):
                if replica.state is State.ACTIVE:
                    self._order(Do.DRAIN, replica.model, replica.gpus)

    def _on(self, group: Group) -> Iterator[Replica]:
        """What is there and stays, each once."""
        found = {replica: None for gpu in group for replica in gpu.replicas.values()}
        return (replica for replica in found if replica not in self._gone)

    def _go(self, replica: Replica) -> None:
        if replica.state is State.ACTIVE:
            self._order(Do.DRAIN, replica.model, replica.gpus)
        self._order(Do.EVICT, replica.model, replica.gpus)
        self._gone.add(replica)

    def _order(self, do: Do, model: ModelState, group: Group) -> None:
        reason = Reason(
            common_pb2.CAUSE_WAITING_REQUESTS if do is Do.WAKE else common_pb2.CAUSE_LOW_LOAD, "autoscaling"
        )
        self._actions.append(Action(do, model.name, tuple(gpu.id for gpu in group), reason))


def _load(model: ModelState) -> int:
    return len(model.queue) + sum(replica.running for replica in model.instances)


def _idle(replica: Replica) -> bool:
    return replica.state is State.WARM or (
        replica.state is State.ACTIVE and not replica.running and not replica.model.queue
    )
