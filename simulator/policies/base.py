"""What a policy is, and what policies may know beforehand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from services.placer.decisions import Action
from services.placer.snapshot import Key
from simulator.cluster import Cluster


@dataclass(frozen=True)
class Future:
    """All requests of the run, in order of arrival. Only the oracle looks at single ones; static policies know sums."""

    arrival_s: NDArray[np.float64]
    model: NDArray[np.int64]  # index in the cluster's models
    service_s: NDArray[np.float64]  # how long each is in progress on an instance at half its capacity

    def loads(self, model: int, step_s: float) -> NDArray[np.float64]:
        """Requests in progress of a model, mean of each step of `step_s` seconds from the first arrival on."""
        own = self.model == model
        if not own.any():
            return np.zeros(1)
        begin = float(self.arrival_s[0])
        starts = self.arrival_s[own] - begin
        ends = starts + self.service_s[own]
        steps = int(np.ceil((float(self.arrival_s[-1]) - begin) / step_s)) + 1
        return np.asarray(_time_in_steps(starts, ends, step_s, steps) / step_s)


def _time_in_steps(
    starts: NDArray[np.float64], ends: NDArray[np.float64], step_s: float, steps: int
) -> NDArray[np.float64]:
    """Sum over intervals of the time they have in each step; what lies behind the last step counts nowhere."""

    def before(times: NDArray[np.float64]) -> NDArray[np.float64]:
        # For each edge e the sum of max(0, e - time): slope by counting, intercept by summing.
        edges = np.arange(steps + 1) * step_s
        ordered = np.sort(times)
        passed = np.searchsorted(ordered, edges)
        sums = np.concatenate([[0.0], np.cumsum(ordered)])
        return np.asarray(passed * edges - sums[passed])

    return np.diff(before(starts) - before(ends))


class Policy(Protocol):
    """Gives a cluster orders: agents' orders, with groups of the cluster's GPUs."""

    @property
    def name(self) -> str:
        """For tables."""
        ...

    @property
    def start_s(self) -> float:
        """Seconds that one of its engines takes to start, beside copying weights."""
        ...

    @property
    def lends(self) -> bool:
        """Whether KV pages that an instance does not use may hold other models' weights."""
        ...

    @property
    def kv_pages(self) -> Mapping[Key, int]:
        """Replicas that have so many KV pages on each GPU, no more and no fewer; asked after `begin`."""
        ...

    def begin(self, cluster: Cluster, future: Future) -> None:
        """Called once, before the warm-up; nothing is resident."""
        ...

    def decide(self, cluster: Cluster, asked: Sequence[str]) -> Iterable[Action]:
        """What to do now. `asked`: models for which routers ask to be woken just now; empty at a tick."""
        ...
