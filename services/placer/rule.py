"""What two rules of placement differ in: what replicas are worth, and what to warm where."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from services.placer.decisions import Action, Competitor
from services.placer.demand import Demand
from services.placer.scores import Worth
from services.placer.snapshot import GroupIds, Model, Replica


@dataclass(frozen=True)
class Prewarming:
    """What to warm, and why more is not."""

    actions: list[Action] = field(default_factory=list)
    obstacles: Mapping[str, str] = field(default_factory=dict)  # per model that would have more
    competitors: Mapping[str, tuple[Competitor, ...]] = field(default_factory=dict)  # per model


class Rule(Protocol):
    """A rule, for one board. Scores are expected seconds of waiting saved."""

    def demand(self, model: Model) -> Demand:
        """What a model needs."""

    def worth(self, replica: Replica) -> Worth:
        """What a replica is worth, of whatever is on the board when the rule is asked first."""

    def urgency(self, model: Model, serving: int) -> float:
        """What one more instance of a model that has some is worth now: what is worth less is evicted for it."""

    def loading(self, model: Model, group: GroupIds, missing: float) -> float:
        """What loading the missing share of a replica costs those that wait, in the unit of scores."""

    def prewarm(self) -> Prewarming:
        """What to warm; carries it out on the board."""
