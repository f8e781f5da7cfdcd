"""When policies decide: at ticks, when routers ask for a model, and when something has changed that others wait for."""

from __future__ import annotations

import time

from services.placer.snapshot import State
from simulator.clock import Alarm, Clock
from simulator.cluster import Cluster
from simulator.policies.base import Policy
from simulator.replica import ModelState
from simulator.spec import Settings

_ROUNDING_S = 1e-6


class Controller:
    """The leading placer, and the routers' waking."""

    def __init__(self, clock: Clock, cluster: Cluster, policy: Policy, settings: Settings) -> None:
        self.plans = 0
        self.plan_seconds = 0.0  # of the processor
        self._clock = clock
        self._cluster = cluster
        self._policy = policy
        self._settings = settings
        self._tick = Alarm(self._ticked)
        self._replan = Alarm(self._changed)
        self._planned = -float("inf")  # when the last whole plan was made
        self._asks = [Alarm(lambda model=model: self._asked(model)) for model in cluster.models]  # type: ignore[misc]
        clock.set(self._tick, clock.now)

    def need(self, model: ModelState) -> None:
        """A request waits: where no instance is there or coming, a router asks for one, once for all who wait."""
        if not self._asks[model.index].ticket and not model.instances:
            self._clock.set(self._asks[model.index], self._clock.now + self._settings.delays.ask_s)

    def crowded(self) -> None:
        """A request waits although there are instances: the next tick comes soon."""
        soon = self._clock.now + self._settings.busy_tick_s
        if self._tick.due > soon:
            self._clock.set(self._tick, soon)

    def changed(self) -> None:
        """Something has become warm, active or free: those who wait for room may have it now."""
        if not self._replan.ticket and self._blocked():
            self._clock.set(self._replan, self._clock.now + self._settings.delays.replan_s)

    def _blocked(self) -> list[str]:
        """Models for which requests wait, and of which no instance is there or coming."""
        return [model.name for model in self._cluster.models if model.queue and not _served(model)]

    def _asked(self, model: ModelState) -> None:
        if model.queue and not _served(model):
            self._decide([model.name])
            self.crowded()  # where it could not be woken, the next tick tries again

    def _changed(self) -> None:
        if blocked := self._blocked():
            self._decide(blocked)

    def _ticked(self) -> None:
        """A whole plan after `tick_s`; in between, what waits is seen to alone."""
        waiting = [model.name for model in self._cluster.models if model.queue]
        if self._clock.now >= self._planned + self._settings.tick_s - _ROUNDING_S:
            self._planned = self._clock.now
            self._decide([])
        elif waiting:
            self._decide(waiting)
        soon = self._clock.now + self._settings.busy_tick_s if waiting else float("inf")
        self._clock.set(self._tick, min(soon, self._planned + self._settings.tick_s))

    def _decide(self, asked: list[str]) -> None:
        began = time.process_time()
        actions = list(self._policy.decide(self._cluster, asked))
        self.plan_seconds += time.process_time() - began
        self.plans += 1
        self._cluster.carry_out(actions)


def _served(model: ModelState) -> bool:
    return bool(model.instances) or any(replica.state is State.WAKING for replica in model.replicas.values())
