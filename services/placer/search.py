"""Makes a layout valuable: greedily at first, then by taking parts of it out and putting them back better.

A large neighbourhood search (Shaw 1998; "ruin and recreate", Schrimpf et al. 2000) with fixed orders instead of random
ones, so that the same layout always becomes the same.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from services.placer.layout import Agents, Item, Layout, Seat
from services.placer.snapshot import Rules

_LEAST_GAIN = 1e-9  # of the value
SMALL = 8  # agents: so few are searched more thoroughly
_FEW = 8  # places that are looked at where there are many
_GUESTS = 8  # models from elsewhere that are tried when a part is put back
_SHUFFLES = 8  # further orders tried on small clusters
_VAIN = 3  # rounds
_LEFT_OUT = 0.2  # share of the models that such an order leaves out
Order = Callable[[Seat], float]  # the higher, the earlier; below 0: not at all
Way = tuple[Order, Seat | None]  # to put back what was taken out: a model that comes first, if any, then in this order


class Search:
    """One search on a layout. `effort` bounds how many places are looked at, and with it the time it takes."""

    def __init__(
        self,
        layout: Layout,
        seats: Sequence[Seat],
        places: Mapping[int, Sequence[Agents]],
        rules: Rules,
        effort: int,
    ) -> None:
        """`places`: per number of agents, the groups on which replicas of so many may lie."""
        self._layout = layout
        self._seats = seats
        self._places = places
        self._rules = rules
        self._effort = effort
        self._index = {id(seat): i for i, seat in enumerate(seats)}
        self._over = {size: {agent: group for group in groups for agent in group} for size, groups in places.items()}
        self._open: dict[int, list[Agents]] = {}  # groups with room, the coolest first, as of a while ago
        self._fresh: dict[int, int] = {}  # how often `_open` may still be used
        self._ranked: dict[int, list[Agents]] = {}  # groups, the cheapest first, as of a while ago
        self._ages: dict[int, int] = {}  # how often `_ranked` may still be used
        self._guests: list[Seat] = []
        self._tried: set[tuple[Agents | int, ...]] = set()  # areas with orders of seats that made nothing better
        self._small = len(layout.free) <= SMALL

    def run(self) -> None:
        """Fills the layout and improves it."""
        self.fill(self._seats)
        for seat in self._unplaced():
            self._force(seat)
        self._guests = self._unplaced()[:_GUESTS]
        if self._small:
            self._improve_small()
        else:
            for area in self._areas():
                self._attempt(area, [(self._density, None)])
                self._attempt(area, [(self._worth, None)])
        self.fill(self._seats)

    def _improve_small(self) -> None:
        """Goes on until some rounds of ever other orders have found nothing better."""
        vain = number = 0
        while vain < _VAIN and self._effort > 0:
            orders: list[Order] = [self._density, self._worth, self._size]
            orders += [self._shuffled(number + i) for i in range(1, _SHUFFLES + 1)]
            number += _SHUFFLES
            improved = False
            for area in self._areas():
                improved |= self._attempt(area, [(order, None) for order in orders])
                improved |= self._attempt(area, [(self._density, guest) for guest in self._unplaced()])
            vain = 0 if improved else vain + 1

    def pin(self, seat: Seat, number: int) -> int:
        """Has so many whole replicas of a model lie in the layout for good, whatever they displace; how many do."""
        layout, done = self._layout, 0
        resident = sorted(seat.held, key=lambda a: (-seat.held[a] / seat.pages_on(a), a))
        for agents in dict.fromkeys((*resident, *self._cheapest(seat))):
            own, pages = seat.at.get(agents), seat.pages_on(agents)
            if done == number:
                break
            if agents in seat.barred and seat.held.get(agents, 0) < pages:
                continue  # the last try to load it there failed
            if own is not None and own.fixed:
                done += own.used == pages and agents in seat.held
                continue
            movable = [item for item in layout.on(agents) if not item.fixed]
            for item in movable:
                layout.remove(item)
            if layout.room_for(seat, agents) < pages:
                for item in movable:
                    layout.add(item)
                continue
            layout.add(Item(seat, agents, pages, pages, fixed=True))
            self._keep(movable)
            done += 1
        return done

    def wants(self, seat: Seat) -> bool:
        """Whether one more whole replica would be warmed if there were room."""
        rank, model = seat.whole, seat.stakes.model
        if model.max_replicas and rank >= model.max_replicas:
            return False
        return seat.stakes.chance(rank) >= self._rules.least_chance and self._worth(seat) > 0

    def fill(self, seats: Iterable[Seat]) -> None:
        """Adds what fits, the most valuable per page first."""
        queue = [(-self._density(seat), self._index[id(seat)]) for seat in seats if self.wants(seat)]
        heapq.heapify(queue)
        while queue:
            index = heapq.heappop(queue)[1]
            seat = self._seats[index]
            placed = self._complete(seat) or self._place(seat, self._coolest(seat)) is not None
            if placed and self.wants(seat):
                heapq.heappush(queue, (-self._density(seat), index))

    def _complete(self, seat: Seat) -> bool:
        """Makes a partly resident replica whole, if there is room."""
        for item in seat.order:
            missing, room = item.pages - item.used, self._layout.room_for(seat, item.agents)
            if missing and room >= missing and item.agents not in seat.barred:
                self._layout.remove(item)
                self._layout.add(Item(seat, item.agents, item.pages, item.pages, item.fixed))
                return True
        return False

    def _place(self, seat: Seat, places: Iterable[Agents]) -> Item | None:
        """Adds a replica at the best of these places; None where none gains anything."""
        layout, wants, whole = self._layout, self.wants(seat), seat.whole
        at, barred, held_on, even = seat.at, seat.barred, seat.held, seat.even
        free, alone = layout.free, bool(seat.alone)
        best: tuple[float, int] | None = None
        choice: Item | None = None
        for agents in places:
            self._effort -= 1
            if agents in at or agents in barred:
                continue
            room = free[agents[0]] if len(agents) == 1 and not alone else layout.room_for(seat, agents)
            pages = even or seat.pages_on(agents)
            if wants and room >= pages:
                used = pages
            elif 0 < (held := held_on.get(agents, 0)) <= room:
                used = held
            else:
                continue
            rank = whole
            if used < pages:
                rank += sum(used / pages <= item.used / item.pages < 1 for item in seat.order)
            gain = layout.gain(layout.worth(seat, rank, agents, used), seat.stakes.chance(rank), agents)
            gain += layout.bonus(seat, rank, agents, used)
            rating = (gain, -room)  # of equal ones the fullest, so that large rooms stay
            if gain > 0 and (best is None or rating > best):
                best, choice = rating, Item(seat, agents, pages, used)
        if choice is None:
            return None
        before = layout.value
        layout.add(choice)
        if layout.value <= before:  # the gain did not know that others of its model change their rank
            layout.remove(choice)
            return None
        return choice

    def _coolest(self, seat: Seat) -> list[Agents]:
        """Places with room for a replica; where there are many, some where little is likely to be woken."""
        size = seat.stakes.model.tp
        everywhere = self._places.get(size, ())
        if len(everywhere) <= 2 * _FEW:
            return list(everywhere)
        if self._fresh.get(size, 0) <= 0:
            self._refresh(size)
        self._fresh[size] -= 1
        found: list[Agents] = []
        looked = 0
        for agents in self._open[size]:
            looked += 1
            if self._layout.room_for(seat, agents) >= seat.pages_on(agents) and agents not in seat.at:
                found.append(agents)
                if len(found) == _FEW:
                    break
        self._effort -= looked // 4
        return found

    def _refresh(self, size: int) -> None:
        """Looks anew for groups with room for any model, and puts the coolest first."""
        seats = [seat for seat in self._seats if seat.stakes.model.tp == size and self.wants(seat)]
        room, heat = self._layout.room, self._layout.heat
        groups = self._places[size]
        if seats and groups:
            least = min(seat.pages_on(groups[0]) - max(seat.alone, default=0) for seat in seats)
            self._open[size] = sorted((agents for agents in groups if room(agents) >= least), key=heat)
        else:
            self._open[size] = []
        self._fresh[size] = 1 + len(groups) // 16
        self._effort -= len(groups) // 4

    def _unplaced(self) -> list[Seat]:
        """Models that would have one more replica, the most valuable per page first."""
        return sorted(filter(self.wants, self._seats), key=lambda s: (-self._density(s), self._index[id(s)]))

    def _force(self, seat: Seat) -> None:
        """Tries to put a replica where the least has to go for it."""
        for agents in itertools.islice(self._cheapest(seat), _FEW // 2):
            if agents not in seat.at and self._attempt(agents, [(self._density, seat)]):
                return

    def _cheapest(self, seat: Seat) -> Iterator[Agents]:
        """All places of a model, that first where the least value lies; as of a while ago where there are many."""
        size = seat.stakes.model.tp
        if self._ages.get(size, 0) <= 0:
            self._ranked[size] = sorted(self._places.get(size, ()), key=self.displaced)
            self._ages[size] = len(self._ranked[size]) // 16
            self._effort -= len(self._ranked[size]) // 2
        self._ages[size] -= 1
        return (agents for agents in self._ranked[size] if agents not in seat.barred)

    def cheapest(self, seat: Seat) -> Agents | None:
        """Where one more replica of a model would displace the least; None where it may lie nowhere else."""
        return next((agents for agents in self._cheapest(seat) if agents not in seat.at), None)

    def displaced(self, agents: Agents) -> float:
        """The value of what lies on a group."""
        return sum(self._layout.net(item) for item in self._layout.on(agents))

    def _areas(self) -> list[Agents]:
        """Parts to take out, from small to large."""
        num_agents = len(self._layout.free)
        areas: list[Agents] = [(agent,) for agent in range(num_agents)]
        if self._small:
            areas += [(i, j) for i in range(num_agents) for j in range(i + 1, num_agents)]
        areas += [
            group for size in sorted(self._places) if size > (2 if self._small else 1) for group in self._places[size]
        ]
        if self._small:
            areas.append(tuple(range(num_agents)))
        return areas

    def _attempt(self, area: Agents, ways: list[Way]) -> bool:
        """Takes out what lies on an area and puts it back in other ways; whether one of them is better."""
        improved = False
        while ways and self._effort > 0:
            layout, before = self._layout, self._layout.value
            removed = [item for item in layout.on(area) if not item.fixed]
            for item in removed:
                layout.remove(item)
            done = self._first_better(area, removed, ways, before)
            if not done:
                for item in removed:
                    layout.add(item)
                layout.value = before  # as it was, to the last digit
                break
            improved, ways = True, ways[done:]
            self._guests = self._unplaced()[:_GUESTS]
            self._tried.clear()
        return improved

    def _first_better(self, area: Agents, removed: list[Item], ways: list[Way], before: float) -> int:
        """Puts back what was taken out in the first way that makes the layout worth more than `before`.

        Returns how many ways were looked at, 0 where none is better: then nothing is put back.
        """
        layout, emptied = self._layout, self._layout.value
        touched = {agent for item in removed for agent in item.agents}.union(area)
        there = [item.seat for item in removed]
        present = {id(seat) for seat in there}
        there += [seat for seat in self._guests if id(seat) not in present and self.wants(seat)]
        for number, (order, guest) in enumerate(ways, start=1):
            ratings = [(-order(seat), self._index[id(seat)]) for seat in there]
            indices = [index for rating, index in sorted(ratings) if rating <= 0]
            if guest is not None:
                indices.insert(0, self._index[id(guest)])
            if (area, *indices) in self._tried:
                continue
            self._tried.add((area, *indices))
            seats = [self._seats[index] for index in indices]
            added = [new for seat in seats if (new := self._place(seat, self._around(seat, touched))) is not None]
            added += self._keep(removed)
            if layout.value > before + _LEAST_GAIN * (1 + abs(before)):
                return number
            for item in reversed(added):
                layout.remove(item)
            layout.value = emptied
        return 0

    def _around(self, seat: Seat, touched: Iterable[int]) -> list[Agents]:
        """The places over some agents, and a few elsewhere."""
        over = self._over.get(seat.stakes.model.tp, {})
        near = {over[agent]: None for agent in sorted(touched) if agent in over}
        return list(near | dict.fromkeys(self._coolest(seat)))

    def _keep(self, removed: Iterable[Item]) -> list[Item]:
        """Leaves what is resident where it is, as far as there is room: of each removed replica its first pages."""
        kept = []
        by_worth = sorted(removed, key=lambda item: (-self._density(item.seat), item.agents))
        for item in by_worth:
            used = min(item.seat.held.get(item.agents, 0), self._layout.room_for(item.seat, item.agents))
            if used > 0 and item.agents not in item.seat.at:
                left, before = Item(item.seat, item.agents, item.pages, used), self._layout.value
                self._layout.add(left)
                if self._layout.value < before:  # it would be woken beside what is worth more
                    self._layout.remove(left)
                else:
                    kept.append(left)
        return kept

    # Orders

    def _worth(self, seat: Seat) -> float:
        return seat.stakes.worth(seat.whole, "", 1.0)

    def _size(self, seat: Seat) -> float:
        return (seat.even or max(seat.pages, default=0)) * seat.stakes.model.tp

    def _density(self, seat: Seat) -> float:
        return self._worth(seat) / max(1, self._size(seat))

    def _shuffled(self, number: int) -> Order:
        """By density, each model's changed by a factor of its own; some models are left out."""

        def order(seat: Seat) -> float:
            mixed = (self._index[id(seat)] * 7919 + number * 104729) * 2654435761 % 2**32 / 2**32
            return self._density(seat) * 4**mixed if mixed > _LEFT_OUT else -1.0

        return order
