"""Where instances had best lie: as many of each model as make the busiest GPU least busy in the peaks.

What a GPU has to do is the sum, over the instances on it, of the peak load that one has over what it carries. From the
instances that are there, by single steps: a model that has none gets one where least is done; then one more instance
of a model is added, or one taken away, where that relieves a GPU. The idea is MuxServe's greedy placement (Duan et al.,
ICML 2024), by peaks, begun at what is there.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.placer.groups import groups
from services.placer.snapshot import Agent, GroupIds

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
ENOUGH = 0.25  # a GPU whose peaks take no larger part of what its instances carry needs no relief


@dataclass(frozen=True)
class Load:
    """What a model's instances have to do."""

    model: str
    tp: int
    need: float  # instances that the peak would fill
    pages: Mapping[int, int]  # of an instance on one agent, KV included, by the agent's page size
    most: int  # instances; 0: no bound
    serving: frozenset[GroupIds]
    warm: frozenset[GroupIds]  # wholly resident


def assign(agents: Iterable[Agent], loads: Iterable[Load], margin: float) -> dict[str, list[GroupIds]]:
    """The groups on which instances of each model had best lie; none of a model for which there is no room.

    Each step has to make less than 1/`margin` of what a GPU has to do.
    """
    return _Assignment(list(agents), list(loads), margin).find()


class _Seat:
    """A model's places."""

    def __init__(self, load: Load, places: Sequence[GroupIds], members: Ints, pages: Ints, preference: Ints) -> None:
        self.load = load
        self.places = places
        self.members = members  # (groups, tp): indices of agents
        self.pages = pages  # (agents,): of an instance
        self.preference = preference  # (groups,): the lower the better, where as much is done
        self.at: list[int] = []  # indices of groups

    def share(self, instances: int) -> float:
        """What one of so many instances has to do."""
        return self.load.need / instances


class _Assignment:
    def __init__(self, agents: list[Agent], loads: list[Load], margin: float) -> None:
        self._margin = margin
        agents.sort(key=lambda agent: (agent.node, agent.device_index, agent.id))
        index = {agent.id: i for i, agent in enumerate(agents)}
        loads.sort(key=lambda load: (-load.need * load.tp, load.model))
        places = {size: groups(agents, size) for size in {load.tp for load in loads}}
        members = {
            size: np.array([[index[a] for a in group] for group in many], dtype=np.int64).reshape(-1, size)
            for size, many in places.items()
        }
        self._free = np.array([agent.pages_total for agent in agents], dtype=np.int64)
        self._todo: Floats = np.zeros(len(agents))
        self._on: list[list[_Seat]] = [[] for _ in agents]
        serving = {agent for load in loads for group in load.serving for agent in group}
        self._seats = []
        for load in loads:
            pages = np.array([load.pages[agent.page_bytes] for agent in agents], dtype=np.int64)
            preference = [
                0 if group in load.serving else 3 if not serving.isdisjoint(group) else 1 if group in load.warm else 2
                for group in places[load.tp]
            ]
            seat = _Seat(load, places[load.tp], members[load.tp], pages, np.array(preference, dtype=np.int64))
            self._seats.append(seat)

    def find(self) -> dict[str, list[GroupIds]]:
        for seat in self._seats:
            if (best := self._best(seat)) is not None:
                self._put(seat, best)
        heap = [(-todo, agent) for agent, todo in enumerate(self._todo.tolist())]
        heapq.heapify(heap)
        while heap:
            known, agent = heapq.heappop(heap)
            relieved = -known > self._todo[agent] + 1e-9  # by what was done for another
            if self._todo[agent] > ENOUGH and (relieved or self._add(agent)):
                heapq.heappush(heap, (-float(self._todo[agent]), agent))
        return {seat.load.model: [seat.places[at] for at in seat.at] for seat in self._seats if seat.at}

    def _add(self, agent: int) -> bool:
        """Adds an instance, elsewhere, of a model that is on an agent."""
        for seat in sorted(self._on[agent], key=lambda s: (-s.share(len(s.at)), s.load.model)):
            count = len(seat.at)
            best = self._best(seat) if not seat.load.most or count < seat.load.most else None
            if best is None or self._todo[seat.members[best]].max() > 0:
                continue
            if seat.share(count + 1) < self._todo[agent] / self._margin:
                self._put(seat, best)
                return True
        return False

    def _best(self, seat: _Seat) -> int | None:
        """The place with room where least is done; of those where it serves, or is warm, then the emptiest."""
        fits: Bools = self._free >= seat.pages
        alone = seat.members.shape[1] == 1
        members = seat.members[:, 0] if alone else seat.members
        room: Bools = np.asarray(fits[members] if alone else fits[members].all(axis=1))
        room[seat.at] = False
        candidates = np.flatnonzero(room)
        if not len(candidates):
            return None
        todo, free = self._todo[members[candidates]], self._free[members[candidates]]
        if not alone:
            todo, free = todo.max(axis=1), free.min(axis=1)
        todo, emptiest = todo.round(9), -free
        return int(candidates[np.lexsort((emptiest, seat.preference[candidates], todo))[0]])

    def _put(self, seat: _Seat, at: int) -> None:
        self._count(seat, -1)
        seat.at.append(at)
        self._free[seat.members[at]] -= seat.pages[seat.members[at]]
        for agent in seat.members[at].tolist():
            self._on[agent].append(seat)
        self._count(seat, 1)

    def _count(self, seat: _Seat, sign: int) -> None:
        if seat.at:
            self._todo[seat.members[seat.at].ravel()] += sign * seat.share(len(seat.at))
