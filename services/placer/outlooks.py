"""A model's part in a plan, in words: the answer to "why is my model cold?"."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from services.placer.board import Board
from services.placer.decisions import Outcome, Outlook, Reason, Wake
from services.placer.demand import Demand
from services.placer.rule import Prewarming, Rule
from services.placer.snapshot import Model, Replica, State
from services.placer.value import serves
from services.placer.words import count, load, names, share
from warmserve.v1 import common_pb2


def outlook(board: Board, rule: Rule, model: Model, wake: Wake | None, prewarming: Prewarming) -> Outlook:
    """The outlook of a model, the plan being carried out on the board."""
    needed = rule.demand(model)
    replicas = board.of(model.name)
    active = board.snapshot.active.get(model.name, 0)
    warm = sum(r.state in (State.WARM, State.WARMING) for r in replicas)
    if wake is not None and (wake.outcome is Outcome.NOW or not any(map(serves, replicas))):
        reason = wake.reason
    else:  # a wake is of a further instance
        obstacle = wake.reason.text if wake is not None else prewarming.obstacles.get(model.name, "")
        cause = _cause(board, model, needed, replicas, obstacle)
        reason = Reason(cause, _sentence(model, needed, replicas, obstacle))
    score = max((rule.worth(replica).score for replica in replicas), default=0.0)
    return Outlook(
        model.name,
        needed.foundation,
        needed.burst,
        active,
        warm,
        replace(reason, score=score),
        prewarming.competitors.get(model.name, ()),
    )


def _cause(
    board: Board, model: Model, needed: Demand, replicas: Sequence[Replica], obstacle: str
) -> common_pb2.Cause.ValueType:
    if not replicas and not board.snapshot.agents:
        return common_pb2.CAUSE_NO_AGENT
    if not replicas and obstacle:
        return common_pb2.CAUSE_NO_CAPACITY
    if any(replica.state is State.WAKING for replica in replicas):
        return common_pb2.CAUSE_WAITING_REQUESTS
    if _held_down(model, needed):
        return common_pb2.CAUSE_OPERATOR
    if needed.foundation:
        return common_pb2.CAUSE_FOUNDATION
    if needed.burst:
        return common_pb2.CAUSE_BURST
    return common_pb2.CAUSE_OPERATOR if model.min_replicas or model.pinned else common_pb2.CAUSE_NOT_NEEDED


def _held_down(model: Model, needed: Demand) -> bool:
    """Whether only its maximum keeps a model from more instances."""
    return 0 < model.max_replicas < needed.unbounded


def _bounds(model: Model, needed: Demand) -> list[str]:
    """What the operator has said of a model."""
    told = []
    if _held_down(model, needed):
        told.append(f"it would have {needed.unbounded}, but its maximum is {model.max_replicas}")
    if model.min_replicas:
        told.append(f"its minimum is {model.min_replicas}")
    if model.pinned:
        told.append(f"{model.pinned} pinned")
    return told


def _sentence(model: Model, needed: Demand, replicas: Sequence[Replica], obstacle: str) -> str:
    if not needed.expected.known:
        need = needed.expected.problem or "there is no forecast yet"
    elif not needed.replicas:
        need = f"mean load {load(needed.mean)} and peak {load(needed.peak)} need no instance"
    else:
        need = f"mean load {load(needed.mean)} needs {count(needed.foundation, 'instance')}"
        if needed.burst:
            need += f", peak {load(needed.peak)} needs {needed.burst} more"
    if needed.expected.known and needed.expected.problem:
        need = f"{needed.expected.problem}; {need}"
    have = ", ".join(_stands(replica) for replica in replicas) or "nothing is resident"
    return "; ".join([need, *_bounds(model, needed), have, *([obstacle] if obstacle else [])])


def _stands(replica: Replica) -> str:
    """ "1 is warm on g0"."""
    state = replica.state.value
    if replica.state is State.WARM and replica.residency < 1:
        state += f" ({share(replica.residency)} resident)"
    elif replica.state is State.ACTIVE:
        state += f" ({replica.running} running)"
    elif replica.state is State.WAKING:
        state = "being woken"
    return f"1 is {state} on {names(replica.group)}"
