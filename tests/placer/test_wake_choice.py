"""Which group is woken, and what gives way."""

from __future__ import annotations

from services.placer.decisions import Do, Outcome
from services.placer.planner import plan, wake
from services.placer.snapshot import Rules, State
from tests.placer.cluster import action, agent, done, group, model, replica, snapshot
from warmserve.v1 import common_pb2


def woken(made, name="a"):
    return made.wakes[name]


def test_the_most_resident_replica_is_woken() -> None:
    there = [replica("a", "g0", resident=4), replica("a", "g1", resident=12)]
    made = plan(snapshot([agent("g0"), agent("g1"), agent("g2")], [model("a", waiting=1)], there))
    assert done(made, Do.WAKE) == [("a", "g1")]
    assert woken(made).found is State.WARM


def test_a_free_agent_is_better_than_one_that_serves_others() -> None:
    there = [replica("b", "g0", State.ACTIVE, running=1)]
    made = plan(snapshot([agent("g0"), agent("g1")], [model("a", waiting=1), model("b", running=1)], there))
    assert done(made, Do.WAKE) == [("a", "g1")]


def test_the_least_value_is_destroyed() -> None:
    there = [replica("dear", "g0", pages=48), replica("cheap", "g1", pages=48)]
    models = [
        model("a", 40, waiting=1),
        model("dear", 48, mean=1, cold_load_s=9),
        model("cheap", 48, mean=1, cold_load_s=2),
    ]
    made = plan(snapshot([agent("g0"), agent("g1")], models, there))
    assert done(made, Do.WAKE) == [("a", "g1")]
    evicted = action(made, Do.EVICT, "cheap")
    assert evicted.reason.cause == common_pb2.CAUSE_MADE_ROOM
    assert evicted.reason.by_model == "a"
    assert round(evicted.keep * 48) == 8  # only as much as is needed, from its end


def test_loading_elsewhere_is_cheaper_than_evicting_what_is_dear() -> None:
    there = [replica("a", "g0", pages=8, resident=4), replica("dear", "g0", pages=44)]
    models = [model("a", 8, waiting=1, cold_load_s=1), model("dear", 44, mean=1, cold_load_s=60)]
    made = plan(snapshot([agent("g0"), agent("g1")], models, there))
    assert done(made, Do.WAKE) == [("a", "g1")]
    assert done(made, Do.EVICT) == []


def test_what_is_pinned_gives_way_only_when_nothing_else_does() -> None:
    there = [replica("pinned", "g0", pages=40), replica("other", "g1", pages=40)]
    models = [model("a", 40, waiting=1), model("pinned", 40, pinned=1), model("other", 40, mean=4, cold_load_s=9)]
    for decide in (plan, wake):
        made = decide(snapshot([agent("g0"), agent("g1")], models, there))
        assert done(made, Do.WAKE) == [("a", "g1")]
        assert [name for name, _ in done(made, Do.EVICT)] == ["other"]
    made = wake(snapshot([agent("g0")], models, there[:1]))
    assert action(made, Do.EVICT, "pinned").reason.text.endswith("pinned")
    two = [replica("pinned", name, pages=40) for name in ("g0", "g1")]  # of which one is pinned
    assert len(done(wake(snapshot([agent("g0"), agent("g1")], models, two)), Do.EVICT)) == 1


def test_kv_keeps_its_reserve() -> None:
    models = [model("a", 24, waiting=1), model("b", 25)]
    made = plan(snapshot([agent("g0")], models, [replica("b", "g0", pages=25)]))
    assert round(action(made, Do.EVICT, "b").keep * 25) == 24  # 64 pages, 16 of them for KV
    made = plan(snapshot([agent("g0", pages_kv=20)], models, [replica("b", "g0", pages=25)]))
    assert round(action(made, Do.EVICT, "b").keep * 25) == 16  # KV in use is not taken away; it begins with 4
    made = plan(snapshot([agent("g0")], models, [replica("b", "g0", pages=25)], rules=Rules(kv_reserve=0.1)))
    assert done(made, Do.EVICT) == []


def test_a_model_that_needs_the_reserve_gets_it_when_alone() -> None:
    made = plan(snapshot([agent("g0")], [model("a", 60, waiting=1)]))
    assert done(made, Do.WAKE) == [("a", "g0")]
    made = plan(snapshot([agent("g0")], [model("a", 64, waiting=1)]))
    assert woken(made).outcome is Outcome.IMPOSSIBLE
    assert "64 pages and g0 has 64 in all" in woken(made).reason.text


def test_an_idle_instance_drains_the_longest_idle_first() -> None:
    there = [
        replica("b", "g0", State.ACTIVE, pages=24, idle_s=5),
        replica("c", "g1", State.ACTIVE, pages=24, idle_s=50),
    ]
    models = [model("a", 40, waiting=1), model("b", 24, mean=1), model("c", 24, mean=1)]
    made = plan(snapshot([agent("g0"), agent("g1")], models, there))
    assert done(made, Do.DRAIN) == [("c", "g1")]
    assert done(made, Do.WAKE) == []
    assert woken(made).outcome is Outcome.AFTER_DRAIN
    assert woken(made).group == group("g1")
    assert action(made, Do.DRAIN, "c").reason.text == "it has been idle for 50.0 s and a needs its pages on g1"


def test_what_drains_already_is_awaited_and_nothing_else_drained() -> None:
    there = [
        replica("b", "g0", State.ACTIVE, pages=24, idle_s=5),
        replica("c", "g1", State.DRAINING, pages=24),
    ]
    models = [model("a", 40, waiting=1), model("b", 24, mean=1), model("c", 24, mean=1)]
    made = plan(snapshot([agent("g0"), agent("g1")], models, there))
    assert made.actions == ()
    assert woken(made).outcome is Outcome.AFTER_DRAIN


def test_the_room_that_is_being_made_is_kept_for_who_waited_longest() -> None:
    there = [replica("b", "g0", State.DRAINING, pages=24)]
    models = [
        model("first", 40, waiting=1, waited_s=5),
        model("later", 16, waiting=9, waited_s=1),
        model("b", 24),
    ]
    made = plan(snapshot([agent("g0")], models, there))
    assert made.actions == ()
    assert made.wakes["first"].outcome is Outcome.AFTER_DRAIN
    assert made.wakes["later"].outcome is Outcome.IMPOSSIBLE


def test_busy_instances_give_way_only_after_the_wait_limit_the_least_loaded_first() -> None:
    there = [
        replica("b", "g0", State.ACTIVE, pages=40, running=3),
        replica("c", "g1", State.ACTIVE, pages=40, running=2),
    ]

    def made(waited_s: float):
        models = [
            model("a", 40, waiting=1, waited_s=waited_s),
            model("b", 40, running=3),
            model("c", 40, running=2),
        ]
        return plan(snapshot([agent("g0"), agent("g1")], models, there))

    assert made(9.9).actions == ()
    assert woken(made(9.9)).reason.cause == common_pb2.CAUSE_NO_CAPACITY
    assert "may be drained after 10 s of waiting" in woken(made(9.9)).reason.text
    assert done(made(10.0), Do.DRAIN) == [("c", "g1")]
    text = action(made(10.0), Do.DRAIN, "c").reason.text
    assert text.startswith("a has waited 10.0 s (limit 10 s)")


def test_an_instance_stays_its_minimum_whoever_waits() -> None:
    there = [replica("b", "g0", State.ACTIVE, pages=40, in_state_s=1.5)]
    models = [model("a", 40, waiting=1, waited_s=60), model("b", 40)]
    made = plan(snapshot([agent("g0")], models, there))
    assert made.actions == ()
    assert "for 1.5 s of at least 2" in woken(made).reason.text


def test_the_minimum_replicas_of_others_are_not_drained() -> None:
    there = [replica("b", "g0", State.ACTIVE, pages=40)]
    models = [model("a", 40, waiting=1, waited_s=60), model("b", 40, min_replicas=1)]
    assert plan(snapshot([agent("g0")], models, there)).actions == ()


def test_a_draining_replica_of_its_own_goes_on() -> None:
    there = [replica("a", "g0", State.DRAINING, running=1)]
    made = plan(snapshot([agent("g0")], [model("a", waiting=1)], there))
    assert done(made, Do.WAKE) == [("a", "g0")]
    assert "goes on" in woken(made).reason.text


def test_a_model_drained_for_another_does_not_take_the_room_back() -> None:
    there = [replica("b", "g0", State.DRAINING, pages=40, running=2)]
    models = [model("a", 40, waiting=1, waited_s=11), model("b", 40, waiting=5, waited_s=0.5, running=0)]
    made = plan(snapshot([agent("g0")], models, there))
    assert done(made, Do.WAKE) == []
    assert woken(made, "a").outcome is Outcome.AFTER_DRAIN
    assert woken(made, "b").outcome is Outcome.IMPOSSIBLE


def test_a_wake_in_progress_is_one_wake() -> None:
    made = plan(snapshot([agent("g0"), agent("g1")], [model("a", waiting=5)], [replica("a", "g0", State.WAKING)]))
    assert made.actions == ()


def test_what_is_being_warmed_is_woken() -> None:
    there = [replica("a", "g1", State.WARMING, resident=8)]
    made = plan(snapshot([agent("g0"), agent("g1")], [model("a", waiting=1)], there))
    assert done(made, Do.WAKE) == [("a", "g1")]


def test_two_models_wake_side_by_side() -> None:
    made = plan(snapshot([agent("g0"), agent("g1")], [model("a", 40, waiting=1), model("b", 40, waiting=1)]))
    assert sorted(done(made, Do.WAKE)) == [("a", "g0"), ("b", "g1")]


def test_a_tensor_parallel_model_needs_an_aligned_group() -> None:
    agents = [agent(f"g{i}") for i in range(1, 5)]  # device 0 is missing: only 2+3 is aligned
    made = plan(snapshot(agents, [model("a", tp=2, waiting=1)]))
    assert done(made, Do.WAKE) == [("a", "g2+g3")]
    made = plan(snapshot(agents, [model("a", tp=4, waiting=1)]))
    assert woken(made).outcome is Outcome.IMPOSSIBLE
    assert "4 agents side by side" in woken(made).reason.text


def test_priority_weighs_the_wait() -> None:
    models = [
        model("plain", 40, waiting=1, waited_s=3),
        model("urgent", 40, waiting=1, waited_s=2, priority=4.0),
    ]
    made = plan(snapshot([agent("g0")], models))
    assert done(made, Do.WAKE) == [("urgent", "g0")]


def test_an_overloaded_model_does_not_drain_what_was_just_used() -> None:
    there = [
        replica("a", "g0", State.ACTIVE, pages=40, running=8),
        replica("b", "g1", State.ACTIVE, pages=40, idle_s=3),
    ]
    models = [model("a", 40, waiting=9, running=8), model("b", 40, mean=1)]
    assert done(plan(snapshot([agent("g0"), agent("g1")], models, there)), Do.DRAIN) == []
    there[1] = replica("b", "g1", State.ACTIVE, pages=40, idle_s=30)
    assert done(plan(snapshot([agent("g0"), agent("g1")], models, there)), Do.DRAIN) == [("b", "g1")]


def test_the_estimate_is_for_what_is_missing() -> None:
    spec = model("a", waiting=1, cold_load_s=4.0, cold_load_measured=True)
    made = plan(snapshot([agent("g0")], [spec], [replica("a", "g0", resident=12)]))
    assert woken(made).estimated_s == 1.0
    made = plan(snapshot([agent("g0")], [model("a", waiting=1)]))
    assert woken(made).estimated_s is None
