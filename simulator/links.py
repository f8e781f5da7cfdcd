"""Copies that share links and disks: each gets its max-min fair share, recomputed when one begins or ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from simulator.clock import Alarm, Clock

_DONE = 1e-3  # bytes


@dataclass(eq=False)
class Flow:
    """A copy in progress, such as of all shards of a replica at once."""

    uses: Mapping[str, float]  # resource -> how much of it one byte/s of this flow takes
    left: float  # bytes
    done: Callable[[], None]
    rate: float = 0.0  # bytes/s


@dataclass(eq=False)
class Links:
    """The links of one node. Progressive filling: all flows grow alike until a resource of theirs is full."""

    clock: Clock
    capacity: Mapping[str, float]  # bytes/s per resource
    _flows: list[Flow] = field(default_factory=list)
    _at: float = 0.0
    _alarm: Alarm = field(init=False)

    def __post_init__(self) -> None:
        self._alarm = Alarm(self._ended)
        self._at = self.clock.now

    def begin(self, flow: Flow) -> None:
        """Adds a flow; `done` is called when its last byte has come."""
        self._advance()
        self._flows.append(flow)
        self._share()

    def end(self, flow: Flow) -> float:
        """Cuts a flow short and returns the bytes it still had to copy; `done` is not called."""
        self._advance()
        self._flows.remove(flow)
        self._share()
        return flow.left

    def left(self, flow: Flow) -> float:
        """Bytes it still has to copy."""
        return max(0.0, flow.left - flow.rate * (self.clock.now - self._at))

    def _advance(self) -> None:
        passed = self.clock.now - self._at
        self._at = self.clock.now
        if passed > 0:
            for flow in self._flows:
                flow.left = max(0.0, flow.left - flow.rate * passed)

    def _share(self) -> None:
        for flow, rate in zip(self._flows, shares([flow.uses for flow in self._flows], self.capacity), strict=True):
            flow.rate = rate
        if self._flows:
            self.clock.set(self._alarm, self._at + min(flow.left / flow.rate for flow in self._flows))
        else:
            self.clock.cancel(self._alarm)

    def _ended(self) -> None:
        due = min(self._flows, key=lambda flow: flow.left / flow.rate)
        self._advance()
        due.left = 0.0  # whatever rounding left of it
        ended = [flow for flow in self._flows if flow.left <= _DONE]
        self._flows = [flow for flow in self._flows if flow.left > _DONE]
        self._share()
        for flow in ended:
            flow.done()


def shares(uses: list[Mapping[str, float]], capacity: Mapping[str, float]) -> list[float]:
    """Max-min fair rates of flows that each use some resources, with weights."""
    rates = [0.0] * len(uses)
    left = {name: capacity[name] for use in uses for name in use}
    open_ = list(range(len(uses)))
    while open_:
        weights: dict[str, float] = {}
        for index in open_:
            for name, weight in uses[index].items():
                weights[name] = weights.get(name, 0.0) + weight
        full = min(weights, key=lambda name: (max(0.0, left[name]) / weights[name], name))
        rate = max(0.0, left[full]) / weights[full]
        fixed = [index for index in open_ if full in uses[index]]
        for index in fixed:
            rates[index] = rate
            for name, weight in uses[index].items():
                left[name] -= rate * weight
        open_ = [index for index in open_ if full not in uses[index]]
    return rates
