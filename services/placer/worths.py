"""What models' only replicas are worth, kept from one rule to the next while nothing that it depends on has changed.

A wake asks what everything is worth that may give way to it, and hardly any of it has changed since the last wake. What
a model's further replicas are worth depends on their neighbours and is not kept.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from services.placer.demand import Expectation
from services.placer.rule import Price
from services.placer.scores import Worth
from services.placer.shelves import Shelf
from services.placer.snapshot import Key, Model, Replica, Rules


@dataclass(frozen=True)
class Setting:
    """What each worth depends on."""

    nodes: Sequence[str]  # those that take something new
    open_agents: Collection[str]  # likewise
    rules: Rules


@dataclass
class Kept:
    """Worths, and what they are of."""

    setting: Setting
    models: Mapping[str, Model]
    there: Mapping[str, Sequence[Replica]]  # by model
    worths: dict[Key, Worth] = field(default_factory=dict)
    prices: dict[str, tuple[Shelf, Sequence[Price]]] = field(default_factory=dict)  # by agent, of what lay there
    since_s: float = -math.inf  # Unix time from which on all forecasts say the same, and until when
    until_s: float = math.inf

    def keep(self, only: Replica, worth: Worth, expected: Expectation, now_s: float) -> None:
        """Notes what a model's only replica is worth, by an expectation that holds now."""
        if expected.holds(now_s):
            self.worths[only.key] = worth
            self.since_s, self.until_s = max(self.since_s, expected.since_s), min(self.until_s, expected.until_s)

    def priced(self, agent_id: str, shelf: Shelf) -> Sequence[Price] | None:
        """The prices of what lies on an agent, if they are known."""
        known = self.prices.get(agent_id)
        return known[1] if known is not None and known[0] is shelf else None

    def keep_prices(self, agent_id: str, shelf: Shelf, prices: Sequence[Price]) -> None:
        """Notes them, where they are of worths that are kept."""
        if all(replica.key in self.worths for replica in shelf.replicas):
            self.prices[agent_id] = shelf, prices


_last: Kept | None = None


def kept(setting: Setting, models: Mapping[str, Model], there: Mapping[str, Sequence[Replica]], now_s: float) -> Kept:
    """The worths that are known already, to be added to. What has changed is another object."""
    global _last
    last, _last = _last, Kept(setting, models, there)
    if last is not None and last.setting == setting and last.since_s <= now_s < last.until_s:
        _last.worths.update(last.worths)
        _last.prices.update(last.prices)
        _last.since_s, _last.until_s = last.since_s, last.until_s
        changed = [name for name, replicas in last.there.items() if there.get(name) is not replicas]
        changed += [name for name, model in last.models.items() if models.get(name) is not model]
        for name in changed:
            for replica in last.there.get(name, ()):
                _last.worths.pop(replica.key, None)
                for agent_id in replica.group:
                    _last.prices.pop(agent_id, None)
    return _last
