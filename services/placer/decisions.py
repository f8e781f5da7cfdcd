"""What a plan consists of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from services.placer.snapshot import GroupIds, State
from warmserve.v1 import common_pb2


@dataclass(frozen=True)
class Reason:
    """Why, as in common.proto."""

    cause: common_pb2.Cause.ValueType
    text: str
    by_model: str = ""
    score: float = 0.0


class Do(Enum):
    """What an action does to a replica."""

    WAKE = "wake"
    DRAIN = "drain"
    WARM = "warm"
    EVICT = "evict"


@dataclass(frozen=True)
class Action:
    """One step. Evictions come before what they make room for."""

    do: Do
    model: str
    group: GroupIds
    reason: Reason
    keep: float = 0.0  # of an eviction: the share of the weights to leave resident


class Outcome(Enum):
    """What became of a wish for an instance."""

    NOW = "now"  # it is being woken
    AFTER_DRAIN = "after drain"  # it will be once instances of others have drained
    IMPOSSIBLE = "impossible"  # for now


@dataclass(frozen=True)
class Wake:
    """What was decided about a model that wants an instance."""

    outcome: Outcome
    group: GroupIds  # empty where it is impossible
    found: State | None  # the state of the group's replica before; None: cold
    reason: Reason
    estimated_s: float | None = None  # until it is active


@dataclass(frozen=True)
class Competitor:
    """A model that wanted the same memory."""

    model: str
    won: bool  # whether the model that tells of it won against it
    score: float  # what the competitor's replica there is worth, in expected seconds of waiting
    where: GroupIds  # the group the two wanted, as the model that tells of it would use it


@dataclass(frozen=True)
class Outlook:
    """A model's part in a plan, acted upon or not."""

    model: str
    foundation: int
    burst: int
    active: int
    warm: int  # warm or warming once the plan is carried out
    reason: Reason
    competitors: tuple[Competitor, ...] = ()  # the dearest first, each model at most once as won and once as lost


@dataclass(frozen=True)
class Plan:
    """What to do, in order; why; and what became of each model that wanted an instance."""

    actions: tuple[Action, ...]
    outlooks: tuple[Outlook, ...]  # of every deployed model, in order of name
    wakes: Mapping[str, Wake]
