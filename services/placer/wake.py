"""Which group to wake a model on, and what has to give way: as little value as possible."""

from __future__ import annotations

from dataclasses import dataclass, field

from services.placer.board import Board, Room
from services.placer.decisions import Outcome, Reason, Wake
from services.placer.loading import load_s
from services.placer.offers import Needs, Offer, Search, Wish, possible
from services.placer.rule import Rule
from services.placer.snapshot import GroupIds, Model, Replica, State
from services.placer.words import count, names, share
from warmserve.v1 import common_pb2


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
    offer = Search(board, rule, model, wish).best()
    if offer is not None:
        return _decide(board, model, wish, offer)
    if wish.places is not None:
        return _impossible(wish, common_pb2.CAUSE_NO_CAPACITY, "it would cost others more")
    tried = [group for group in all_groups if possible(board, model, group)]
    usable = [group for group in tried if (model.name, group) not in snapshot.refused]
    if tried and not usable:
        text = "; ".join(f"{names(group)}: {snapshot.refused[model.name, group]}" for group in tried)
        return _impossible(wish, common_pb2.CAUSE_FAILURE, f"the last try failed and will be repeated soon: {text}")
    if not usable:
        return _impossible(wish, common_pb2.CAUSE_NO_CAPACITY, "it has a replica on every group of agents already")
    return _impossible(wish, common_pb2.CAUSE_NO_CAPACITY, _in_the_way(board, rule, model, usable))


def _decide(board: Board, model: Model, wish: Wish, offer: Offer) -> Decision:
    own, room, group = board.get(model.name, offer.group), offer.room or Room(), offer.group
    place, node = names(group), board.snapshot.agents[group[0]].node
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
        return Decision(Wake(Outcome.NOW, group, found, Reason(wish.cause, f"{wish.text}; {text}"), estimate), room)
    holding = [*room.drains, *room.awaited]
    busy = ", ".join(f"{r.model} ({count(r.running, 'request')} running)" for r in holding)
    text = f"{wish.text}; it will be woken on {place} as soon as {busy} has drained there"
    reason = Reason(common_pb2.CAUSE_WAITING_REQUESTS if wish.limit is None else wish.cause, text)
    return Decision(Wake(Outcome.AFTER_DRAIN, group, found, reason), room)


def _impossible(wish: Wish, cause: common_pb2.Cause.ValueType, text: str) -> Decision:
    return Decision(Wake(Outcome.IMPOSSIBLE, (), None, Reason(cause, f"{wish.text}; {text}")))


def _no_group(board: Board, model: Model) -> str:
    if not board.open_agents:
        return f"all {count(len(board.snapshot.agents), 'agent')} are cordoned, drained or stopping"
    return f"it needs {model.tp} agents side by side on one node, and no node has that many free to place on"


def _in_the_way(board: Board, rule: Rule, model: Model, usable: list[GroupIds]) -> str:
    """What holds the pages of the group where the fewest are lacking."""
    needs, lacking = Needs(board, rule, model), {}
    for group in usable:
        kept, first = needs.kv(group)
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
    in_state_s = board.snapshot.in_state_s(replica)
    if replica.state is State.ACTIVE and in_state_s < rules.min_stay_s:
        text += f", for {in_state_s:.1f} s of at least {rules.min_stay_s:g}"
    elif replica.state is State.ACTIVE and replica.running:
        text += f", and may be drained after {rules.max_wait_s:g} s of waiting"
    return text
