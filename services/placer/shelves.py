"""Where replicas lie: by agent and by model."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from services.placer.snapshot import Key, Replica, State

_CALM = State.WARM, State.WARMING
_SERVING = State.ACTIVE, State.WAKING
_MOST_CHANGED = 4  # one in so many replicas: with more changed, all is made anew
_in_order = operator.attrgetter("key")


class Shelf(NamedTuple):
    """What lies on one agent."""

    replicas: tuple[Replica, ...] = ()  # in order of model and group
    pages: int = 0  # that they hold, or have been promised
    kv_pages: int = 0  # with KV of theirs
    serving: int = 0  # how many of them serve, or are about to
    calm: bool = True  # whether none of them serves, drains or runs anything


_EMPTY = Shelf()


class Shelves:
    """All agents' shelves, and each model's replicas. What is in them is replaced, never changed: copies are cheap."""

    def __init__(
        self, by_key: dict[Key, Replica], by_agent: dict[str, Shelf], by_model: dict[str, tuple[Replica, ...]]
    ):
        self.by_key = by_key
        self.by_agent = by_agent  # without empty ones
        self.by_model = by_model  # each in order of group, and none without any

    def on(self, agent_id: str) -> Shelf:
        """An agent's."""
        return self.by_agent.get(agent_id, _EMPTY)

    def copy(self) -> Shelves:
        """The same, to be changed."""
        return Shelves(dict(self.by_key), dict(self.by_agent), dict(self.by_model))

    def put(self, replica: Replica) -> None:
        """Adds a replica, or what it has become."""
        key = replica.key
        self.by_key[key] = replica
        self._set(key, (replica,))

    def remove(self, key: Key) -> None:
        """A replica is no more."""
        del self.by_key[key]
        self._set(key, ())

    def _set(self, key: Key, there: tuple[Replica, ...]) -> None:
        model, group = key
        if of_model := _replaced(self.by_model.get(model, ()), key, there):
            self.by_model[model] = of_model
        else:
            del self.by_model[model]
        for agent_id in group:
            if on_agent := _replaced(self.on(agent_id).replicas, key, there):
                self.by_agent[agent_id] = _shelf(on_agent)
            else:
                del self.by_agent[agent_id]


def _replaced(replicas: Iterable[Replica], key: Key, there: Iterable[Replica]) -> tuple[Replica, ...]:
    return tuple(sorted([*(replica for replica in replicas if replica.key != key), *there], key=_in_order))


def _shelf(replicas: tuple[Replica, ...]) -> Shelf:
    return Shelf(
        replicas,
        sum(replica.pages for replica in replicas),
        sum(replica.kv_pages for replica in replicas),
        sum(replica.state in _SERVING for replica in replicas),
        all(replica.state in _CALM and not replica.running for replica in replicas),
    )


class _Last(NamedTuple):
    """What was asked for last."""

    by_id: Mapping[int, Replica]  # by identity: comparing replicas would cost more than all else
    shelves: Shelves


_last = _Last({}, Shelves({}, {}, {}))


def shelves(replicas: Iterable[Replica]) -> Shelves:
    """The shelves on which these lie, to be changed.

    Those of the last call are gone on from, where few replicas are other objects than then: a wake waits for it.
    """
    global _last
    there = list(replicas)
    by_id, before, made = dict(zip(map(id, there), there, strict=True)), _last.by_id, _last.shelves
    gone, news = before.keys() - by_id.keys(), by_id.keys() - before.keys()
    if (len(gone) + len(news)) * _MOST_CHANGED > len(there):
        made = _from_scratch(there)
    else:
        for was in gone:
            made.remove(before[was].key)
        for new in news:
            made.put(by_id[new])
    _last = _Last(by_id, made)
    return made.copy()


def _from_scratch(replicas: Iterable[Replica]) -> Shelves:
    by_agent: defaultdict[str, list[Replica]] = defaultdict(list)
    by_model: defaultdict[str, list[Replica]] = defaultdict(list)
    for replica in sorted(replicas, key=_in_order):
        by_model[replica.model].append(replica)
        for agent_id in replica.group:
            by_agent[agent_id].append(replica)
    return Shelves(
        {replica.key: replica for replica in replicas},
        {agent_id: _shelf(tuple(there)) for agent_id, there in by_agent.items()},
        {model: tuple(there) for model, there in by_model.items()},
    )
