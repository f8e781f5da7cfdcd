"""Which group to wake a model on, and what has to give way: as little value as possible."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from services.placer.board import Board, Room, Source, Step
from services.placer.decisions import Outcome, Reason, Wake
from services.placer.loading import load_s
from services.placer.rule import Rule
from services.placer.snapshot import GroupIds, Model, Replica, State
from services.placer.value import serves
from services.placer.words import count, names, share
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


@dataclass(frozen=True)
class _Candidate:
    group: GroupIds
    own: Replica | None  # what the model has there
    room: Room


@dataclass(frozen=True)
class Decision:
    """A wake with the room that it needs."""

    wake: Wake
    room: Room = field(default_factory=Room)


def choose(board: Board, rule: Rule, model: Model, wish: Wish) -> Decision:
    """Where to wake `model`, without changing the board.

    Prefers, in this order: draining no busy instance; the least of value destroyed, left to load, and cost of sharing
    a GPU's time, all in seconds together; the fewest active neighbours.
    """
    snapshot = board.snapshot
    if not snapshot.agents:
        return _impossible(wish, common_pb2.CAUSE_NO_AGENT, "no agent is registered")
    all_groups = board.groups(model.tp)
    if not all_groups:
        return _impossible(wish, common_pb2.CAUSE_NO_CAPACITY, _no_group(board, model))
    best: tuple[_Rank, _Candidate] | None = None
    # What loading alone costs is quickly told, and mostly tells enough: the rest is asked only of those it leaves.
    for least, some in itertools.groupby(sorted(_loadings(board, rule, model, wish)), key=lambda place: place[0]):
        if best is not None and best[0] < (0, least):
            break
        possible = [group for _, group in some if _possible(board, model, group)]
        sharing = {group: rule.sharing(model, group) for group in possible}
        for at_least, group in sorted(
            (_rank(board, group, least, sharing[group], Room()), group) for group in possible
        ):
            if best is not None and best[0] <= at_least:
                break  # making room costs something, or nothing
            shared = sharing[group]
            if shared > wish.worth:
                continue
            kept, first = _kv(board, rule, model, group)
            room = board.make_room(model, group, _sources(board, rule, model, group, wish), kept=kept, first=first)
            if room is not None and room.cost + shared <= wish.worth and (wish.places is None or room == Room()):
                rank = _rank(board, group, least, shared, room)
                if best is None or rank < best[0]:
                    best = rank, _Candidate(group, board.get(model.name, group), room)
    if best is not None:
        return _decide(best[1], model, wish, snapshot.agents[best[1].group[0]].node)
    if wish.places is not None:
        return _impossible(wish, common_pb2.CAUSE_NO_CAPACITY, "it would cost others more")
    tried = [group for group in all_groups if _possible(board, model, group)]
    usable = [group for group in tried if (model.name, group) not in snapshot.refused]
    if tried and not usable:
        text = "; ".join(f"{names(group)}: {snapshot.refused[model.name, group]}" for group in tried)
        return _impossible(wish, common_pb2.CAUSE_FAILURE, f"the last try failed and will be repeated soon: {text}")
    if not usable:
        return _impossible(wish, common_pb2.CAUSE_NO_CAPACITY, "it has a replica on every group of agents already")
    return _impossible(wish, common_pb2.CAUSE_NO_CAPACITY, _in_the_way(board, rule, model, usable))


def _kv(board: Board, rule: Rule, model: Model, group: GroupIds) -> tuple[dict[str, int], dict[str, int]]:
    """KV pages to leave on each agent of a group in all, and of them to the model's instance."""
    agents = [board.snapshot.agents[agent_id] for agent_id in group]
    kept = {agent.id: rule.reserve(model, agent) for agent in agents}
    return kept, {agent.id: rule.first_pages(model, agent) for agent in agents}


def _possible(board: Board, model: Model, group: GroupIds) -> bool:
    """Whether no agent of the group has another replica of the model, or this one as an instance."""
    for replica in board.on(group):
        if replica.model == model.name and (
            replica.group != group or replica.state in (State.ACTIVE, State.WAKING) or not board.whole(replica)
        ):
            return False
    return True


def _sources(board: Board, rule: Rule, model: Model, group: GroupIds, wish: Wish) -> list[Source]:
    sources = []
    for replica in board.on(group):
        if replica.model == model.name:
            continue
        worth = rule.worth(replica)
        if replica.state in (State.WARM, State.WARMING):
            if wish.limit is None or worth.score < wish.limit:
                cost = worth.score + _RECENT / (1 + replica.idle_s)
                sources.append(Source(replica, Step.EVICT, cost))
        elif replica.state is State.DRAINING:
            wait = _AWAIT_BUSY_S if replica.running else 0.0
            sources.append(Source(replica, Step.AWAIT, worth.score + wait))
        elif replica.state is State.ACTIVE and wish.places is None and _may_go(board, replica):
            idle = not replica.running and not board.snapshot.models[replica.model].waiting
            if idle and (wish.limit is None or replica.idle_s >= board.snapshot.rules.max_wait_s):
                cost = worth.score + _DRAIN_IDLE_S / (1 + replica.idle_s)
                sources.append(Source(replica, Step.DRAIN, cost))
            elif wish.limit is None and model.waited_s >= board.snapshot.rules.max_wait_s:
                sources.append(Source(replica, Step.DRAIN, float(replica.running), last=True))
    return sources


def _may_go(board: Board, replica: Replica) -> bool:
    other = board.snapshot.models.get(replica.model)
    if other is None or replica.in_state_s < board.snapshot.rules.min_stay_s:
        return False
    return sum(r.state is State.ACTIVE for r in board.of(replica.model)) > other.min_replicas


def _loadings(board: Board, rule: Rule, model: Model, wish: Wish) -> Iterator[tuple[float, GroupIds]]:
    """What loading costs on each group that may be tried."""
    refused = board.snapshot.refused
    for group in board.groups(model.tp):
        if (model.name, group) not in refused and (wish.places is None or group in wish.places):
            own = board.get(model.name, group)
            missing = 1 - (own.residency if own else 0)
            yield rule.loading(model, group, missing) if missing else 0.0, group


def _rank(board: Board, group: GroupIds, loading: float, shared: float, room: Room) -> _Rank:
    neighbours = sum(map(serves, board.on(group)))
    first = board.snapshot.agents[group[0]]
    cost = room.cost + shared + loading
    return room.last_resorts, cost, neighbours, first.node, first.device_index, group


def _decide(candidate: _Candidate, model: Model, wish: Wish, node: str) -> Decision:
    own, room, place = candidate.own, candidate.room, names(candidate.group)
    found = own.state if own else None
    residency = own.residency if own else 0.0
    if room.now:
        if found is State.DRAINING:
            text = f"its draining instance on {place} goes on"
        elif own is None:
            text = f"loading it on {place}, where nothing of it is resident"
        elif found is State.WARMING:
            text = f"it is being loaded on {place} and goes on to serve"
        else:
            text = f"waking the replica on {place}, {share(residency)} resident"
        known = model.cold_load_measured or residency == 1
        estimate = (1 - residency) * load_s(model, node) if known else None
        return Decision(
            Wake(Outcome.NOW, candidate.group, found, Reason(wish.cause, f"{wish.text}; {text}"), estimate), room
        )
    holding = [*room.drains, *room.awaited]
    busy = ", ".join(f"{r.model} ({count(r.running, 'request')} running)" for r in holding)
    text = f"{wish.text}; it will be woken on {place} as soon as {busy} has drained there"
    reason = Reason(common_pb2.CAUSE_WAITING_REQUESTS if wish.limit is None else wish.cause, text)
    return Decision(Wake(Outcome.AFTER_DRAIN, candidate.group, found, reason), room)


def _impossible(wish: Wish, cause: common_pb2.Cause.ValueType, text: str) -> Decision:
    return Decision(Wake(Outcome.IMPOSSIBLE, (), None, Reason(cause, f"{wish.text}; {text}")))


def _no_group(board: Board, model: Model) -> str:
    if not board.open_agents:
        return f"all {count(len(board.snapshot.agents), 'agent')} are cordoned, drained or stopping"
    return f"it needs {model.tp} agents side by side on one node, and no node has that many free to place on"


def _in_the_way(board: Board, rule: Rule, model: Model, usable: list[GroupIds]) -> str:
    """What holds the pages of the group where the fewest are lacking."""
    lacking = {}
    for group in usable:
        kept, first = _kv(board, rule, model, group)
        lacking[group] = board.deficits(model, group, kept=kept, first=first)
    group = min(usable, key=lambda g: (max(lacking[g].values()), g))
    deficits = lacking[group]
    agent_id = max(deficits, key=lambda a: deficits[a])
    agent = board.snapshot.agents[agent_id]
    pages = board.snapshot.shard_pages(model, agent_id)
    if pages >= agent.pages_total:
        return f"it needs {pages} pages and {agent_id} has {agent.pages_total} in all, which must hold KV too"
    reserve = max(rule.reserve(model, agent), rule.first_pages(model, agent))
    holders = [_holder(board, r) for r in board.on((agent_id,)) if r.model != model.name]
    return (
        f"it needs {count(pages, 'page')} and {reserve} for KV on {agent_id}, and {deficits[agent_id]} of "
        f"{agent.pages_total} are lacking: " + (", ".join(holders) or "KV holds them")
    )


def _holder(board: Board, replica: Replica) -> str:
    rules = board.snapshot.rules
    text = f"{replica.model} is {replica.state.value} with {replica.pages}"
    if replica.state in (State.ACTIVE, State.DRAINING):
        text += f" and runs {count(replica.running, 'request')}"
    if replica.state is State.ACTIVE and replica.in_state_s < rules.min_stay_s:
        text += f", for {replica.in_state_s:.1f} s of at least {rules.min_stay_s:g}"
    elif replica.state is State.ACTIVE and replica.running:
        text += f", and may be drained after {rules.max_wait_s:g} s of waiting"
    return text
