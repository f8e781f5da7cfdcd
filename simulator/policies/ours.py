"""The real planner: ours, the published rule, and ours with parts taken away."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from services.placer import planner
from services.placer.decisions import Action, Do, Plan
from services.placer.snapshot import Key, Rules, Snapshot
from simulator.cluster import Cluster
from simulator.observe import Observer
from simulator.policies.base import Future


class Planner(Protocol):
    """One of services.placer.planner's."""

    def __call__(self, snapshot: Snapshot, *, outlooks: bool) -> Plan:
        """A whole plan; without outlooks, which nobody reads here."""
        ...


@dataclass
class Ours:
    """WarmServe: services.placer.planner on a snapshot of the cluster, with whatever forecasts the run has.

    `lends` and `partial` are for ablations: without lending an instance keeps all the KV that is free when it starts;
    without partial residency an eviction takes all of a replica.
    """

    name: str = "warmserve"
    plan: Planner = planner.plan
    wake: Callable[[Snapshot, str], Plan] | None = planner.wake
    rules: Rules | None = None  # None: the settings'
    lends: bool = True
    partial: bool = True
    start_s: float = 0.0
    kv_pages: Mapping[Key, int] = field(default_factory=dict)
    _observer: Observer | None = None

    def begin(self, cluster: Cluster, future: Future) -> None:
        """See Policy."""
        self._observer = Observer(cluster, self.rules or cluster.settings.rules)

    def decide(self, cluster: Cluster, asked: Sequence[str]) -> Iterable[Action]:
        """See Policy. A wake is decided by the plan's first part alone, as the placer does it."""
        assert self._observer is not None
        seen = self._observer.snapshot()
        made = self.wake(seen, asked[0]) if asked and self.wake is not None else self.plan(seen, outlooks=False)
        if self.partial:
            return made.actions
        return [replace(action, keep=0.0) if action.do is Do.EVICT else action for action in made.actions]
