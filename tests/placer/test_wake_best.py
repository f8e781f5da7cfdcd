"""Of all groups the best one is woken, though most are hardly looked at."""

from __future__ import annotations

from unittest import mock

from hypothesis import given

from services.placer.board import Board
from services.placer.planner import plan
from services.placer.snapshot import Snapshot
from tests.placer.test_planner_properties import many, snapshots


@many
@given(snapshots())
def test_making_room_never_costs_less_than_was_told_before(before: Snapshot) -> None:
    """Else the best group might not be looked at."""
    make_room = Board.make_room

    def checked(self, model, group, sources, **kv):
        room = make_room(self, model, group, sources, **kv)
        least = self.least_cost(model, group, sources, **kv)
        assert room is None or least <= room.cost
        return room

    with mock.patch.object(Board, "make_room", checked):
        plan(before)


@many
@given(snapshots())
def test_the_plan_is_the_one_for_which_every_group_is_looked_at(before: Snapshot) -> None:
    quick = plan(before)
    with mock.patch.object(Board, "least_cost", return_value=0.0):
        assert plan(before) == quick
