"""What replicas are worth: the published score.

score = exp(-i / n) x cold-start seconds x (burstiness, for burst replicas), with i the replica's rank among the n that
the model needs; weighted with the model's priority. Instances rank first, then warm replicas, the most resident first.
Replicas beyond the n count for a tenth of a burst replica, because one window in ten exceeds the peak that n is for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import IntEnum

from services.placer.demand import Demand
from services.placer.snapshot import Key, Model, Replica, State


class Kind(IntEnum):
    """What a replica is needed for; the higher, the earlier it is placed."""

    SPARE = 0
    BURST = 1
    FOUNDATION = 2


@dataclass(frozen=True)
class Worth:
    """A replica's worth."""

    kind: Kind
    score: float  # expected seconds of waiting saved


PINNED_S = 1e6  # added to what a pinned replica is worth: it gives way when nothing else does
_BEYOND_PEAK = 0.1
_ORDER = {State.ACTIVE: 0, State.WAKING: 1, State.DRAINING: 2, State.WARM: 3, State.WARMING: 4}


def worth(rank: int, model: Model, demand: Demand) -> Worth:
    """The worth of the model's replica of that rank, the first being 0."""
    score = math.exp(-rank / max(1, demand.replicas)) * model.cold_load_s * model.priority
    if rank < demand.foundation:
        return Worth(Kind.FOUNDATION, score)
    score *= demand.burstiness
    return Worth(Kind.BURST, score) if rank < demand.replicas else Worth(Kind.SPARE, score * _BEYOND_PEAK)


def ranked(replicas: Iterable[Replica], usable: Callable[[Replica], bool]) -> list[Replica]:
    """One model's replicas in order of rank; those that cannot be used any more, on cordoned agents, come last."""
    return sorted(replicas, key=lambda r: (not usable(r), _ORDER[r.state], -r.residency, r.group))


def worths(
    model: Model, demand: Demand, replicas: Iterable[Replica], usable: Callable[[Replica], bool]
) -> dict[Key, Worth]:
    """The worth of each of one model's replicas."""
    return {replica.key: worth(rank, model, demand) for rank, replica in enumerate(ranked(replicas, usable))}
