"""What the placer and its planning process tell one another, over pipes: pickled values, each with its length before.

Large values go in pieces, so that pickling one never holds the placer's event loop for long.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from services.placer.decisions import Action
from services.placer.measured import Capacity
from services.placer.snapshot import Agent, Key, Model, Node, Replica, Rules

T = TypeVar("T")
LENGTH_BYTES = 4
_PIECE = 16  # values


@dataclass(frozen=True)
class Begin:
    """A snapshot follows, in `Part`s, and then `Plan`. Models that it names and no part brings are as they were."""

    now_s: float
    refused: Mapping[Key, str]
    rules: Rules
    nodes: Mapping[str, Node]
    models: tuple[str, ...]


@dataclass(frozen=True)
class Part:
    """A part of a snapshot."""

    agents: Sequence[Agent] = ()
    models: Sequence[Model] = ()
    replicas: Sequence[Replica] = ()


@dataclass(frozen=True)
class Plan:
    """Asks for the plan of the snapshot that was told. The answer is its actions, in lists, and then None."""


@dataclass(frozen=True)
class Publish:
    """Asks for the last plan as etcd holds it; the answer is a `Published`, or None where it is `unless`, but older."""

    fence: int
    placer_id: str
    advisory: bool
    actions: Sequence[Action]
    capacities: Mapping[str, Capacity]
    unless: bytes


@dataclass(frozen=True)
class Published:
    """A plan as etcd holds it."""

    value: bytes
    digest: bytes  # of all but its date


def frame(message: object) -> bytes:
    """A value as it goes over a pipe."""
    data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    return len(data).to_bytes(LENGTH_BYTES, "big") + data


def pieces(values: Sequence[T]) -> Iterator[Sequence[T]]:
    """The values, a few at a time."""
    for first in range(0, len(values), _PIECE):
        yield values[first : first + _PIECE]
