"""What replicas are worth: the published score.

score = exp(-i / n) x cold-start seconds x (burstiness, for burst replicas), with i the replica's rank among the n that
the model needs; weighted with the model's priority. Instances rank first, then warm replicas, the most resident first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

from services.placer.demand import Demand
from services.placer.snapshot import Key, Model, Replica, State


class Kind(IntEnum):
    """What a replica is needed for; the higher, the more it is worth."""

    SPARE = 0
    BURST = 1
    FOUNDATION = 2


@dataclass(frozen=True, order=True)
class Worth:
    """A replica's worth. Compared by kind, then by score."""

    kind: Kind
    score: float  # expected seconds of waiting saved


_ORDER = {State.ACTIVE: 0, State.WAKING: 1, State.DRAINING: 2, State.WARM: 3, State.WARMING: 4}


def worth(rank: int, model: Model, demand: Demand) -> Worth:
    """The worth of the model's replica of that rank, the first being 0."""
    kind = Kind.BURST if rank < demand.replicas else Kind.SPARE
    if rank < demand.foundation:
        kind = Kind.FOUNDATION
    score = math.exp(-rank / max(1, demand.replicas)) * model.cold_load_s * model.priority
    return Worth(kind, score if kind is Kind.FOUNDATION else score * demand.burstiness)


def ranked(replicas: Iterable[Replica]) -> list[Replica]:
    """One model's replicas in order of rank."""
    return sorted(replicas, key=lambda r: (_ORDER[r.state], -r.residency, r.group))


def worths(model: Model, demand: Demand, replicas: Iterable[Replica]) -> dict[Key, Worth]:
    """The worth of each of one model's replicas."""
    return {replica.key: worth(rank, model, demand) for rank, replica in enumerate(ranked(replicas))}
