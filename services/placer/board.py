"""The working copy of a snapshot on which a plan is made, and how room is made on it."""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from operator import attrgetter
from typing import NamedTuple

from services.placer.groups import groups, groups_by_node
from services.placer.shelves import shelves
from services.placer.snapshot import Agent, GroupIds, Model, Replica, Snapshot, State

ROUNDED = 1 - 1e-9  # a sum is another one in another order, and must not be more


class Step(Enum):
    """What has to happen to a replica before its pages are free."""

    EVICT = "evict"
    AWAIT = "await"  # it drains already
    DRAIN = "drain"


class Source(NamedTuple):
    """A replica that may give pages."""

    replica: Replica
    step: Step
    cost: float  # seconds of waiting that giving all of them costs
    last: bool = False  # taken only where all others do not suffice


@dataclass(frozen=True)
class Room:
    """What makes a group roomy enough; all of it empty where it is so already."""

    evictions: tuple[tuple[Replica, int], ...] = ()  # with the pages each keeps
    awaited: tuple[Replica, ...] = ()
    drains: tuple[Replica, ...] = ()
    last_resorts: int = 0
    cost: float = 0.0

    @property
    def now(self) -> bool:
        """Whether evictions alone do it."""
        return not self.awaited and not self.drains


class Board:
    """Replicas and pages as they will be when the actions decided so far have been carried out."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.shelves = shelves(snapshot.replicas)
        self._promised: defaultdict[str, int] = defaultdict(int)

    def put(self, replica: Replica) -> None:
        """Adds a replica, or what it has become."""
        self.shelves.put(replica)

    def settled(self) -> Board:
        """A board of its own on which the loads in progress have ended, a while ago."""
        there = (
            replace(r, state=State.WARM, resident=r.shard_pages, used_s=-math.inf) if r.state is State.WARMING else r
            for r in self.all()
        )
        board = Board(replace(self.snapshot, replicas=tuple(there)))
        board._promised.update(self._promised)
        return board

    def remove(self, replica: Replica) -> None:
        """A replica is cold now."""
        self.shelves.remove(replica.key)

    def evict(self, replica: Replica, keep: int) -> None:
        """A replica has only its first `keep` pages left."""
        if keep:
            self.put(replace(replica, state=State.WARM, resident=keep))
        else:
            self.remove(replica)

    def promise(self, model: Model, group: GroupIds) -> None:
        """Keeps room for a replica that will be placed once instances of others have drained."""
        own = self.get(model.name, group)
        for agent_id in group:
            self._promised[agent_id] += self.snapshot.shard_pages(model, agent_id) - (own.pages if own else 0)

    def get(self, model: str, group: GroupIds) -> Replica | None:
        """The model's replica on exactly that group."""
        return self.shelves.by_key.get((model, group))

    def all(self) -> list[Replica]:
        """All replicas, in order of model and group."""
        return sorted(self.shelves.by_key.values(), key=attrgetter("key"))

    def of(self, model: str) -> Sequence[Replica]:
        """A model's replicas, in order of group."""
        return self.shelves.by_model.get(model, ())

    def on(self, group: GroupIds) -> Sequence[Replica]:
        """The replicas that use any of the group's agents, in order of model and group."""
        if len(group) == 1:
            return self.shelves.on(group[0]).replicas
        there = {r.key: r for agent_id in group for r in self.shelves.on(agent_id).replicas}
        return [there[key] for key in sorted(there)]

    def calm(self, group: GroupIds) -> bool:
        """Whether on no agent of the group anything serves, drains or runs."""
        return all(self.shelves.on(agent_id).calm for agent_id in group)

    @functools.cached_property
    def open_agents(self) -> list[Agent]:
        """The agents on which something new may be placed."""
        return [agent for agent in self.snapshot.agents.values() if not agent.cordoned and not agent.drained]

    def groups(self, size: int) -> Sequence[GroupIds]:
        """All groups of so many agents on which something new may be placed, in order of node and device."""
        return groups(self.open_agents, size)

    def groups_by_node(self, size: int) -> Mapping[str, Sequence[GroupIds]]:
        """The same by node."""
        return groups_by_node(self.open_agents, size)

    def usable(self, replica: Replica) -> bool:
        """Whether a replica's agents are there and may serve more."""
        agents = [self.snapshot.agents.get(agent_id) for agent_id in replica.group]
        return all(agent is not None and not agent.cordoned and not agent.drained for agent in agents)

    def whole(self, replica: Replica) -> bool:
        """Whether all agents of a replica are there."""
        return all(agent_id in self.snapshot.agents for agent_id in replica.group)

    def promised(self, agent_id: str) -> int:
        """Pages of an agent that are kept for replicas to come."""
        return self._promised[agent_id]

    def deficits(
        self,
        model: Model,
        group: GroupIds,
        given: Iterable[tuple[Replica, int]] = (),
        *,
        kept: Mapping[str, int],
        first: Mapping[str, int] | None = None,
    ) -> dict[str, int]:
        """Pages that lack on each agent for the model's replica, after others have given all but some pages.

        `kept`: the KV pages to leave on each agent, at least. `first`: of a replica that is to serve at once, the KV
        pages it begins with, beside those that other instances hold.
        """
        own, given = self.get(model.name, group), list(given)
        has_kv = own is not None and own.kv_pages > 0
        lacking = {}
        for agent_id in group:
            need, kv = self.snapshot.shard_pages(model, agent_id) - (own.pages if own is not None else 0), 0
            for replica, keep in given:
                if agent_id in replica.group:
                    need += keep - replica.pages
                    kv -= replica.kv_pages
            if first is not None and not has_kv:
                kv += first[agent_id]
            agent = self.snapshot.agents[agent_id]
            lacking[agent_id] = self.lacking(agent, need, kept[agent_id], None if first is None else kv)
        return lacking

    def lacking(self, agent: Agent, need: int, kept: int, first: int | None) -> int:
        """Pages that lack on an agent for so many more of weights.

        `kept`: KV pages to leave there in all, and at least `first` more than there are now, if any.
        """
        reserve = kept if first is None else max(kept, agent.pages_kv + first)
        return self._promised[agent.id] + self.shelves.on(agent.id).pages + need + reserve - agent.pages_total

    def least_cost(
        self,
        model: Model,
        group: GroupIds,
        sources: Collection[Source],
        *,
        kept: Mapping[str, int],
        first: Mapping[str, int] | None = None,
    ) -> float:
        """What `make_room` costs at least; infinite where it finds none. Told much faster."""
        least, one = 0.0, len(group) == 1
        for agent_id, pages in self.deficits(model, group, kept=kept, first=first).items():
            if pages > 0:
                near = sources if one else [s for s in sources if agent_id in s.replica.group]
                least = max(least, _least_cost(pages, near))
        return least

    def make_room(
        self,
        model: Model,
        group: GroupIds,
        sources: Collection[Source],
        *,
        kept: Mapping[str, int],
        first: Mapping[str, int] | None = None,
    ) -> Room | None:
        """The cheapest way to make room for the model's replica on a group, by greedy choice; None where there is none.

        The last warm replica taken gives only as many pages as are needed, from its end. `kept` and `first` as in
        `deficits`.
        """
        lack = partial(self.deficits, model, group, kept=kept, first=first)
        lacking = lack()
        if _suffices(lacking):
            return Room()
        short = {agent_id: pages for agent_id, pages in lacking.items() if pages > 0}
        taken: list[Source] = []
        for source in sorted(sources, key=lambda s: (s.last, _price(s, short), s.replica.key)):
            if any(lacking.get(agent_id, 0) > 0 for agent_id in source.replica.group):
                taken.append(source)
                lacking = lack([(s.replica, 0) for s in taken])
                if _suffices(lacking):
                    return _trim(taken, lacking, lack)
        return None


def _trim(
    taken: list[Source], lacking: Mapping[str, int], lack: Callable[[list[tuple[Replica, int]]], dict[str, int]]
) -> Room:
    """Gives back what the greedy choice took too much, the dearest first. `lacking`: with all of them taken."""
    keeps = {source.replica.key: 0 for source in taken}
    last = taken[-1]
    for source in reversed(taken):
        rest = [(s.replica, keeps[s.replica.key]) for s in taken if s is not source]
        if source is not last and _suffices(lack(rest)):  # without the last it did not suffice
            taken = [s for s in taken if s is not source]
        elif source.step is Step.EVICT and source.replica.state is State.WARM:
            left = lacking if source is last else lack([*rest, (source.replica, 0)])
            slack = min(-left[agent_id] for agent_id in source.replica.group if agent_id in left)
            keeps[source.replica.key] = min(slack, source.replica.resident)
    return Room(
        evictions=tuple((s.replica, keeps[s.replica.key]) for s in taken if s.step is Step.EVICT),
        awaited=tuple(s.replica for s in taken if s.step is Step.AWAIT),
        drains=tuple(s.replica for s in taken if s.step is Step.DRAIN),
        last_resorts=sum(s.last for s in taken),
        cost=sum(s.cost * (1 - keeps[s.replica.key] / max(1, s.replica.resident)) for s in taken),
    )


def _least_cost(pages: int, sources: Iterable[Source]) -> float:
    """What freeing so many pages of an agent costs at least: by parts of sources, the cheapest per page first."""
    offers = []
    for replica, _, cost, _ in sources:
        pages -= replica.kv_pages  # which come with any part of it
        if most := replica.pages:
            offers.append((cost / most, most, cost))
    total = 0.0
    for index, (_, most, cost) in enumerate(sorted(offers)):
        if pages <= most:
            part = cost * (1 - (most - pages) / most) if pages > 0 else 0.0
            return (total + part) * ROUNDED if index else part
        total += cost
        pages -= most
    return math.inf if pages > 0 else total * ROUNDED


def _suffices(lacking: Mapping[str, int]) -> bool:
    return all(pages <= 0 for pages in lacking.values())


def _price(source: Source, short: Mapping[str, int]) -> float:
    """Cost per page that helps."""
    helping = sum(min(source.replica.pages, short.get(agent_id, 0)) for agent_id in source.replica.group)
    return source.cost / helping if helping else float("inf")
