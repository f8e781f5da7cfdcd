"""What warming ahead was good for, as metrics: counted at one leadership's orders."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field

from prometheus_client import Counter

from services.placer.decisions import Action, Do
from services.placer.snapshot import Key, Replica, State

_WAKES = Counter(
    "warmserve_placer_wakes",
    "Wakes ordered, by what was found: warm (all of it, a hit), partial, warming, draining, cold (a miss)",
    ["model", "found"],
)
_PREWARMS = Counter(
    "warmserve_placer_prewarms", "Replicas warmed ahead, by what became of them: used or wasted", ["model", "outcome"]
)
_BYTES = Counter(
    "warmserve_placer_prewarmed_bytes", "Bytes of weights warmed ahead, by what became of them", ["model", "outcome"]
)


@dataclass
class Prewarms:
    """Replicas warmed ahead that no request has used yet, with the bytes that were copied for them."""

    _unused: dict[Key, int] = field(default_factory=dict)

    def warmed(self, key: Key, copied_bytes: int) -> None:
        """A replica has been warmed, or completed, ahead of need."""
        self._unused[key] = self._unused.get(key, 0) + copied_bytes

    def ordered(self, action: Action, found: Replica | None) -> None:
        """An order was sent; `found` is the replica as it was."""
        key = (action.model, action.group)
        if action.do is Do.WAKE:
            _WAKES.labels(action.model, _found(found)).inc()
            self._ended(key, "used")
        elif action.do is Do.EVICT and not action.keep:
            self._ended(key, "wasted")
        elif action.do is Do.EVICT and key in self._unused and found is not None and found.residency > action.keep:
            lost = int(self._unused[key] * (1 - action.keep / found.residency))
            self._unused[key] -= lost
            _BYTES.labels(action.model, "wasted").inc(lost)

    def shown(self, present: Container[Key]) -> None:
        """Replicas that etcd shows: those gone without an order, to KV cache or with their agent, are wasted."""
        for key in [key for key in self._unused if key not in present]:
            self._ended(key, "wasted")

    def _ended(self, key: Key, outcome: str) -> None:
        if key in self._unused:
            _PREWARMS.labels(key[0], outcome).inc()
            _BYTES.labels(key[0], outcome).inc(self._unused.pop(key))


def _found(replica: Replica | None) -> str:
    if replica is None:
        return "cold"
    if replica.state is State.WARM:
        return "warm" if replica.residency == 1 else "partial"
    return str(replica.state.value)
