"""Of all groups the best one is woken, though most are hardly looked at."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

from hypothesis import given
from hypothesis import strategies as st

from services.placer import expected_rule, value
from services.placer.board import Board
from services.placer.expected_rule import ExpectedRule
from services.placer.planner import plan
from services.placer.scores import Worth
from services.placer.snapshot import Agent, Key, Model, Replica, Rules, Snapshot, State
from tests.placer.cluster import agent, model, replica, snapshot
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


def worths(now: Snapshot) -> dict[Key, Worth]:
    """What each replica is worth."""
    rule = ExpectedRule(Board(now))
    return {replica.key: rule.worth(replica) for replica in now.replicas}


names = st.sampled_from(["a", "b"])
places = st.sampled_from(["g0", "g1"])
changes = st.one_of(
    st.builds(
        lambda name, place, state, resident: replica(name, place, state, resident=resident),
        names,
        places,
        st.sampled_from([State.WARM, State.ACTIVE]),
        st.integers(8, 16),
    ),
    st.tuples(names, places),  # a replica has gone
    st.builds(lambda name, mean: model(name, mean=mean, peak=3 * mean), names, st.integers(1, 20)),
    st.builds(lambda place, cordoned: agent(place, cordoned=cordoned), places, st.booleans()),
    st.builds(Rules, lookahead_s=st.sampled_from([30.0, 400.0])),
    st.just(301.0),  # seconds
)


@given(st.lists(changes, min_size=10, max_size=30))
def test_what_replicas_are_worth_does_not_depend_on_what_is_kept(changes: list[object]) -> None:
    now = snapshot([agent("g0"), agent("g1")], [model("a", mean=1), model("b", mean=2)], [replica("a", "g0")])
    for change in changes:
        there = {r.key: r for r in now.replicas}
        match change:
            case Replica():
                now = replace(now, replicas=tuple((there | {change.key: change}).values()))
            case (str(name), str(place)):
                there.pop((name, (place,)), None)
                now = replace(now, replicas=tuple(there.values()))
            case Model():
                now = replace(now, models={**now.models, change.name: change})
            case Agent():
                now = replace(now, agents={**now.agents, change.id: change})
            case Rules():
                now = replace(now, rules=change)
            case float():
                now = replace(now, now_s=now.now_s + change)
        kept = worths(now)
        expected_rule._kept.clear()
        value._known.clear()
        assert worths(now) == kept
