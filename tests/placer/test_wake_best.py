"""Of all groups the best one is woken, though most are hardly looked at."""

from __future__ import annotations

import itertools
from dataclasses import replace
from random import Random
from typing import Any
from unittest import mock

from hypothesis import given
from hypothesis import strategies as st

from services.placer import shelves, value, worths
from services.placer.board import Board, Room, Source
from services.placer.decisions import Plan
from services.placer.expected_rule import ExpectedRule
from services.placer.offers import Search, Wish
from services.placer.planner import plan, wake
from services.placer.rule import Price
from services.placer.scores import Worth
from services.placer.snapshot import Agent, GroupIds, Key, Model, Replica, Rules, Snapshot, State
from tests.placer.cluster import agent, model, replica, snapshot
from tests.placer.test_planner_properties import many, snapshots
from warmserve.v1 import common_pb2


@many
@given(snapshots())
def test_making_room_never_costs_less_than_was_told_before(before: Snapshot) -> None:
    """Else the best group might not be looked at."""
    make_room = Board.make_room

    def checked(self: Board, model: Model, group: GroupIds, sources: list[Source], **kv: Any) -> Room | None:
        room = make_room(self, model, group, sources, **kv)
        least = self.least_cost(model, group, sources, **kv)
        assert room is None or least <= room.cost
        return room

    with mock.patch.object(Board, "make_room", checked):
        plan(before)


def check_prices(before: Snapshot, limit: float | None) -> int:
    """Asserts that no group is better than it was priced; how many there are."""
    board, found = Board(before), 0
    for named in before.models.values():
        search = Search(board, ExpectedRule(board), named, Wish(common_pb2.CAUSE_WAITING_REQUESTS, "", limit))
        for group in board.groups(named.tp):
            seen = None if board.get(named.name, group) else search._look_at(group, 1.5)
            room = search._make_room(seen) if seen is not None else None
            if seen is not None and room is not None:
                assert search._priced(group, 1.5).rank <= room.rank
                assert seen.rank <= room.rank
                found += 1
    return found


@many
@given(snapshots(), st.sampled_from([None, 0.5]))
def test_a_group_is_never_better_than_it_was_priced(before: Snapshot, limit: float | None) -> None:
    """Likewise."""
    check_prices(before, limit)


def test_an_agent_is_never_better_than_it_was_priced_whatever_gives_way() -> None:
    kinds = list(itertools.product((State.WARM, State.ACTIVE, State.DRAINING), (8, 16), (0, 16)))
    found = 0
    for (one, pages, kv), (other, more, more_kv) in itertools.product(kinds, kinds):
        there = [
            replica("a", "g0", one, pages, kv_pages=kv, idle_s=0.5),
            replica("b", "g0", other, more, kv_pages=more_kv),
        ]
        known = [model("a", pages, mean=1), model("b", more, mean=1)]
        for wanted in range(4, 60, 3):
            with_one = [*known, model("w", wanted, waiting=1)]
            found += check_prices(snapshot([agent("g0", pages_kv=kv + more_kv)], with_one, there), None)
    assert found > 1000


@many
@given(snapshots())
def test_the_plan_is_the_one_for_which_every_group_is_looked_at(before: Snapshot) -> None:
    quick = plan(before)
    with (
        mock.patch.object(Board, "least_cost", return_value=0.0),
        mock.patch.object(Search, "_least", return_value=0.0),
    ):
        assert plan(before) == quick


def outcome(now: Snapshot) -> tuple[dict[Key, Worth], dict[str, list[Price]], Plan]:
    """What each replica is worth, what costs what on each agent, and what is woken."""
    rule = ExpectedRule(Board(now))
    prices = {agent_id: list(rule.prices(agent_id)) for agent_id in now.agents}
    return {replica.key: rule.worth(replica) for replica in now.replicas}, prices, wake(now, *now.models)


names = st.sampled_from(["a", "b", "c"])
places = st.sampled_from(["g0", "g1", "g2"])
changes = st.one_of(
    st.builds(
        lambda name, place, state, resident: replica(name, place, state, resident=resident),
        names,
        places,
        st.sampled_from([State.WARM, State.ACTIVE]),
        st.integers(8, 16),
    ),
    st.tuples(names, places),  # a replica has gone
    st.builds(
        lambda name, mean, waiting: model(name, mean=mean, peak=3 * mean, waiting=waiting),
        names,
        st.integers(1, 20),
        st.sampled_from([0, 0, 1]),
    ),
    st.builds(lambda place, cordoned: agent(place, cordoned=cordoned), places, st.booleans()),
    st.builds(Rules, lookahead_s=st.sampled_from([30.0, 400.0])),
    st.just(301.0),  # seconds
)


def changed(now: Snapshot, change: object) -> Snapshot:
    """The snapshot after a change; all else is the same objects."""
    there = {r.key: r for r in now.replicas}
    match change:
        case Replica():
            return replace(now, replicas=tuple((there | {change.key: change}).values()))
        case (str(name), str(place)):
            there.pop((name, (place,)), None)
            return replace(now, replicas=tuple(there.values()))
        case Model():
            return replace(now, models={**now.models, change.name: change})
        case Agent():
            return replace(now, agents={**now.agents, change.id: change})
        case Rules():
            return replace(now, rules=change)
        case float():
            return replace(now, now_s=now.now_s + change)
    raise TypeError(change)


@given(st.lists(changes, min_size=10, max_size=30))
def test_nothing_depends_on_what_is_kept_from_one_wake_to_the_next(changes: list[object]) -> None:
    now = snapshot(
        [agent("g0"), agent("g1"), agent("g2", node="n1")],
        [model("a", mean=1), model("b", mean=2), model("c", mean=3)],
        [replica("a", "g0"), replica("b", "g1"), replica("c", "g2")],
    )
    with mock.patch.object(shelves, "_MOST_CHANGED", 0):  # however few there are, they are gone on from
        for change in changes:
            now = changed(now, change)
            kept = outcome(now)
            with (
                mock.patch.object(worths, "_last", None),
                mock.patch.object(shelves, "_last", shelves._Last({}, shelves.Shelves({}, {}, {}))),
                mock.patch.dict(value._known, clear=True),
            ):
                assert outcome(now) == kept


@given(st.lists(st.lists(changes, max_size=3), min_size=2, max_size=10))
def test_shelves_are_the_same_whether_made_anew_or_gone_on_from(steps: list[list[object]]) -> None:
    now = snapshot([], [], [])
    with mock.patch.object(shelves, "_MOST_CHANGED", 0):
        for step in steps:
            for change in step:
                now = changed(now, change)
            found, made = shelves.shelves(now.replicas), shelves._from_scratch(now.replicas)
            assert (found.by_key, found.by_agent, found.by_model) == (made.by_key, made.by_agent, made.by_model)
            for replica in now.replicas[:1]:  # whoever has asked may change what was given
                found.remove(replica.key)


@many
@given(snapshots(), st.randoms(use_true_random=False))
def test_plans_do_not_depend_on_the_order_in_which_replicas_are_told(before: Snapshot, random: Random) -> None:
    mixed = random.sample(before.replicas, len(before.replicas))
    again = replace(before, replicas=tuple(mixed))
    assert plan(again) == plan(before)
    assert wake(again, *again.models) == wake(before, *before.models)
