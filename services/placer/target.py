"""The layout that is to be: what is resident and stays, what is to be loaded, and what gives way."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from services.placer import lending
from services.placer.board import Board
from services.placer.groups import groups
from services.placer.layout import Agents, Item, Layout, Seat
from services.placer.search import SMALL, Search
from services.placer.snapshot import Agent, Replica, State
from services.placer.value import Stakes, serves

_EFFORT = 3_000  # places to look at
_EFFORT_SMALL = 20_000  # on so few agents that these are all looked at from many sides
_EFFORT_PER_AGENT = 20


@dataclass(frozen=True)
class Target:
    """A board's agents in order of node and device, the seats of its models, and the layout found for them."""

    agents: list[Agent]
    index: Mapping[str, int]  # of agents, by id
    seats: Mapping[str, Seat]
    layout: Layout
    search: Search
    unpinned: Mapping[str, int] = field(default_factory=dict)  # pinned replicas for which there is no room, by model

    @property
    def loads(self) -> bool:
        """Whether anything is to be loaded."""
        return any(item.used > item.seat.held.get(item.agents, 0) for item in self._items)

    @property
    def replicas(self) -> list[Replica]:
        """What is to be warm."""
        return [
            Replica(item.seat.stakes.model.name, self.ids(item.agents), State.WARM, item.pages, item.used)
            for item in self._items
        ]

    @property
    def _items(self) -> list[Item]:
        return [item for seat in self.seats.values() for item in seat.order]

    def ids(self, agents: Agents) -> tuple[str, ...]:
        """A group's agents."""
        return tuple(self.agents[agent].id for agent in agents)


def target(board: Board, stakes: Mapping[str, Stakes]) -> Target:
    """The layout to aim at from what is on the board, without changing the board."""
    snapshot = board.snapshot
    agents = sorted(board.open_agents, key=lambda agent: (agent.node, agent.device_index, agent.id))
    index = {agent.id: i for i, agent in enumerate(agents)}
    sizes = {model.tp for model in snapshot.models.values()}
    places = {
        size: [tuple(index[agent_id] for agent_id in group) for group in groups(agents, size)] for size in sorted(sizes)
    }
    lent = lending.Foreseen(snapshot, stakes)
    rules = snapshot.rules
    free = [_room(board, agent, lent) for agent in agents]
    layout = Layout(free, rules.interference, rules.margin, snapshot.now_s)
    for replica in board.all():
        if serves(replica):
            layout.serve(index[agent_id] for agent_id in replica.group if agent_id in index)
    served = {agent_id for replica in board.all() if serves(replica) for agent_id in replica.group}
    seats = {name: _seat(own, agents, served, lent) for name, own in stakes.items()}
    for model, group in snapshot.refused:
        if model in seats and all(agent_id in index for agent_id in group):
            seats[model].barred.add(tuple(index[agent_id] for agent_id in group))
    over = {size: {agent: group for group in many for agent in group} for size, many in places.items()}
    for replica in board.all():
        there = tuple(index[agent_id] for agent_id in replica.group if agent_id in index)
        seat = seats.get(replica.model)
        if seat is None:
            _take(layout, there, replica.pages)
        elif not serves(replica) and over[seat.stakes.model.tp].get(there[0] if there else -1) == there:
            _settle(layout, seat, replica, there, snapshot.idle_s(replica), rules.min_stay_s)
        else:
            seat.barred.update(
                over[seat.stakes.model.tp][agent] for agent in there if agent in over[seat.stakes.model.tp]
            )
            if not serves(replica):
                _take(layout, there, replica.pages)
    small = len(agents) <= SMALL
    effort = _EFFORT_SMALL if small else _EFFORT + _EFFORT_PER_AGENT * len(agents)
    search = Search(layout, list(seats.values()), places, rules, effort)
    unpinned = {}
    for name, seat in seats.items():
        missing = seat.stakes.model.pinned - seat.serving
        if missing > 0:
            unpinned[name] = missing - search.pin(seat, missing)
    search.run()
    return Target(agents, index, seats, layout, search, {name: n for name, n in unpinned.items() if n})


def _room(board: Board, agent: Agent, lent: lending.Lending) -> int:
    """Pages that warm replicas may have on an agent, those that are there included."""
    there = board.on((agent.id,))
    serving = sum(replica.pages for replica in there if serves(replica))
    return agent.pages_total - serving - board.promised(agent.id) - lending.kept(agent, there, lent)


def _seat(stakes: Stakes, agents: list[Agent], served: set[str], lent: lending.Lending) -> Seat:
    sizes = {agent.page_bytes for agent in agents}
    pages = {size: max(1, math.ceil(stakes.model.shard_bytes / size)) for size in sizes}
    seat = Seat(
        stakes,
        stakes.serving,
        tuple(pages[agent.page_bytes] for agent in agents),
        tuple(agent.node for agent in agents),
        next(iter(pages.values())) if len(pages) == 1 else 0,
    )
    reserves = [0 if agent.id in served else max(agent.pages_kv, lent.reserve(agent)) for agent in agents]
    if any(r and r > a.pages_total - needed for a, r, needed in zip(agents, reserves, seat.pages, strict=True)):
        seat.alone = tuple(
            reserve - max(1, agent.pages_kv, min(reserve, agent.pages_total - needed)) if reserve else 0
            for agent, reserve, needed in zip(agents, reserves, seat.pages, strict=True)
        )
    return seat


def _take(layout: Layout, agents: Agents, pages: int) -> None:
    for agent in agents:
        layout.free[agent] -= pages


def _settle(layout: Layout, seat: Seat, replica: Replica, agents: Agents, idle_s: float, min_stay_s: float) -> None:
    """Takes a replica that is there into the layout; what was used or loaded a moment ago has to stay.

    What is worth nothing is left out: it lies there until its pages are wanted.
    """
    pages = seat.pages_on(agents)
    resident = min(pages, replica.pages)
    fixed = replica.state is not State.WARM or idle_s < min_stay_s
    if resident:
        seat.held[agents] = resident
        if fixed or seat.stakes.later:
            layout.add(Item(seat, agents, pages, resident, fixed))
