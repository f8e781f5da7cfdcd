"""Warm replicas laid out over agents, and the value of that by `value.py`, kept up to date at each change."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from services.placer.value import CERTAIN, Stakes

Agents = tuple[int, ...]  # a group, as indices of agents


@dataclass(eq=False)
class Seat:
    """A model, and its replicas in the layout."""

    stakes: Stakes
    serving: int  # instances, which rank before
    pages: tuple[int, ...]  # of a shard, on each agent
    nodes: tuple[str, ...]  # of each agent
    even: int = 0  # pages of a shard where all agents' pages are of one size
    alone: tuple[int, ...] = ()  # further pages it may have on each agent, for it would else not even fit alone
    held: dict[Agents, int] = field(default_factory=dict)  # pages that are resident and may stay
    barred: set[Agents] = field(default_factory=set)  # groups where no replica may come
    at: dict[Agents, Item] = field(default_factory=dict)  # its replicas
    order: list[Item] = field(default_factory=list)  # the same, by rank

    @property
    def whole(self) -> int:
        """Instances and replicas that are wholly resident: the rank of the next one."""
        whole = self.serving
        for item in self.order:  # asked for so often that a sum would take a tenth of a plan
            if item.used == item.pages:
                whole += 1
        return whole

    def pages_on(self, agents: Agents) -> int:
        """Pages of a shard on a group."""
        return self.even or max(self.pages[agent] for agent in agents)


@dataclass(eq=False, slots=True)
class Item:
    """A replica in a layout. What follows `fixed` is the layout's to set."""

    seat: Seat
    agents: Agents
    pages: int  # of a whole shard
    used: int  # pages on each agent
    fixed: bool = False  # not to be taken out
    rank: int = -1
    stays: int = -1  # its rank among those that are resident already
    crowd: int = 0  # sum of the popularity of those that share an agent
    chance: float = 0.0
    worth: float = 0.0
    bonus: float = 0.0  # for staying where it is; no neighbour takes of it
    heat: float = 0.0  # sum of the chances of those that share an agent


class Layout:
    """Items on agents."""

    def __init__(self, free: list[int], interference: float, margin: float, now_s: float) -> None:
        """`free`: pages per agent that items may have. What is resident already counts `margin` times. `now_s`: Unix
        seconds."""
        self.free = free
        self.value = 0.0
        self._interference = interference
        self._margin = margin
        self._now_s = now_s
        self._on: list[list[Item]] = [[] for _ in free]
        self._instances: list[list[int]] = [[] for _ in free]
        self._num_instances = 0
        self._heat = [0.0] * len(free)  # of each agent, kept up to date

    def serve(self, agents: Iterable[int]) -> None:
        """An instance lies on these agents. To be told before items are added."""
        self._num_instances += 1
        for agent in agents:
            self._instances[agent].append(self._num_instances)
            self._heat[agent] += 1

    def add(self, item: Item) -> None:
        """Places an item."""
        near = self.on(item.agents)
        item.heat = self.heat(item.agents)
        item.crowd = CERTAIN * self._serving(item.agents) + sum(other.seat.stakes.popularity for other in near)
        item.chance = item.worth = item.bonus = 0.0
        item.rank = item.stays = -1
        for agent in item.agents:
            self.free[agent] -= item.used
            self._on[agent].append(item)
        item.seat.at[item.agents] = item
        item.seat.order.append(item)
        self._rank(item.seat)
        self._crowd(near, item.seat.stakes.popularity)

    def remove(self, item: Item) -> None:
        """Takes an item out."""
        self._set(item, 0.0, 0.0, 0.0)
        for agent in item.agents:
            self.free[agent] += item.used
            self._on[agent].remove(item)
        del item.seat.at[item.agents]
        item.seat.order.remove(item)
        self._rank(item.seat)
        self._crowd(self.on(item.agents), -item.seat.stakes.popularity)

    def on(self, agents: Iterable[int]) -> list[Item]:
        """The items on any of these agents."""
        return list(dict.fromkeys([item for agent in agents for item in self._on[agent]]))

    def room(self, agents: Agents) -> int:
        """Pages that are free on each agent of a group."""
        return self.free[agents[0]] if len(agents) == 1 else min([self.free[agent] for agent in agents])

    def room_for(self, seat: Seat, agents: Agents) -> int:
        """Pages that are free for a model's replica on each agent of a group."""
        if seat.alone:
            return min(self.free[agent] + seat.alone[agent] for agent in agents)
        return self.room(agents)

    def heat(self, agents: Agents) -> float:
        """The chances of all that lies on any of these agents, together."""
        if len(agents) == 1:
            return self._heat[agents[0]]
        return self._serving(agents) + sum(item.chance for item in self.on(agents))

    def _serving(self, agents: Agents) -> int:
        """How many instances lie on any of these agents."""
        if len(agents) == 1:
            return len(self._instances[agents[0]])
        return len({instance for agent in agents for instance in self._instances[agent]})

    def worth(self, seat: Seat, rank: int, agents: Agents, used: int) -> float:
        """An item's worth without interference, and without the bonus for what is resident.

        What has to be loaded is worth the less the later it is there within the time that the forecast speaks of.
        """
        stakes, node, pages = seat.stakes, seat.nodes[agents[0]], seat.pages_on(agents)
        held = seat.held.get(agents, 0) if seat.held else 0
        if not held:
            return stakes.worth(rank, node, used / pages) * stakes.in_time(rank, node, used / pages, self._now_s)
        held = min(used, held)
        here = stakes.worth_keeping(rank, node, held / pages)
        if used == held:
            return here
        more = stakes.worth(rank, node, used / pages) - stakes.worth(rank, node, held / pages)
        return here + more * stakes.in_time(rank, node, (used - held) / pages, self._now_s)

    def bonus(self, seat: Seat, rank: int, agents: Agents, used: int) -> float:
        """What an item counts more because a part of it is resident there."""
        held = min(used, seat.held.get(agents, 0)) if seat.held else 0
        if not held:
            return 0.0
        stakes, node, pages = seat.stakes, seat.nodes[agents[0]], seat.pages_on(agents)
        return (self._margin - 1) * stakes.worth_keeping(rank, node, held / pages)

    def gain(self, worth: float, chance: float, agents: Agents) -> float:
        """What the layout's value would grow by if an item of that worth came to lie on these agents."""
        harm = 0.0
        for item in self._on[agents[0]] if len(agents) == 1 else self.on(agents):
            heat = item.heat
            if heat < 1:
                harm += item.worth * (chance if heat + chance < 1 else 1 - heat)
        heat = self.heat(agents)
        return worth - self._interference * (worth * (heat if heat < 1 else 1.0) + harm)

    def net(self, item: Item) -> float:
        """An item's worth after interference, with its bonus."""
        heat = item.heat
        return item.bonus + item.worth * (1 - self._interference * (heat if heat < 1 else 1.0))

    def _crowd(self, near: Iterable[Item], more: int) -> None:
        """Items have another neighbour, or one less."""
        if more:
            for item in near:
                item.crowd += more
                if len(item.seat.order) > 1:
                    self._rank(item.seat)

    def _rank(self, seat: Seat) -> None:
        if len(seat.order) > 1:
            seat.order.sort(key=lambda item: (-item.used / item.pages, item.crowd, item.agents))
        stays = seat.serving
        for rank, item in enumerate(seat.order, start=seat.serving):
            if item.rank != rank or item.stays != stays:
                item.rank, item.stays = rank, stays
                worth = self.worth(seat, rank, item.agents, item.used)
                # One more replica, before it in rank, takes nothing of what staying counts.
                self._set(item, seat.stakes.chance(rank), worth, self.bonus(seat, stays, item.agents, item.used))
            stays += item.agents in seat.held

    def _set(self, item: Item, chance: float, worth: float, bonus: float) -> None:
        before = self.net(item)
        item.worth, item.bonus = worth, bonus
        self.value += self.net(item) - before
        change = chance - item.chance
        if not change:
            return
        item.chance = chance
        for agent in item.agents:
            self._heat[agent] += change
        for near in self._on[item.agents[0]] if len(item.agents) == 1 else self.on(item.agents):
            if near is not item:
                before = self.net(near)
                near.heat += change
                self.value += self.net(near) - before
