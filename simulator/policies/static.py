"""Placements that are decided once, from loads that are known beforehand: MuxServe's sharing, and whole GPUs for each.

Both are given the true loads of the run, which nobody has: that is in their favour.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from services.placer.decisions import Action, Do, Reason
from services.placer.snapshot import Key
from simulator.cluster import Cluster
from simulator.memory import Gpu
from simulator.policies.base import Future
from simulator.replica import ModelState
from warmserve.v1 import common_pb2

Group = tuple[Gpu, ...]
STEP_S = 10.0  # resolution at which loads are known
PEAK = 99.9  # percentile of them that counts as a model's peak


@dataclass
class _Placed:
    """What is begun at first and then left alone."""

    kv_pages: dict[Key, int] = field(default_factory=dict)
    start_s: float = 0.0
    lends: bool = False
    _orders: list[tuple[ModelState, Group]] = field(default_factory=list)

    def decide(self, cluster: Cluster, asked: Sequence[str]) -> Iterable[Action]:
        """See Policy."""
        orders, self._orders = self._orders, []
        reason = Reason(common_pb2.CAUSE_FOUNDATION, "placed once")
        return [Action(Do.WAKE, model.name, tuple(gpu.id for gpu in group), reason) for model, group in orders]


@dataclass
class Muxserve(_Placed):
    """Static sharing as MuxServe does it (Duan et al., ICML 2024): models are placed together by their mean loads, all
    weights stay, KV is split by what each needs, and instances on one GPU share its time.

    Its placement is greedy too: the model with the most computation first, each on the group that it loads least; then
    replicas are added where they relieve the busiest GPU. Its time sharing is that of our engine, in place of its
    partitions of streaming multiprocessors.
    """

    name: str = "muxserve"
    by_peak: bool = False  # placed by peaks in place of means

    def begin(self, cluster: Cluster, future: Future) -> None:
        """See Policy."""
        loads = [future.loads(model.index, STEP_S) for model in cluster.models]
        placement = Sharing(
            cluster, [float(np.percentile(load, PEAK) if self.by_peak else load.mean()) for load in loads]
        )
        self._orders = placement.place()
        self.kv_pages = placement.split_kv(self._orders)


class Sharing:
    """Where models go, by their loads."""

    def __init__(self, cluster: Cluster, loads: Sequence[float]) -> None:
        self._cluster = cluster
        self._needs = [load / model.capacity for load, model in zip(loads, cluster.models, strict=True)]  # instances
        self._wanted = loads
        self._groups: dict[int, list[Group]] = {model.index: [] for model in cluster.models}
        self._free = dict.fromkeys(cluster.gpus.values(), cluster.spec.pages)
        self._loads = dict.fromkeys(cluster.gpus.values(), 0.0)

    def place(self) -> list[tuple[ModelState, Group]]:
        for model in sorted(self._cluster.models, key=lambda m: (-self._needs[m.index] * m.spec.tp, -m.shard_pages)):
            group = self._best(model)
            if group is not None:
                self._put(model, group)
        while self._relieve():
            pass
        return [(model, group) for model in self._cluster.models for group in self._groups[model.index]]

    def split_kv(self, orders: Iterable[tuple[ModelState, Group]]) -> dict[Key, int]:
        """KV pages of each replica: what its GPUs have left, in proportion to the KV of its load."""
        orders = list(orders)

        def wanted(model: ModelState) -> float:
            tokens = self._wanted[model.index] / len(self._groups[model.index]) * model.tokens
            return self._cluster.reserve(model) + tokens / model.tokens_per_page

        sums = dict.fromkeys(self._cluster.gpus.values(), 0.0)
        for model, group in orders:
            for gpu in group:
                sums[gpu] += wanted(model)
        free = dict.fromkeys(sums, self._cluster.spec.pages)
        for model, group in orders:
            for gpu in group:
                free[gpu] -= model.shard_pages
        return {
            (model.name, tuple(gpu.id for gpu in group)): int(
                min(free[gpu] * wanted(model) / sums[gpu] for gpu in group)
            )
            for model, group in orders
        }

    def _best(self, model: ModelState) -> Group | None:
        """The group with room that is loaded least, and among those the emptiest."""
        needed = model.shard_pages + self._cluster.reserve(model)
        own = {gpu for group in self._groups[model.index] for gpu in group}
        open_ = [
            group
            for group in self._cluster.groups(model.spec.tp)
            if own.isdisjoint(group) and all(self._free[gpu] >= needed for gpu in group)
        ]
        return min(
            open_,
            key=lambda g: (max(self._loads[gpu] for gpu in g), -min(self._free[gpu] for gpu in g)),
            default=None,
        )

    def _put(self, model: ModelState, group: Group) -> None:
        groups = self._groups[model.index]
        for old in groups:
            for gpu in old:
                self._loads[gpu] -= self._needs[model.index] / len(groups)
        groups.append(group)
        for gpu in group:
            self._free[gpu] -= model.shard_pages + self._cluster.reserve(model)
        for new in groups:
            for gpu in new:
                self._loads[gpu] += self._needs[model.index] / len(groups)

    def _relieve(self) -> bool:
        """Adds one replica of a model on the busiest GPU on which that helps; False where it helps nowhere."""
        for gpu in sorted(self._loads, key=lambda g: -self._loads[g]):
            there = [m for m in self._cluster.models if any(gpu in group for group in self._groups[m.index])]
            for model in sorted(there, key=lambda m: -self._needs[m.index] / len(self._groups[m.index])):
                group = self._best(model)
                count = len(self._groups[model.index])
                share = self._needs[model.index] / (count + 1)
                if group is not None and max(self._loads[g] for g in group) + share < self._loads[gpu] - 1e-9:
                    self._put(model, group)
                    return True
        return False


@dataclass
class Dedicated(_Placed):
    """Whole GPUs for each model, all of them: first a group for each, those whose peaks need most GPUs first, then one
    after another where the peak is highest for what there is. What gets none is not served."""

    name: str = "dedicated"

    def begin(self, cluster: Cluster, future: Future) -> None:
        """See Policy."""
        needs = {
            model.index: float(np.percentile(future.loads(model.index, STEP_S), PEAK)) / model.capacity
            for model in cluster.models
        }
        taken: set[Gpu] = set()
        given = dict.fromkeys(needs, 0)
        open_ = {model.index: model for model in cluster.models}
        self._orders = []
        while open_:
            model = min(
                open_.values(),
                key=lambda m: (
                    given[m.index] > 0,
                    -needs[m.index] / given[m.index] if given[m.index] else -needs[m.index] * m.spec.tp,
                    m.index,
                ),
            )
            group = next((g for g in cluster.groups(model.spec.tp) if taken.isdisjoint(g)), None)
            if group is None:
                del open_[model.index]
                continue
            taken.update(group)
            given[model.index] += 1
            self._orders.append((model, group))
        self.kv_pages = {}
