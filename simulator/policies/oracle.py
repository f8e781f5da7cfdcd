"""The oracle: the real planner, told the truth."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from services.placer import planner
from services.placer.decisions import Action
from services.placer.snapshot import Key, Model, Quantiles, Snapshot, WindowLoad
from simulator.cluster import Cluster
from simulator.observe import Observer
from simulator.policies.base import Future
from simulator.replica import ModelState

_STEP_S = 10.0
_STEPS = 12  # windows ahead that it tells


@dataclass
class Oracle:
    """Knows every arrival. Forecasts are the true loads, in steps of 10 s and without spread. Of a model without an
    instance, requests that come before it could be loaded count as waiting already, so that one is there for them."""

    name: str = "oracle"
    start_s: float = 0.0
    lends: bool = True
    kv_pages: Mapping[Key, int] = field(default_factory=dict)
    _loads: list[NDArray[np.float64]] = field(default_factory=list)  # per model and step
    _arrivals: list[NDArray[np.float64]] = field(default_factory=list)
    _begin: float = 0.0
    _observer: Observer | None = None

    def begin(self, cluster: Cluster, future: Future) -> None:
        """See Policy."""
        self._observer = Observer(cluster, cluster.settings.rules)
        self._begin = float(future.arrival_s[0])
        self._loads = [future.loads(model.index, _STEP_S) for model in cluster.models]
        self._arrivals = [future.arrival_s[future.model == model.index] for model in cluster.models]

    def decide(self, cluster: Cluster, asked: Sequence[str]) -> Iterable[Action]:
        """See Policy."""
        assert self._observer is not None
        seen = self._observer.snapshot()
        told = replace(seen, models={m.name: self._told(cluster, m, seen) for m in cluster.models})
        return planner.plan(told).actions

    def _told(self, cluster: Cluster, model: ModelState, seen: Snapshot) -> Model:
        now = cluster.clock.now
        lead = model.load_s + 2 * cluster.settings.tick_s  # one plan drains what is in the way, the next wakes
        known = seen.models[model.name]
        arrivals = self._arrivals[model.index]
        soon = 0
        if not model.instances:
            soon = int(np.searchsorted(arrivals, now + lead) - np.searchsorted(arrivals, now))
        return replace(known, windows=self._windows(model, now), waiting=known.waiting + soon)

    def _windows(self, model: ModelState, now: float) -> tuple[WindowLoad, ...]:
        loads = self._loads[model.index]
        first = int((now - self._begin) // _STEP_S)
        windows = []
        for step in range(first, first + _STEPS):
            load = Quantiles.exactly(float(loads[step]) if 0 <= step < len(loads) else 0.0)
            start = self._begin + step * _STEP_S
            windows.append(WindowLoad(start, start + _STEP_S, load, load))
        return tuple(windows)
