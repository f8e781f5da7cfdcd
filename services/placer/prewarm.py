"""From the layout that is to be to the loads and evictions that can begin now."""

from __future__ import annotations

from collections import defaultdict

from services.placer.board import Board
from services.placer.decisions import Action, Competitor, Do, Reason
from services.placer.groups import groups
from services.placer.layout import Agents, Item, Seat
from services.placer.loading import load_bytes_per_s, load_s
from services.placer.rule import Prewarming
from services.placer.scores import PINNED_S, Kind
from services.placer.snapshot import Replica, State
from services.placer.target import Target
from services.placer.value import Stakes
from services.placer.words import chance, count, load, names
from warmserve.v1 import common_pb2


def prewarm(board: Board, aim: Target) -> Prewarming:
    """Actions that lead towards a layout, carried out on the board; and why there are not more.

    One load at a time per agent, and per node as many as its bound on copying allows, the most valuable first; the
    next plan goes on. Of what gives way only as many pages go as are needed now.
    """
    return _Prewarmer(board, aim).prewarm()


class _Prewarmer:
    def __init__(self, board: Board, aim: Target) -> None:
        self._board = board
        self._aim = aim
        self._actions: list[Action] = []
        self._competitors: defaultdict[str, dict[tuple[str, bool], Competitor]] = defaultdict(dict)
        self._loading = {a for r in board.all() if r.state in (State.WARMING, State.WAKING) for a in r.group}
        self._copied = self._copies_in_progress()
        # Pages free now: the layout's, with everything in place that it lets go or has yet to load.
        self._free = list(aim.layout.free)
        for seat in aim.seats.values():
            for agents in seat.held.keys() | seat.at.keys():
                item = seat.at.get(agents)
                for agent in agents:
                    self._free[agent] += (item.used if item else 0) - seat.held.get(agents, 0)

    def prewarm(self) -> Prewarming:
        wanted = [i for s in self._aim.seats.values() for i in s.order if i.used > i.seat.held.get(i.agents, 0)]
        wanted.sort(key=lambda i: (not i.fixed, -self._net(i) / (i.pages * len(i.agents)), i.seat.stakes.model.name))
        waiting = {item.seat.stakes.model.name for item in wanted if not self._begin(item)}
        obstacles = {}
        for name, seat in self._aim.seats.items():
            if name in self._aim.unpinned:
                missing, pinned = self._aim.unpinned[name], seat.stakes.model.pinned
                obstacles[name] = (
                    f"of its {count(pinned, 'pinned replica')} {missing} cannot be placed: {self._no_room(seat)}"
                )
            elif name in waiting:
                obstacles[name] = "it is loaded as soon as the loads in progress have ended"
            elif self._aim.search.wants(seat):
                obstacles[name] = self._obstacle(seat)
        order = {
            name: tuple(sorted(many.values(), key=lambda c: (-c.score, c.model, c.won)))
            for name, many in self._competitors.items()
        }
        return Prewarming(self._actions, obstacles, order)

    def _copies_in_progress(self) -> defaultdict[str, float]:
        copied: defaultdict[str, float] = defaultdict(float)
        for replica in self._board.all():
            seat = self._aim.seats.get(replica.model)
            agent = self._board.snapshot.agents.get(replica.group[0])
            if replica.state in (State.WARMING, State.WAKING) and seat is not None and agent is not None:
                copied[agent.node] += self._rate(seat.stakes, agent.node)
        return copied

    def _rate(self, stakes: Stakes, node: str) -> float:
        return load_bytes_per_s(stakes.model, load_s(stakes.model, node))

    def _begin(self, item: Item) -> bool:
        """Begins to load an item; False where it has to wait."""
        group, node = self._aim.ids(item.agents), item.seat.nodes[item.agents[0]]
        model, held = item.seat.stakes.model, item.seat.held.get(item.agents, 0)
        if not self._loading.isdisjoint(group):
            return False
        shared = self._board.snapshot.nodes.get(node)
        rate = self._rate(item.seat.stakes, node)
        bound = shared.copy_bytes_per_s if shared is not None else 0.0
        if bound and self._copied[node] and self._copied[node] + rate > bound:
            return False
        evictions = self._make_room(item)
        if evictions is None:
            return False
        for replica, keep in evictions:
            self._evict(replica, keep, item)
        self._actions.append(Action(Do.WARM, model.name, group, self._reason(item)))
        self._board.put(Replica(model.name, group, State.WARMING, item.pages, held))
        self._loading.update(group)
        self._copied[node] += rate
        for agent in item.agents:
            self._free[agent] -= item.used - held
        return True

    def _make_room(self, item: Item) -> list[tuple[Replica, int]] | None:
        """What has to give way on an item's agents, with the pages each keeps; None where it does not suffice yet.

        Also where there is room: what the layout has dropped might be woken beside the item.
        """
        held = item.seat.held.get(item.agents, 0)
        alone = item.seat.alone or (0,) * len(self._free)
        short = {agent: item.used - held - self._free[agent] - alone[agent] for agent in item.agents}
        found = []
        for replica in self._board.on(self._aim.ids(item.agents)):
            seat = self._aim.seats.get(replica.model)
            if replica.state is not State.WARM or seat is None or seat is item.seat:
                continue
            if not self._aim.index.keys() >= set(replica.group):  # a part of it lies where nothing is changed
                continue
            agents = tuple(self._aim.index[agent_id] for agent_id in replica.group)
            left = seat.at.get(agents)
            stays = min(left.used, replica.resident) if left is not None else 0
            if stays < replica.resident:
                harms = left is None and seat.stakes.popularity > 0  # else some of it would have been left
                found.append((self._worth_of(replica), replica, agents, stays, harms))
        evictions = []
        for _, replica, agents, stays, harms in sorted(found, key=lambda f: (f[0], f[1].key)):
            needed = max((short[agent] for agent in agents if agent in short), default=0)
            if needed <= 0 and not harms:
                continue
            keep = 0 if harms else max(stays, replica.resident - needed)
            evictions.append((replica, keep))
            for agent in agents:
                if agent in short:
                    short[agent] -= replica.resident - keep
        return evictions if max(short.values()) <= 0 else None

    def _evict(self, replica: Replica, keep: int, item: Item) -> None:
        gone, model = self._aim.seats[replica.model], item.seat.stakes.model
        agents = tuple(self._aim.index[agent_id] for agent_id in replica.group)
        for agent in agents:
            self._free[agent] += replica.resident - keep
        gone.held[agents] = keep
        score, net = self._worth_of(replica), self._net(item)
        why = "is pinned" if item.fixed else f"is expected to be needed: its replica is worth {net:.2f} s"
        text = (
            f"{model.name} {why}, this one {score:.2f} s; gives {replica.resident - keep} of "
            f"{count(replica.resident, 'page')}"
        )
        reason = Reason(common_pb2.CAUSE_MADE_ROOM, text, model.name, score)
        left = keep / replica.shard_pages if keep else 0.0
        self._actions.append(Action(Do.EVICT, replica.model, replica.group, reason, left))
        self._board.evict(replica, keep)
        self._compete(model.name, net, replica.model, score, item.agents)

    def _worth_of(self, replica: Replica) -> float:
        """What a warm replica is worth where it is."""
        seat = self._aim.seats[replica.model]
        agents = tuple(self._aim.index[agent_id] for agent_id in replica.group)
        item = seat.at.get(agents)
        rank = seat.order.index(item) + seat.serving if item is not None else seat.whole
        return seat.stakes.worth_keeping(rank, seat.nodes[agents[0]], replica.residency)

    def _net(self, item: Item) -> float:
        """An item's worth after interference, without what the search adds for what is resident already."""
        seat = item.seat
        rank = seat.order.index(item) + seat.serving
        worth = seat.stakes.worth(rank, seat.nodes[item.agents[0]], item.used / item.pages)
        return worth * (1 - self._board.snapshot.rules.interference * min(1.0, item.heat))

    def _reason(self, item: Item) -> Reason:
        seat, stakes = item.seat, item.seat.stakes
        rank, group = seat.order.index(item) + seat.serving, self._aim.ids(item.agents)
        needed, kind, net = stakes.demand, stakes.kind(rank), self._net(item)
        what = "completing" if seat.held.get(item.agents) else "warming"
        text = f"{what} replica {rank + 1} on {names(group)}"
        if item.fixed:
            pinned = stakes.model.pinned
            told = f"{count(pinned, 'replica')} of it are pinned; {text}"
            return Reason(common_pb2.CAUSE_OPERATOR, told, score=net + PINNED_S)
        if kind is Kind.FOUNDATION:
            need = f"mean load {load(needed.mean)} needs {count(needed.foundation, 'instance')}"
        elif kind is Kind.BURST:
            need = f"peak load {load(needed.peak)} needs {needed.burst} more than the mean's {needed.foundation}"
        else:
            need = f"the load may exceed its peak of {load(needed.peak)}"
        text = f"{need}; {text}, needed with a chance of {chance(stakes.chance(rank))}, worth {net:.2f} s"
        cause = common_pb2.CAUSE_FOUNDATION if kind is Kind.FOUNDATION else common_pb2.CAUSE_BURST
        return Reason(cause, text, score=net)

    # Why there is not more

    def _obstacle(self, seat: Seat) -> str:
        model = seat.stakes.model
        agents = self._aim.search.cheapest(seat)
        if agents is None:
            if any(name == model.name for name, _ in self._board.snapshot.refused):
                return "the last try to load it failed and will be repeated soon"
            return f"no further group of {count(model.tp, 'agent')} can hold another replica"
        score = seat.stakes.worth(seat.whole, seat.nodes[agents[0]], 1.0)
        for item in self._aim.layout.on(agents):
            self._compete(item.seat.stakes.model.name, self._net(item), model.name, score, agents)
        return self._no_room(seat)

    def _no_room(self, seat: Seat) -> str:
        model, snapshot = seat.stakes.model, self._board.snapshot
        possible, size = groups(self._aim.agents, model.tp), count(model.tp, "agent")
        if not possible:
            return f"no node has {size} side by side that take something new"
        if all(any(snapshot.shard_pages(model, a) >= snapshot.agents[a].pages_total for a in g) for g in possible):
            most = max(min(snapshot.agents[a].pages_total - 1 for a in group) for group in possible)
            return (
                f"no group of {size} is large enough: it needs {max(seat.pages)} pages on each, and {most} hold weights"
            )
        score = seat.stakes.worth(seat.whole, "", 1.0)
        return f"no room: everything resident is needed or worth more than its {score:.2f} s"

    def _compete(self, winner: str, winners: float, loser: str, losers: float, agents: Agents) -> None:
        group = self._aim.ids(agents)
        for teller, other, won, score in ((winner, loser, True, losers), (loser, winner, False, winners)):
            known = self._competitors[teller].get((other, won))
            if known is None or known.score < score:
                self._competitors[teller][other, won] = Competitor(other, won, score, group)
