"""What two rules of placement differ in: what replicas are worth, and what to warm where."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from services.placer.decisions import Action, Competitor
from services.placer.demand import Demand
from services.placer.scores import Worth
from services.placer.snapshot import Agent, GroupIds, Model, Replica, State


@dataclass(frozen=True)
class Prewarming:
    """What to warm, and why more is not."""

    actions: list[Action] = field(default_factory=list)
    obstacles: Mapping[str, str] = field(default_factory=dict)  # per model that would have more
    competitors: Mapping[str, tuple[Competitor, ...]] = field(default_factory=dict)  # per model


class Price(NamedTuple):
    """What a replica's giving way costs at least, but for how long it has been unused."""

    score: float  # what it is worth
    used_s: float  # Unix time when it was last used; infinite: now
    pages: int  # that it gives, beside those with its KV


def prices(there: Iterable[Replica], worth: Callable[[Replica], Worth]) -> Sequence[Price]:
    """The prices of replicas, by what they are worth. Nobody waits for who is about to serve."""
    found = []
    for replica in there:
        if replica.state is not State.WAKING:
            used_s = math.inf if replica.running else -math.inf if replica.state is State.DRAINING else replica.used_s
            found.append(Price(worth(replica).score, used_s, replica.pages))
    return found


class Rule(Protocol):
    """A rule, for one board. Scores are expected seconds of waiting saved."""

    def demand(self, model: Model) -> Demand:
        """What a model needs."""

    def worth(self, replica: Replica) -> Worth:
        """What a replica is worth, of whatever is on the board when the rule is asked first."""

    def prices(self, agent_id: str) -> Sequence[Price]:
        """Those of all that lies on an agent."""

    def urgency(self, model: Model, serving: int) -> float:
        """What one more instance of a model that has some is worth now: what is worth less is evicted for it."""

    def loading(self, model: Model, group: GroupIds, missing: float) -> float:
        """What loading the missing share of a replica costs those that wait, in the unit of scores."""

    def sharing(self, model: Model, group: GroupIds) -> float:
        """What one more instance of a model and the instances on a group cost one another, in the unit of scores."""

    def spared(self, model: Model, serving: int) -> float:
        """What one more instance beside `serving` others spares requests, in the unit of scores: where sharing
        costs more, it is not woken for them."""

    def spread(self, model: Model) -> Collection[GroupIds]:
        """Groups on which further instances of a model had best lie although those it has carry its requests."""

    def may_rest(self, model: Model, instance: Replica) -> bool:
        """Whether an instance that its model's load does not need is drained though nobody asks for its place."""

    def reserve(self, model: Model, agent: Agent) -> int:
        """KV pages to leave in all on an agent where an instance of a model is woken: the same on all of a size."""

    def first_pages(self, model: Model, agent: Agent) -> int:
        """KV pages for an instance of a model that is woken, beside what others hold: likewise."""

    def prewarm(self) -> Prewarming:
        """What to warm; carries it out on the board."""
