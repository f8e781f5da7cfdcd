"""What instances say of the time between a sequence's tokens, and how many sequences a target allows by that. Pure."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Container
from dataclasses import dataclass, field

from warmserve.v1 import cluster_pb2


def sequences_within(base: float, per_sequence: float, target: float, slots: int) -> float:
    """The most sequences that keep `target`, not rounded; 1 where not even one does, and never more than `slots`.

    A token takes base + n * per_sequence with n of them; all in the same unit.
    """
    if base + slots * per_sequence <= target:
        return float(slots)
    return min(slots, max(1.0, (target - base) / per_sequence)) if per_sequence > 0 else 1.0


@dataclass
class Paces:
    """The newest paces, by model, kind of device and instance. Of those that are gone only the last one's stays."""

    _known: dict[str, dict[str, dict[str, cluster_pb2.Pace]]] = field(default_factory=dict)

    def learn(self, name: str, record: cluster_pb2.InstanceRecord, device: str, present: Container[str]) -> bool:
        """Takes note of an instance's pace. Whether that is news. `present`: names of the instances that there are."""
        if not record.HasField("pace"):
            return False
        known = self._known.setdefault(record.model, defaultdict(dict))[device]
        if known.get(name) == record.pace:
            return False
        for other in [other for other in known if other not in present]:
            del known[other]
        known[name] = record.pace
        return True

    def gone(self, name: str, record: cluster_pb2.InstanceRecord) -> bool:
        """An instance is no more. Whether that changes anything."""
        for known in self._known.get(record.model, {}).values():
            if len(known) > 1 and known.pop(name, None) is not None:
                return True
        return False

    def forget(self, model: str) -> None:
        """A model is not deployed any more."""
        self._known.pop(model, None)

    def within(self, model: str, device: str, target_ms: float, slots: int) -> int | None:
        """The most sequences of an instance that keep a target, its instances' mean; None where none has told its pace.

        Together they then carry what each of them does.
        """
        known = self._known.get(model, {}).get(device)
        if not known:
            return None
        each = (sequences_within(pace.base_ms, pace.per_sequence_ms, target_ms, slots) for pace in known.values())
        return math.floor(sum(each) / len(known))

    def alone_ms(self, model: str, device: str) -> float:
        """What a token takes where one sequence runs, its instances' mean. They must have told."""
        known = self._known[model][device]
        return sum(pace.base_ms + pace.per_sequence_ms for pace in known.values()) / len(known)
