"""The published rule's own way, taken where it leads to more than the search has found.

It evicts parts of what it has loaded, and a part may be worth more than whatever whole replica fits in its place; the
search loads whole replicas alone. Looked at on few agents, where it costs little.
"""

from __future__ import annotations

from collections.abc import Mapping

from services.placer import lending
from services.placer.board import Board
from services.placer.published_rule import PublishedRule
from services.placer.rule import Prewarming
from services.placer.search import SMALL
from services.placer.snapshot import Replica, State
from services.placer.target import Target
from services.placer.value import Stakes, expected_value

_ROUNDS = 32  # of plans, until it has nothing left to do
_MORE = 1e-9  # of the value


def better(board: Board, stakes: Mapping[str, Stakes], aim: Target) -> Prewarming | None:
    """The published rule's next actions, carried out on the board; None where `aim` is worth at least as much.

    It heeds neither pins nor bounds on copying, so it is no rival where there are any.
    """
    snapshot = board.snapshot
    if (
        len(aim.agents) > SMALL
        or not aim.loads
        or any(model.pinned for model in snapshot.models.values())
        or any(node.copy_bytes_per_s for node in snapshot.nodes.values())
    ):
        return None
    lent = lending.Foreseen(snapshot, stakes)
    ahead = board.settled()
    for _ in range(_ROUNDS):
        if not PublishedRule(ahead, lent).prewarm().actions:
            break
        ahead = ahead.settled()
    there = {replica.key: replica for replica in board.all()}
    instances = [replica for replica in there.values() if replica.state not in (State.WARM, State.WARMING)]
    warm = [
        replica
        for replica in ahead.all()
        if replica.state is State.WARM and (replica.key in there or _in_time(stakes[replica.model], board, replica))
    ]
    theirs = expected_value(snapshot, [*instances, *warm])
    ours = expected_value(snapshot, [*instances, *aim.replicas])
    return PublishedRule(board, lent).prewarm() if theirs > ours * (1 + _MORE) else None


def _in_time(own: Stakes, board: Board, replica: Replica) -> bool:
    return own.in_time(0, board.snapshot.agents[replica.group[0]].node, 1.0, board.snapshot.now_s) > 0
