"""The oracle: the real planner, told the truth."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from services.placer import planner
from services.placer.decisions import Action, Do, Reason
from services.placer.snapshot import Key, Model, Quantiles, Snapshot, WindowLoad
from simulator.cluster import Cluster
from simulator.observe import Observer
from simulator.policies.base import Future
from simulator.policies.static import PEAK, STEP_S, Group, Sharing
from simulator.replica import ModelState
from warmserve.v1 import common_pb2

# Windows ahead that it tells, in steps: near ones exactly, as when to wake follows from them, far ones, two hours in
# all, so that it is known what will be wanted again.
_LENGTHS = (*[1] * 6, *[6] * 9, *[60] * 11)
_PLACED = Reason(common_pb2.CAUSE_FOUNDATION, "placed for all of the run")
_EDGES = np.concatenate([[0], np.cumsum(_LENGTHS)])


@dataclass
class Oracle:
    """Knows every arrival, and what requests are like. Forecasts are the true loads without spread: mean and highest of
    10 s of each window. Of a model without an instance, requests that come before it could be loaded count as waiting
    already, so that one is there for them. Where a static placement by peaks has a place for every model, it begins
    with that one, and its instances stay: the planner only adds to it."""

    name: str = "oracle"
    start_s: float = 0.0
    lends: bool = True
    kv_pages: Mapping[Key, int] = field(default_factory=dict)
    _placed: dict[str, list[Group]] = field(default_factory=dict)  # instances that stay, by model
    _loads: list[NDArray[np.float64]] = field(default_factory=list)  # per model and step
    _arrivals: list[NDArray[np.float64]] = field(default_factory=list)
    _told_last: dict[int, tuple[int, tuple[WindowLoad, ...]]] = field(default_factory=dict)  # per model, at a step
    _begin: float = 0.0
    _observer: Observer | None = None

    def begin(self, cluster: Cluster, future: Future) -> None:
        """See Policy."""
        self._observer = Observer(cluster, cluster.settings.rules)
        self._begin = float(future.arrival_s[0])
        self._loads = [future.loads(model.index, STEP_S) for model in cluster.models]
        peaks = [float(np.percentile(future.loads(model.index, STEP_S), PEAK)) for model in cluster.models]
        placement = Sharing(cluster, peaks).place()
        if {model.index for model, _ in placement} == set(range(len(cluster.models))):
            self._placed = {m.name: [group for model, group in placement if model is m] for m in cluster.models}
        self._arrivals = [future.arrival_s[future.model == model.index] for model in cluster.models]

    def decide(self, cluster: Cluster, asked: Sequence[str]) -> Iterable[Action]:
        """See Policy."""
        assert self._observer is not None
        if self._placed and not any(model.replicas for model in cluster.models):
            return [
                Action(Do.WAKE, name, tuple(gpu.id for gpu in group), _PLACED)
                for name, groups in self._placed.items()
                for group in groups
            ]
        seen = self._observer.snapshot()
        told = replace(seen, models={m.name: self._told(cluster, m, seen) for m in cluster.models})
        return (planner.wake(told, asked[0]) if asked else planner.plan(told, outlooks=False)).actions

    def _told(self, cluster: Cluster, model: ModelState, seen: Snapshot) -> Model:
        now = cluster.clock.now
        lead = model.load_s + 2 * cluster.settings.tick_s  # one plan drains what is in the way, the next wakes
        known = seen.models[model.name]
        arrivals = self._arrivals[model.index]
        soon = 0
        if not model.instances:
            soon = int(np.searchsorted(arrivals, now + lead) - np.searchsorted(arrivals, now))
        least = max(known.min_replicas, len(self._placed.get(model.name, ())))
        return replace(
            known,
            windows=self._windows(model, now),
            service_s=model.service_s,
            kv_bytes_per_request=model.kv_bytes_per_request,
            waiting=known.waiting + soon,
            min_replicas=least,
        )

    def _windows(self, model: ModelState, now: float) -> tuple[WindowLoad, ...]:
        first = int((now - self._begin) // STEP_S)
        known = self._told_last.get(model.index)
        if known is not None and known[0] == first:
            return known[1]
        ahead = np.zeros(int(_EDGES[-1]))
        there = self._loads[model.index][max(0, first) : max(0, first + len(ahead))]
        at = max(0, -first)  # the warm-up lies before all loads
        ahead[at : at + len(there)] = there
        means = np.add.reduceat(ahead, _EDGES[:-1]) / _LENGTHS
        peaks = np.maximum.reduceat(ahead, _EDGES[:-1])
        starts = (self._begin + (first + _EDGES) * STEP_S).tolist()
        windows = tuple(
            WindowLoad(start, end, Quantiles.exactly(mean), Quantiles.exactly(peak))
            for start, end, mean, peak in zip(starts, starts[1:], means.tolist(), peaks.tolist(), strict=False)
        )
        self._told_last[model.index] = first, windows
        return windows
