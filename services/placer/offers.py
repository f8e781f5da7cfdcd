"""The groups on which a model may be woken, and the one on which that costs the least."""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from services.placer.board import ROUNDED, Board, Room, Source, Step
from services.placer.rule import Rule
from services.placer.snapshot import Agent, GroupIds, Model, Replica, State
from services.placer.value import serves
from warmserve.v1 import common_pb2

# Seconds that evicting a replica that was used a moment ago costs more than one long unused, all else being equal.
_RECENT = 1e-6
# Seconds that getting at an instance's pages costs besides what they are worth: of one that was used a moment ago, for
# it will be used again; of one that has to finish requests.
_DRAIN_IDLE_S = 1.0
_AWAIT_BUSY_S = 1.0


@dataclass(frozen=True)
class Wish:
    """Why a model wants an instance, and what may give way to it."""

    cause: common_pb2.Cause.ValueType
    text: str
    limit: float | None = None  # of a further instance, its score: only what scores less is evicted for it, and only
    # instances that have long been idle drain
    worth: float = math.inf  # of a further one: what it spares requests; where sharing costs more, it is not woken
    places: Collection[GroupIds] | None = None  # of one that only spreads what others carry: where it may lie, if there
    # is room


_Rank = tuple[int, float, int, str, int, GroupIds]


class _Unseen(NamedTuple):
    """Groups of a node that have not been looked at, on each of which loading costs the same."""

    rank: _Rank  # before that of each of them
    loading: float
    groups: Sequence[GroupIds]


class Offer(NamedTuple):
    """A group, and what waking the model there costs, as far as that has been looked at."""

    rank: _Rank  # at least; exactly once `room` is known
    loading: float
    sharing: float
    sources: list[Source]
    room: Room | None = None

    @property
    def group(self) -> GroupIds:
        return self.rank[-1]


class Search:
    """The search for the group on which waking a model costs the least."""

    def __init__(self, board: Board, rule: Rule, model: Model, wish: Wish) -> None:
        self._board = board
        self._rule = rule
        self._model = model
        self._wish = wish
        self._own = board.of(model.name)
        self._needs = Needs(board, rule, model)

    def best(self) -> Offer | None:
        """The offer of the least rank: only what could still be the best one is looked at more closely."""
        offers: list[_Unseen | Offer] = list(self._unseen())
        heapq.heapify(offers)
        while offers:
            offer = heapq.heappop(offers)
            if isinstance(offer, _Unseen):
                if len(offer.groups) > 1:
                    for group in offer.groups:
                        heapq.heappush(offers, self._priced(group, offer.loading))
                elif (seen := self._look_at(offer.groups[0], offer.loading)) is not None:
                    heapq.heappush(offers, seen)
            elif offer.room is not None:
                return offer
            elif (closer := self._make_room(offer)) is not None:
                heapq.heappush(offers, closer)
        return None

    def _unseen(self) -> Iterable[_Unseen]:
        """All groups that may be tried. What loading costs is the same all over a node, where nothing is resident."""
        agents, model = self._board.snapshot.agents, self._model
        own = {replica.group: replica for replica in self._own}
        for node, there in self._board.groups_by_node(model.tp).items():
            groups = [group for group in there if self._may_try(group)] if self._restricted else there
            if own:
                for group in own.keys() & groups:
                    missing = 1 - own[group].residency
                    loading = self._rule.loading(model, group, missing) if missing else 0.0
                    yield _Unseen((0, loading, 0, node, agents[group[0]].device_index, group), loading, (group,))
                groups = [group for group in groups if group not in own]
            if groups:
                loading = self._rule.loading(model, groups[0], 1)
                yield _Unseen((0, loading, 0, node, -1, ()), loading, groups)

    @property
    def _restricted(self) -> bool:
        return bool(self._board.snapshot.refused) or self._wish.places is not None

    def _may_try(self, group: GroupIds) -> bool:
        places = self._wish.places
        return (self._model.name, group) not in self._board.snapshot.refused and (places is None or group in places)

    def _priced(self, group: GroupIds, loading: float) -> _Unseen:
        """A group of which nothing is known but what making room costs there at least, and who serves there."""
        board, agents, least, neighbours = self._board, self._board.snapshot.agents, 0.0, 0
        for agent_id in group:
            agent, shelf = agents[agent_id], board.shelves.on(agent_id)
            lacking = board.lacking(agent, *self._needs.of(agent)) - shelf.kv_pages
            if lacking > 0:
                least = max(least, self._least(agent_id, lacking))
            neighbours = max(neighbours, shelf.serving)
        first = agents[group[0]]
        return _Unseen((0, least + loading, neighbours, first.node, first.device_index, group), loading, (group,))

    def _least(self, agent_id: str, pages: int) -> float:
        """At most what freeing so many pages costs, and just that where one eviction is enough."""
        now_s, least = self._board.snapshot.now_s, math.inf
        for score, used_s, most in self._rule.prices(agent_id):
            cost = score + _RECENT / (1 + max(0.0, now_s - used_s))
            cost *= 1 - (most - pages) / most if most >= pages else ROUNDED
            if cost < least:
                least = cost
        return least

    def _look_at(self, group: GroupIds, loading: float) -> Offer | None:
        """The offer of a group with what may give way there; None where it cannot be."""
        board, model = self._board, self._model
        if self._own and not possible(board, model, group):
            return None
        sharing, neighbours, there = 0.0, 0, board.on(group)
        if not board.calm(group):
            sharing, neighbours = self._rule.sharing(model, group), sum(map(serves, there))
            if sharing > self._wish.worth:
                return None
        sources = self._sources(there)
        kept, first = self._needs.kv(group)
        least = board.least_cost(model, group, sources, kept=kept, first=first)
        if least == math.inf:
            return None
        agent = board.snapshot.agents[group[0]]
        rank = (0, least + sharing + loading, neighbours, agent.node, agent.device_index, group)
        return Offer(rank, loading, sharing, sources)

    def _make_room(self, offer: Offer) -> Offer | None:
        """The offer with the room that is made there; None where there is none, or it is too dear."""
        wish, (kept, first) = self._wish, self._needs.kv(offer.group)
        room = self._board.make_room(self._model, offer.group, offer.sources, kept=kept, first=first)
        if room is None or room.cost + offer.sharing > wish.worth or (wish.places is not None and room != Room()):
            return None
        cost = room.cost + offer.sharing + offer.loading
        return offer._replace(rank=(room.last_resorts, cost, *offer.rank[2:]), room=room)

    def _sources(self, there: Iterable[Replica]) -> list[Source]:
        board, model, wish, snapshot = self._board, self._model, self._wish, self._board.snapshot
        worth, sources = self._rule.worth, []
        for replica in there:
            if replica.model == model.name:
                continue
            score, state = worth(replica).score, replica.state
            if state is State.WARM or state is State.WARMING:
                if wish.limit is None or score < wish.limit:
                    sources.append(Source(replica, Step.EVICT, score + _RECENT / (1 + snapshot.idle_s(replica))))
            elif state is State.DRAINING:
                sources.append(Source(replica, Step.AWAIT, score + (_AWAIT_BUSY_S if replica.running else 0.0)))
            elif state is State.ACTIVE and wish.places is None and _may_go(board, replica):
                idle = not replica.running and not snapshot.models[replica.model].waiting
                if idle and (wish.limit is None or snapshot.idle_s(replica) >= snapshot.rules.max_wait_s):
                    cost = score + _DRAIN_IDLE_S / (1 + snapshot.idle_s(replica))
                    sources.append(Source(replica, Step.DRAIN, cost))
                elif wish.limit is None and model.waited_s >= snapshot.rules.max_wait_s:
                    sources.append(Source(replica, Step.DRAIN, float(replica.running), last=True))
        return sources


class Needs:
    """Pages that a model's instance needs on agents, told once for all agents of a size: most are of one."""

    def __init__(self, board: Board, rule: Rule, model: Model) -> None:
        self._snapshot = board.snapshot
        self._rule = rule
        self._model = model
        self._by_size: dict[tuple[int, int], tuple[int, int, int]] = {}

    def of(self, agent: Agent) -> tuple[int, int, int]:
        """Of weights; of KV to leave on the agent in all; and of these for the instance."""
        size, rule, model = (agent.page_bytes, agent.pages_total), self._rule, self._model
        found = self._by_size.get(size)
        if found is None:
            pages = self._snapshot.shard_pages(model, agent.id)
            found = self._by_size[size] = pages, rule.reserve(model, agent), rule.first_pages(model, agent)
        return found

    def kv(self, group: GroupIds) -> tuple[dict[str, int], dict[str, int]]:
        """Those of KV by agent: in all, and for the instance."""
        kept, first = {}, {}
        for agent_id in group:
            _, kept[agent_id], first[agent_id] = self.of(self._snapshot.agents[agent_id])
        return kept, first


def possible(board: Board, model: Model, group: GroupIds) -> bool:
    """Whether no agent of the group has another replica of the model, or this one as an instance."""
    for replica in board.of(model.name):
        if replica.group == group:
            if replica.state in (State.ACTIVE, State.WAKING) or not board.whole(replica):
                return False
        elif not set(replica.group).isdisjoint(group):
            return False
    return True


def _may_go(board: Board, replica: Replica) -> bool:
    other = board.snapshot.models.get(replica.model)
    if other is None or board.snapshot.in_state_s(replica) < board.snapshot.rules.min_stay_s:
        return False
    return sum(r.state is State.ACTIVE for r in board.of(replica.model)) > other.min_replicas
