"""What is warmed, woken, drained and evicted, by example."""

from __future__ import annotations

import pytest

from services.placer.decisions import Do, Outcome
from services.placer.planner import plan
from services.placer.snapshot import Rules, State
from tests.placer.cluster import NOW, action, agent, done, group, model, replica, snapshot, window
from warmserve.v1 import common_pb2


def outlook(of, name):
    return next(o for o in of.outlooks if o.model == name)


def test_foundation_and_burst_follow_mean_and_peak() -> None:
    made = plan(snapshot([agent(f"g{i}") for i in range(4)], [model("a", mean=9, peak=25, capacity=8)]))
    assert (outlook(made, "a").foundation, outlook(made, "a").burst) == (2, 2)
    assert sorted(done(made, Do.WARM)) == [("a", f"g{i}") for i in range(4)]
    causes = {a.reason.cause for a in made.actions}
    assert causes == {common_pb2.CAUSE_FOUNDATION, common_pb2.CAUSE_BURST}


def test_a_window_counts_once_it_is_near() -> None:
    far = window(NOW + 290, 5)
    spec = model("a")
    spec = type(spec)(**{**spec.__dict__, "windows": (window(NOW - 10, 0), far)})
    assert plan(snapshot([agent("g0")], [spec])).actions == ()
    made = plan(snapshot([agent("g0")], [spec], rules=Rules(lookahead_s=300)))
    assert done(made, Do.WARM) == [("a", "g0")]


def test_what_is_not_needed_makes_room_for_what_is() -> None:
    there = [replica("old", "g0", pages=40)]
    made = plan(snapshot([agent("g0")], [model("old", 40), model("new", 16, mean=2)], there))
    evicted = action(made, Do.EVICT, "old")
    assert evicted.reason.by_model == "new"
    assert round(evicted.keep * 40) == 64 - 16 - 16  # the rest of it stays: arena, less KV's quarter, less the newcomer
    assert done(made, Do.WARM) == [("new", "g0")]


def test_what_is_worth_as_much_is_not_evicted() -> None:
    there = [replica("a", "g0", pages=40)]
    made = plan(snapshot([agent("g0")], [model("a", 40, mean=1), model("b", 40, mean=1)], there))
    assert made.actions == ()
    assert outlook(made, "b").reason.cause == common_pb2.CAUSE_NO_CAPACITY


def test_prewarming_does_not_undo_at_once_what_was_just_loaded() -> None:
    models = [model("old", 40), model("new", 40, mean=2)]
    just = replica("old", "g0", pages=40, idle_s=1.0)
    assert plan(snapshot([agent("g0")], models, [just])).actions == ()
    assert len(plan(snapshot([agent("g0")], models, [replica("old", "g0", pages=40, idle_s=2.0)])).actions) == 2


def test_models_likely_to_be_woken_together_do_not_share() -> None:
    there = [replica("busy", "g0"), replica("quiet", "g1")]
    models = [model("busy", mean=4), model("quiet"), model("new", mean=4)]
    made = plan(snapshot([agent("g0"), agent("g1")], models, there))
    assert done(made, Do.WARM) == [("new", "g1")]


def test_a_partly_resident_replica_that_is_needed_is_completed() -> None:
    made = plan(snapshot([agent("g0")], [model("a", mean=1)], [replica("a", "g0", resident=4)]))
    assert done(made, Do.WARM) == [("a", "g0")]
    assert "completing" in action(made, Do.WARM, "a").reason.text


def test_one_load_at_a_time_on_each_agent() -> None:
    models = [model(name, 8, mean=1) for name in "abc"]
    made = plan(snapshot([agent("g0"), agent("g1")], models))
    assert len(done(made, Do.WARM)) == 2
    assert {where for _, where in done(made, Do.WARM)} == {"g0", "g1"}


def test_an_idle_instance_that_nobody_expects_stays_until_a_model_that_is_expected_has_no_replica() -> None:
    idle = [replica("a", "g0", State.ACTIVE)]
    assert plan(snapshot([agent("g0")], [model("a")], idle)).actions == ()
    made = plan(snapshot([agent("g0")], [model("a"), model("b", 60, mean=1)], idle))
    assert done(made, Do.DRAIN) == [("a", "g0")]
    assert action(made, Do.DRAIN, "a").reason.cause == common_pb2.CAUSE_LOW_LOAD


@pytest.mark.parametrize(
    "instance",
    [
        replica("a", "g0", State.ACTIVE, running=1),
        replica("a", "g0", State.ACTIVE, in_state_s=1.0),
        replica("a", "g0", State.ACTIVE, idle_s=1.0),
    ],
)
def test_an_instance_stays_while_it_is_busy_or_new(instance) -> None:
    assert plan(snapshot([agent("g0")], [model("a")], [instance])).actions == ()


def test_the_forecast_keeps_an_idle_instance() -> None:
    made = plan(snapshot([agent("g0")], [model("a", mean=1)], [replica("a", "g0", State.ACTIVE)]))
    assert made.actions == ()


def test_scale_up_at_eight_tenths_and_down_below_half() -> None:
    agents = [agent(f"g{i}") for i in range(3)]
    one = [replica("a", "g0", State.ACTIVE, running=6)]
    assert plan(snapshot(agents, [model("a", running=6)], one)).actions == ()
    made = plan(snapshot(agents, [model("a", running=7)], one))
    assert done(made, Do.WAKE) == [("a", "g1")]
    two = [replica("a", "g0", State.ACTIVE, running=3), replica("a", "g1", State.ACTIVE, running=2)]
    assert plan(snapshot(agents, [model("a", running=5)], two)).actions == ()
    idle = [replica("a", "g0", State.ACTIVE, running=4), replica("a", "g1", State.ACTIVE)]
    absent = model("b", 60, mean=1)
    made = plan(snapshot(agents[:2], [model("a", running=4), absent], idle))
    assert done(made, Do.DRAIN) == [("a", "g1")]
    idle[0] = replica("a", "g0", State.ACTIVE, running=5)
    assert done(plan(snapshot(agents[:2], [model("a", running=5), absent], idle)), Do.DRAIN) == []


def test_a_busy_instance_that_is_not_needed_gives_its_time_to_neighbours() -> None:
    agents = [agent(f"g{i}") for i in range(2)]
    two = [replica("a", "g0", State.ACTIVE, running=2), replica("a", "g1", State.ACTIVE, running=2)]
    assert plan(snapshot(agents, [model("a", running=4)], two)).actions == ()  # it is in nobody's way
    beside = [*two, replica("b", "g1", State.ACTIVE, running=3)]
    made = plan(snapshot(agents, [model("a", running=4), model("b", running=3)], beside))
    assert done(made, Do.DRAIN) == [("a", "g1")]


def test_an_idle_instance_stays_for_a_while() -> None:
    there = [replica("a", "g0", State.ACTIVE, idle_s=59)]
    assert plan(snapshot([agent("g0")], [model("a")], there)).actions == ()


def test_an_instance_more_where_a_gpu_is_free_and_peaks_need_it() -> None:
    agents = [agent(f"g{i}") for i in range(2)]
    one = [replica("a", "g0", State.ACTIVE, running=1)]
    assert done(plan(snapshot(agents, [model("a", running=1, mean=1, peak=1.5)], one)), Do.WAKE) == []
    made = plan(snapshot(agents, [model("a", running=1, mean=1, peak=12)], one))
    assert done(made, Do.WAKE) == [("a", "g1")]
    full = [*one, replica("b", "g1", pages=56)]
    made = plan(snapshot(agents, [model("a", running=1, mean=1, peak=12), model("b", 56, mean=1)], full))
    assert done(made, Do.WAKE) == []  # nothing is evicted for that
    crowded = [*one, replica("b", "g1", State.ACTIVE, running=8)]
    models = [model("a", running=1, mean=1, peak=12), model("b", running=8, max_replicas=1, priority=9.0)]
    assert done(plan(snapshot(agents, models, crowded)), Do.WAKE) == []  # it would cost b more


def test_a_further_instance_is_not_woken_where_sharing_costs_more_than_it_spares() -> None:
    agents = [agent(f"g{i}") for i in range(2)]

    def woken(waiting: int) -> list[tuple[str, str]]:
        there = [replica("a", "g0", State.ACTIVE, running=7), replica("b", "g1", State.ACTIVE, running=8)]
        models = [model("a", running=7, waiting=waiting), model("b", running=8, max_replicas=1)]
        return done(plan(snapshot(agents, models, there)), Do.WAKE)

    assert woken(0) == []
    assert woken(60) == [("a", "g1")]


def test_a_burst_wakes_as_many_as_it_needs_at_once() -> None:
    agents = [agent(f"g{i}") for i in range(4)]
    made = plan(snapshot(agents, [model("a", waiting=20)]))
    assert len(done(made, Do.WAKE)) == 4  # 20 / (0.8 x 8)
    made = plan(snapshot(agents, [model("a", waiting=20, max_replicas=2)]))
    assert len(done(made, Do.WAKE)) == 2


def test_minimum_replicas_are_woken_without_any_load_and_not_drained() -> None:
    made = plan(snapshot([agent("g0"), agent("g1")], [model("a", min_replicas=2)]))
    assert len(done(made, Do.WAKE)) == 2
    assert {a.reason.cause for a in made.actions} == {common_pb2.CAUSE_OPERATOR}
    there = [replica("a", "g0", State.ACTIVE), replica("a", "g1", State.ACTIVE)]
    assert plan(snapshot([agent("g0"), agent("g1")], [model("a", min_replicas=2)], there)).actions == ()


@pytest.mark.parametrize("running", [0, 5])
def test_what_is_beyond_a_maximum_that_was_lowered_is_drained(running: int) -> None:
    agents = [agent(f"g{i}") for i in range(3)]
    there = [replica("a", f"g{i}", State.ACTIVE, running=running + i) for i in range(3)]
    made = plan(snapshot(agents, [model("a", running=3 * running + 3, max_replicas=1)], there))
    assert done(made, Do.DRAIN) == [("a", "g0"), ("a", "g1")]  # which run the least
    assert {a.reason.cause for a in made.actions} == {common_pb2.CAUSE_OPERATOR}
    assert "its maximum is 1" in made.actions[0].reason.text


def test_replicas_of_undeployed_models_go() -> None:
    there = [replica("x", "g0", State.ACTIVE, running=2), replica("y", "g0"), replica("z", "g0", State.DRAINING)]
    made = plan(snapshot([agent("g0", pages=100)], [], there))
    assert done(made, Do.DRAIN) == [("x", "g0")]
    assert done(made, Do.EVICT) == [("y", "g0")]
    assert {a.reason.cause for a in made.actions} == {common_pb2.CAUSE_UNDEPLOYED}


def test_a_drained_agent_is_emptied_and_its_work_goes_elsewhere() -> None:
    there = [replica("a", "g0", State.ACTIVE, running=2), replica("b", "g0")]
    models = [model("a", running=2, waiting=3), model("b", mean=1)]
    made = plan(snapshot([agent("g0", cordoned=True, drained=True), agent("g1")], models, there))
    assert done(made, Do.DRAIN) == [("a", "g0")]
    assert done(made, Do.EVICT) == [("b", "g0")]
    assert done(made, Do.WAKE) == [("a", "g1")]
    assert action(made, Do.DRAIN, "a").reason.cause == common_pb2.CAUSE_OPERATOR


def test_nothing_new_on_a_cordoned_agent() -> None:
    models = [model("a", mean=1), model("b", waiting=1)]
    made = plan(snapshot([agent("g0", cordoned=True)], models, [replica("b", "g0")]))
    assert made.actions == ()
    assert made.wakes["b"].outcome is Outcome.IMPOSSIBLE
    assert "cordoned" in made.wakes["b"].reason.text


def test_a_replica_on_a_cordoned_agent_does_not_make_its_successor_a_spare_one() -> None:
    models = [model("a", 1, mean=0.5, capacity=1), model("c", 48, mean=0.5, capacity=1, cold_load_s=3)]
    there = [replica("c", "g0", pages=48), replica("c", "g1", pages=48)]
    made = plan(snapshot([agent("g0", cordoned=True), agent("g1")], models, there))
    assert made.actions == ()
    assert "1 is warm on g1" in outlook(made, "c").reason.text


def test_beside_a_replica_that_lies_partly_on_a_cordoned_agent_room_is_used_and_it_stays() -> None:
    models = [model("wide", 16, tp=2, mean=1), model("new", 16, mean=2)]
    made = plan(snapshot([agent("g0", cordoned=True), agent("g1")], models, [replica("wide", "g0+g1", pages=16)]))
    assert done(made, Do.WARM) == [("new", "g1")]
    assert done(made, Do.EVICT) == []


def test_a_group_that_lost_an_agent_is_cleared_away() -> None:
    there = [replica("a", "g0+g1"), replica("b", "g0+g1", State.ACTIVE)]
    made = plan(snapshot([agent("g0", pages=100)], [model("a", tp=2), model("b", tp=2)], there))
    assert done(made, Do.EVICT) == [("a", "g0+g1")]
    assert done(made, Do.DRAIN) == [("b", "g0+g1")]
    assert {a.reason.cause for a in made.actions} == {common_pb2.CAUSE_AGENT_LOST}


def test_a_failed_load_is_left_alone_for_a_while() -> None:
    refused = {("a", group("g0")): "loading failed: the image is damaged"}
    made = plan(snapshot([agent("g0"), agent("g1")], [model("a", mean=1)], refused=refused))
    assert done(made, Do.WARM) == [("a", "g1")]
    made = plan(snapshot([agent("g0")], [model("a", waiting=1)], refused=refused))
    assert made.wakes["a"].reason.cause == common_pb2.CAUSE_FAILURE
    assert "the image is damaged" in made.wakes["a"].reason.text


@pytest.mark.parametrize(
    ("agents", "spec", "replicas", "text"),
    [
        (["g0"], model("a", mean=3.2), [replica("a", "g0")], "mean load 3.2 needs 1 instance; 1 is warm on g0"),
        (
            ["g0"],
            model("a", mean=3.2, peak=9),
            [replica("a", "g0", State.ACTIVE, running=3)],
            "mean load 3.2 needs 1 instance, peak 9.0 needs 1 more; 1 is active (3 running) on g0; "
            "no further group of 1 agent can hold another replica",
        ),
        (["g0"], model("a"), [], "there is no forecast yet; nothing is resident"),
        (
            ["g0"],
            model("a", mean=40, max_replicas=1, running=8),
            [replica("a", "g0", State.ACTIVE, running=8)],
            "mean load 40.0 needs 1 instance; it would have 5, but its maximum is 1; 1 is active (8 running) on g0",
        ),
        (
            ["g0"],
            model("a", min_replicas=1, pinned=1),
            [replica("a", "g0", State.ACTIVE)],
            "there is no forecast yet; its minimum is 1; 1 pinned; 1 is active (0 running) on g0",
        ),
        (
            ["g0"],
            model("a"),
            [replica("a", "g0", resident=8)],
            "there is no forecast yet; 1 is warm (50% resident) on g0",
        ),
        (
            ["g0"],
            model("a", waiting=2),
            [replica("a", "g0")],
            "2 requests wait and no instance is active; waking the replica on g0, 100% resident",
        ),
        ([], model("a", waiting=2), [], "2 requests wait and no instance is active; no agent is registered"),
    ],
)
def test_outlooks_say_why_in_plain_words(agents, spec, replicas, text) -> None:
    made = plan(snapshot([agent(name) for name in agents], [spec], replicas))
    assert outlook(made, "a").reason.text == text
