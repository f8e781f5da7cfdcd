"""Our rule, by example: what is warm has the largest expected value."""

from __future__ import annotations

from dataclasses import replace

import pytest

from services.placer.decisions import Competitor, Do, Outcome
from services.placer.planner import plan, plan_published, wake
from services.placer.snapshot import Node, Quantiles, Rules, State, Tier, WindowLoad
from tests.placer.cluster import NOW, PAGE, action, after, agent, done, group, model, replica, snapshot, window
from warmserve.v1 import common_pb2


def outlook(of, name):
    return next(o for o in of.outlooks if o.model == name)


def test_what_is_worth_more_is_warmed_whatever_it_is_called() -> None:
    # The published rule puts any foundation replica first; here is room for one, and the peak is nearly certain.
    dear, cheap = model("dear", mean=0, peak=9, cold_load_s=60), model("cheap", mean=1, cold_load_s=1)
    there = snapshot([agent("g0", pages=24)], [dear, cheap])
    assert done(plan(there), Do.WARM) == [("dear", "g0")]
    assert done(plan_published(there), Do.WARM) == [("cheap", "g0")]


def test_a_big_group_lies_over_small_ones_that_are_unlikely() -> None:
    agents = [agent(f"g{i}") for i in range(4)]
    rare = WindowLoad(NOW, NOW + 300, Quantiles(0, 0, 0), Quantiles(0, 0.2, 1))
    models = [model("likely", mean=4), replace(model("rare"), windows=(rare,)), model("big", tp=2, mean=4)]
    there = [replica("likely", "g0"), replica("rare", "g2")]
    assert ("big", "g2+g3") in done(plan(snapshot(agents, models, there)), Do.WARM)


def test_two_large_models_of_different_degrees_find_room_together() -> None:
    agents = [agent(f"g{i}") for i in range(4)]
    models = [model("one", 40, mean=4), model("two", 40, tp=2, mean=4), model("un", 40, mean=4)]
    then = after(snapshot(agents, models), plan(snapshot(agents, models)))
    assert sorted(name for name, _ in then) == ["one", "two", "un"]
    assert {a for _, where in then for a in where} == {"g0", "g1", "g2", "g3"}


def test_nothing_is_warmed_that_would_not_be_there_in_time() -> None:
    ends_soon = WindowLoad(NOW - 295, NOW + 5, Quantiles.exactly(3), Quantiles.exactly(3))
    slow, quick = (model(name, cold_load_s=seconds) for name, seconds in (("slow", 6.0), ("quick", 1.0)))
    models = [replace(spec, windows=(ends_soon,)) for spec in (slow, quick)]
    assert done(plan(snapshot([agent("g0"), agent("g1")], models)), Do.WARM) == [("quick", "g0")]


def test_a_slow_load_begins_earlier() -> None:
    windows = (window(NOW - 200, 0), window(NOW + 100, 4))
    models = [replace(model(name, cold_load_s=seconds), windows=windows) for name, seconds in (("a", 1.0), ("b", 80.0))]
    assert done(plan(snapshot([agent("g0"), agent("g1")], models)), Do.WARM) == [("b", "g0")]


def test_loads_share_the_nodes_bandwidth() -> None:
    agents = [agent(f"g{i}") for i in range(4)]
    models = [model(name, mean=4, cold_load_s=1.0) for name in "abcd"]

    def loads(pages_per_s: float) -> int:
        nodes = {"n0": Node("n0", copy_bytes_per_s=pages_per_s * PAGE)}
        return len(done(plan(snapshot(agents, models, nodes=nodes)), Do.WARM))

    assert loads(0) == 4  # no bound is known
    assert loads(33) == 2  # each copies 16 pages in a second
    assert loads(1) == 1  # one at least, however slow


def test_instances_keep_what_the_forecast_needs_and_lend_the_rest() -> None:
    def warmed(load: float) -> list[tuple[str, str]]:
        busy = model("busy", 16, mean=load, capacity=32, running=2, kv_bytes_per_request=PAGE)
        there = [replica("busy", "g0", State.ACTIVE, running=2, kv_pages=2, slots=32)]
        seen = snapshot([agent("g0", pages_kv=2)], [busy, model("new", 24, mean=1)], there)
        return done(plan(seen), Do.WARM)

    assert warmed(10) == [("new", "g0")]  # 64 pages: 16 and 24 of weights, 11 for requests
    assert warmed(30) == []  # 31 for requests


def test_pinned_replicas_stay_and_come_whatever_the_forecast() -> None:
    pinned = model("a", 40, pinned=1)
    other = model("b", 40, mean=30, cold_load_s=50)
    made = plan(snapshot([agent("g0")], [pinned, other]))
    assert done(made, Do.WARM) == [("a", "g0")]
    assert action(made, Do.WARM, "a").reason.cause == common_pb2.CAUSE_OPERATOR
    assert "pinned" in action(made, Do.WARM, "a").reason.text
    assert plan(snapshot([agent("g0")], [pinned, other], [replica("a", "g0", pages=40)])).actions == ()
    made = plan(snapshot([agent("g0")], [pinned, other], [replica("b", "g0", pages=40)]))
    assert action(made, Do.EVICT, "b").reason.by_model == "a"


def test_pins_that_cannot_be_kept_say_so() -> None:
    made = plan(snapshot([agent("g0"), agent("g1")], [model("a", pinned=3)]))
    assert len(done(made, Do.WARM)) == 2
    assert "of its 3 pinned replicas 1 cannot be placed" in outlook(made, "a").reason.text
    both = [model("a", 40, pinned=1), model("b", 40, pinned=1)]
    made = plan(snapshot([agent("g0")], both))
    assert done(made, Do.WARM) == [("a", "g0")]
    assert "of its 1 pinned replica 1 cannot be placed" in outlook(made, "b").reason.text


def test_what_is_too_large_for_any_group_says_so() -> None:
    made = plan(snapshot([agent("g0"), agent("g1", pages=32)], [model("a", 64, mean=3)]))
    assert made.actions == ()
    assert "no group of 1 agent is large enough: it needs 64 pages" in outlook(made, "a").reason.text
    assert done(plan(snapshot([agent("g0")], [model("a", 60, mean=3)])), Do.WARM) == [("a", "g0")]  # alone, it fits


def test_more_instances_than_agents_say_so() -> None:
    there = [replica("a", "g0", State.ACTIVE), replica("a", "g1", State.ACTIVE)]
    made = plan(snapshot([agent("g0"), agent("g1")], [model("a", min_replicas=3)], there))
    assert made.wakes["a"].outcome is Outcome.IMPOSSIBLE
    assert "its minimum is 3 active replicas; it has a replica on every group" in outlook(made, "a").reason.text


def test_agents_of_different_sizes_hold_what_fits_them() -> None:
    agents = [agent("g0", pages=20), agent("g1", pages=200)]
    small, large = model("small", 12, mean=1), model("large", 100, mean=1)
    assert sorted(done(plan(snapshot(agents, [small, large])), Do.WARM)) == [("large", "g1"), ("small", "g0")]
    coarse = replace(agents[0], page_bytes=8 * PAGE)  # its 20 pages hold as much as 160 of the other's
    assert len(done(plan(snapshot([coarse], [large])), Do.WARM)) == 1


def test_moves_have_to_pay() -> None:
    there = [replica("old", "g0", pages=40)]

    def moved(load: float) -> bool:
        models = [model("old", 40, mean=4, capacity=32), model("new", 40, mean=load, capacity=32)]
        return bool(plan(snapshot([agent("g0")], models, there)).actions)

    assert not moved(4 * Rules().margin - 0.1)
    assert moved(4 * Rules().margin + 0.3)


def test_what_a_later_window_needs_stays_but_is_not_loaded_for_it() -> None:
    windows = (window(NOW - 10, 0), window(NOW + 290, 6))
    soon, never, new = replace(model("soon", 24), windows=windows), model("never", 24), model("new", 24, mean=1)
    there = [replica("soon", "g0", pages=24), replica("never", "g0", pages=24)]
    made = plan(snapshot([agent("g0")], [soon, never, new], there))
    assert done(made, Do.EVICT) == [("never", "g0")]
    assert plan(snapshot([agent("g0")], [soon])).actions == ()


def test_without_forecasts_only_requests_wake_and_what_was_used_least_recently_gives_way() -> None:
    there = [replica("a", "g0", pages=24, idle_s=10), replica("b", "g0", pages=24, idle_s=100)]
    models = [model("a", 24), model("b", 24), model("c", 24, waiting=1)]
    assert plan(snapshot([agent("g0")], models[:2], there)).actions == ()
    made = plan(snapshot([agent("g0")], models, there))
    assert done(made, Do.EVICT) == [("b", "g0")]
    assert done(made, Do.WAKE) == [("c", "g0")]


@pytest.mark.parametrize(
    ("windows", "text"),
    [
        ((replace(window(NOW, 3), mean=Quantiles(float("nan"), 1, 1)),), "its forecast holds no usable number"),
        ((window(NOW - 100_000, 3),), "its forecast ended 28 h ago"),
        ((window(NOW - 900, 3),), "its forecast ended 600 s ago and is widened; mean load 3.0 needs 1 instance"),
    ],
)
def test_forecasts_that_cannot_be_used_say_so(windows, text) -> None:
    made = plan(snapshot([agent("g0")], [replace(model("a"), windows=windows)]))
    assert outlook(made, "a").reason.text.startswith(text)


def test_outlooks_name_whom_a_model_won_or_lost_against() -> None:
    strong, weak = model("strong", 40, mean=8), model("weak", 40, mean=2)
    made = plan(snapshot([agent("g0")], [strong, weak], [replica("strong", "g0", pages=40)]))
    assert outlook(made, "weak").competitors == (Competitor("strong", False, 8.0, group("g0")),)
    assert outlook(made, "strong").competitors == (Competitor("weak", True, 2.0, group("g0")),)
    made = plan(snapshot([agent("g0")], [strong, weak], [replica("weak", "g0", pages=40)]))
    [won] = outlook(made, "strong").competitors
    assert (won.model, won.won, won.where) == ("weak", True, group("g0"))


def test_a_wake_is_decided_alone_as_the_plan_decides_it() -> None:
    models = [model("a", waiting=1), model("b", mean=4)]
    there = snapshot([agent("g0"), agent("g1")], models)
    alone, whole = wake(there, "a"), plan(there)
    assert alone.wakes == whole.wakes
    assert alone.actions == whole.actions[:1]
    assert [o.model for o in alone.outlooks] == ["a"]


def test_a_wake_loads_where_the_image_is_near() -> None:
    agents = [agent("g0"), agent("g1", node="n1")]
    spec = model("a", waiting=1, load_s={Tier.HOST: 0.3, Tier.DISK: 9.0}, images={"n0": Tier.DISK, "n1": Tier.HOST})
    made = plan(snapshot(agents, [replace(spec, cold_load_measured=True)]))
    assert done(made, Do.WAKE) == [("a", "g1")]
    assert made.wakes["a"].estimated_s == 0.3


def test_agents_are_told_where_a_warm_replicas_worth_has_changed_much() -> None:
    def made(score: float | None):
        models = [model("a", mean=1, cold_load_s=2.0)]
        return plan(snapshot([agent("g0")], models, [replica("a", "g0", score=score)]))

    told = action(made(0.0), Do.WARM, "a")
    assert told.reason.score > 0
    assert made(told.reason.score * 1.1).actions == ()
    assert len(made(told.reason.score * 2).actions) == 1
    assert made(None).actions == ()


def test_pages_that_an_agent_has_promised_to_kv_are_not_warmed_into() -> None:
    models = [model("a", 24, running=1), model("b", 24, mean=1)]
    there = [replica("a", "g0", State.ACTIVE, pages=24, running=1, slots=64)]
    assert done(plan(snapshot([agent("g0")], models, there)), Do.WARM) == [("b", "g0")]
    assert done(plan(snapshot([agent("g0", pages_promised=20)], models, there)), Do.WARM) == []


def test_a_further_instance_needs_room_for_what_it_carries_however_many_wait() -> None:
    # Four hundred requests' KV would take any arena; what one instance carries of them fits beside another model.
    def woken(waiting: int) -> list[tuple[str, str]]:
        crowded = model("crowded", 8, capacity=6, running=6, waiting=waiting, kv_bytes_per_request=PAGE)
        there = [
            replica("crowded", "g0", State.ACTIVE, 8, running=6),
            replica("other", "g1", State.ACTIVE, 40, running=1),
        ]
        agents = [agent("g0"), agent("g1")]
        return done(plan(snapshot(agents, [crowded, model("other", 40, mean=0.2, running=1)], there)), Do.WAKE)

    assert woken(20) == woken(400) == [("crowded", "g1")]
