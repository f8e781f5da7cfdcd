"""The published rule: foundation replicas, then burst replicas, the highest score first, over what scores less."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from services.placer import lending
from services.placer.board import Board, Room, Source, Step
from services.placer.decisions import Action, Do, Reason
from services.placer.demand import Demand, demand
from services.placer.groups import groups
from services.placer.rule import Prewarming, Price, prices
from services.placer.scores import Kind, Worth, ranked, worth, worths
from services.placer.snapshot import Agent, GroupIds, Key, Model, Replica, State
from services.placer.words import count, load, names
from warmserve.v1 import common_pb2

_MARGIN = 1.5  # what comes must be worth so much more than what goes, or each forecast would turn the two round


@dataclass(frozen=True)
class _Wanted:
    worth: Worth
    model: Model
    rank: int
    own: Replica | None  # a partly resident replica to complete; None: a new one


@dataclass(frozen=True)
class _Place:
    group: GroupIds
    room: Room


class PublishedRule:
    """See `Rule`. `lent`: what is kept of KV, if not by the published rule."""

    def __init__(self, board: Board, lent: lending.Lending | None = None) -> None:
        self._board = board
        self._lent = lent or lending.Published(board.snapshot)
        self._demands: dict[str, Demand] = {}
        self._worths: dict[Key, Worth] = {}
        for name, model in board.snapshot.models.items():
            there = board.of(name)
            serving = sum(r.state in (State.ACTIVE, State.WAKING) for r in there)
            needed = demand(model, board.snapshot.now_s, serving, board.snapshot.rules)
            self._demands[name] = needed
            self._worths |= worths(model, needed, there, board.usable)

    def demand(self, model: Model) -> Demand:
        """See `Rule`."""
        return self._demands[model.name]

    def worth(self, replica: Replica) -> Worth:
        """See `Rule`."""
        return self._worths.get(replica.key, Worth(Kind.SPARE, 0.0))

    def prices(self, agent_id: str) -> Sequence[Price]:
        """See `Rule`."""
        return prices(self._board.on((agent_id,)), self.worth)

    def urgency(self, model: Model, serving: int) -> float:
        """See `Rule`."""
        return worth(serving, model, self._demands[model.name]).score

    def loading(self, model: Model, group: GroupIds, missing: float) -> float:
        """See `Rule`."""
        return missing * model.cold_load_s

    def sharing(self, model: Model, group: GroupIds) -> float:
        """See `Rule`. Neighbours count only where all else is equal."""
        return 0.0

    def spared(self, model: Model, serving: int) -> float:
        """See `Rule`. Where instances are overloaded another one is woken, whatever it costs."""
        return math.inf

    def spread(self, model: Model) -> Collection[GroupIds]:
        """See `Rule`. Nobody is woken before instances are overloaded."""
        return ()

    def may_rest(self, model: Model, instance: Replica) -> bool:
        """See `Rule`. It always is."""
        return True

    def reserve(self, model: Model, agent: Agent) -> int:
        """See `Rule`. A fixed share."""
        return self._board.snapshot.kv_reserve(agent, self._board.snapshot.shard_pages(model, agent.id))

    def first_pages(self, model: Model, agent: Agent) -> int:
        """See `Rule`. One request's."""
        return math.ceil(model.kv_bytes_per_request / agent.page_bytes)

    def prewarm(self) -> Prewarming:
        """See `Rule`. One load at a time per agent, so that the most valuable is there first; the next plan goes on."""
        board, demands = self._board, self._demands
        actions: list[Action] = []
        obstacles: dict[str, str] = {}
        known = dict(self._worths)
        kept = {agent.id: lending.kept(agent, board.on((agent.id,)), self._lent) for agent in board.open_agents}
        for wanted in sorted(
            _wanted(board, demands), key=lambda w: (-w.worth.kind, -w.worth.score, w.model.name, w.rank)
        ):
            model = wanted.model
            place, obstacle = _place(board, wanted, known, kept)
            if place is None:
                obstacles.setdefault(model.name, obstacle)
                continue
            for replica, keep in place.room.evictions:
                actions.append(_evict(replica, keep, wanted, known))
                board.evict(replica, keep)
            actions.append(Action(Do.WARM, model.name, place.group, _reason(wanted, demands[model.name], place.group)))
            pages = max(board.snapshot.shard_pages(model, agent_id) for agent_id in place.group)
            resident = wanted.own.resident if wanted.own else 0
            board.put(Replica(model.name, place.group, State.WARMING, pages, resident))
            known[model.name, place.group] = wanted.worth
        return Prewarming(actions, obstacles)


def _wanted(board: Board, demands: Mapping[str, Demand]) -> list[_Wanted]:
    wanted = []
    for name, model in board.snapshot.models.items():
        demand = demands[name]
        existing = ranked(filter(board.usable, board.of(name)), board.usable)
        for rank in range(demand.replicas):
            own = existing[rank] if rank < len(existing) else None
            if own is None or (own.state is State.WARM and own.residency < 1):
                wanted.append(_Wanted(worth(rank, model, demand), model, rank, own))
    return wanted


def _place(
    board: Board, wanted: _Wanted, worths: Mapping[Key, Worth], kept: Mapping[str, int]
) -> tuple[_Place | None, str]:
    """The best place, or None and why there is none."""
    snapshot, model = board.snapshot, wanted.model
    if wanted.own is not None:
        possible = [wanted.own.group]
    else:
        possible = [g for g in groups(board.open_agents, model.tp) if all(r.model != model.name for r in board.on(g))]
    if not possible:
        return None, f"no further group of {count(model.tp, 'agent')} can hold another replica"
    possible = [group for group in possible if (model.name, group) not in snapshot.refused]
    if not possible:
        return None, "the last try to load it failed and will be repeated soon"
    quiet = [g for g in possible if all(r.state not in (State.WARMING, State.WAKING) for r in board.on(g))]
    if not quiet:
        return None, "it is loaded as soon as the loads in progress have ended"
    places = []
    for group in quiet:
        room = board.make_room(model, group, _sources(board, wanted, group, worths), kept=kept)
        if room is not None and room.cost * _MARGIN <= wanted.worth.score:
            places.append(_Place(group, room))
    if not places:
        return None, f"no room: everything resident is needed or worth more than its {wanted.worth.score:.2f} s"
    return min(places, key=lambda place: _rank(board, wanted, place, worths)), ""


def _sources(board: Board, wanted: _Wanted, group: GroupIds, worths: Mapping[Key, Worth]) -> list[Source]:
    """Warm replicas that score less, except those that were loaded or served a moment ago."""
    return [
        Source(replica, Step.EVICT, _score(replica, worths))
        for replica in board.on(group)
        if replica.state is State.WARM
        and replica.model != wanted.model.name
        and board.snapshot.idle_s(replica) >= board.snapshot.rules.min_stay_s
        and _score(replica, worths) * _MARGIN < wanted.worth.score
    ]


def _score(replica: Replica, worths: Mapping[Key, Worth]) -> float:
    known = worths.get(replica.key)
    return known.score if known is not None else 0.0


def _rank(board: Board, wanted: _Wanted, place: _Place, worths: Mapping[Key, Worth]) -> tuple[object, ...]:
    """Least value destroyed; then the fewest neighbours likely to be woken together with it."""
    interference = _chance(wanted.model, wanted.worth) * sum(
        _neighbour_chance(board, replica, worths)
        for replica in board.on(place.group)
        if replica.model != wanted.model.name
    )
    first = board.snapshot.agents[place.group[0]]
    return round(place.room.cost, 6), round(interference, 6), first.node, first.device_index, place.group


def _neighbour_chance(board: Board, replica: Replica, worths: Mapping[Key, Worth]) -> float:
    if replica.state in (State.ACTIVE, State.WAKING):
        return 1.0
    model = board.snapshot.models.get(replica.model)
    known = worths.get(replica.key)
    return _chance(model, known) if model and known else 0.0


def _chance(model: Model, worth_: Worth) -> float:
    """How likely a replica is needed: the score without what it saves."""
    saves = model.cold_load_s * model.priority
    return min(1.0, worth_.score / saves) if saves > 0 else 0.0


def _reason(wanted: _Wanted, demand: Demand, group: GroupIds) -> Reason:
    kind = wanted.worth.kind
    need = (
        f"mean load {load(demand.mean)} needs {count(demand.foundation, 'instance')}"
        if kind is Kind.FOUNDATION
        else f"peak load {load(demand.peak)} needs {demand.burst} more than the mean's {demand.foundation}"
    )
    what = "completing" if wanted.own else "warming"
    text = f"{need}; {what} replica {wanted.rank + 1} of {demand.replicas} on {names(group)}"
    text += f", worth {wanted.worth.score:.2f} s"
    cause = common_pb2.CAUSE_FOUNDATION if kind is Kind.FOUNDATION else common_pb2.CAUSE_BURST
    return Reason(cause, text, score=wanted.worth.score)


def _evict(replica: Replica, keep: int, wanted: _Wanted, worths: Mapping[Key, Worth]) -> Action:
    other = worths.get(replica.key, Worth(Kind.SPARE, 0.0))
    text = (
        f"{wanted.model.name} is expected to be needed: its {wanted.worth.kind.name.lower()} replica is worth "
        f"{wanted.worth.score:.2f} s, this {other.kind.name.lower()} one {other.score:.2f} s; "
        f"gives {replica.resident - keep} of {count(replica.resident, 'page')}"
    )
    reason = Reason(common_pb2.CAUSE_MADE_ROOM, text, wanted.model.name, other.score)
    return Action(Do.EVICT, replica.model, replica.group, reason, keep / replica.shard_pages if keep else 0.0)
