"""A target for the time per token bounds what an instance is planned to carry, by the pace that instances report."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.queues import QueueCounts
from services.placer.decisions import Do
from services.placer.measured import Measured
from services.placer.memory import Memory
from services.placer.paces import sequences_within
from services.placer.planner import plan
from services.placer.records import Records, View
from services.placer.snapshot import Rules, State
from tests.placer.cluster import agent, done, model, replica, snapshot
from warmserve.v1 import cluster_pb2, common_pb2

PAGE = 1 << 20
SLOTS = 32
ACTIVE = common_pb2.REPLICA_STATE_ACTIVE


def records(
    paces: dict[str, tuple[float, float] | None],
    tpot_ms: float = 20.0,
    agents: tuple[str, ...] = ("g0", "g1", "g2", "g3"),
    devices: dict[str, str] | None = None,
    limit: int = 0,
) -> Records:
    """Instances of "a" by agent, each with its pace."""
    groups = {name: common_pb2.Group(agent_ids=[name], node="n0") for name in agents}
    return Records(
        agents={
            name: cluster_pb2.AgentRecord(
                id=name,
                node="n0",
                device_index=index,
                device_name=(devices or {}).get(name, "H100"),
                page_bytes=PAGE,
                pages_total=64,
            )
            for index, name in enumerate(agents)
        },
        residency={
            name: cluster_pb2.AgentResidency(
                agent_id=name,
                shards=[
                    cluster_pb2.ResidentShard(
                        model="a", group=groups[name], state=ACTIVE, pages_total=16, pages_resident=16, instance_id=name
                    )
                ]
                if name in paces
                else [],
            )
            for name in agents
        },
        instances={
            f"a/{name}": cluster_pb2.InstanceRecord(
                id=name,
                model="a",
                group=groups[name],
                slots=SLOTS,
                pace=pace and cluster_pb2.Pace(base_ms=pace[0], per_sequence_ms=pace[1]),
            )
            for name, pace in paces.items()
        },
        models={
            "a": cluster_pb2.ModelSpec(
                name="a",
                facts=cluster_pb2.ModelFacts(shard_bytes=16 * PAGE),
                limits=cluster_pb2.ModelLimits(max_batch=limit),
                target=cluster_pb2.ServiceTarget(tpot_ms=tpot_ms),
            )
        },
        controls={},
        forecasts={},
    )


def carries(measured: Measured, seen: Records) -> int:
    measured.learn(seen)
    return measured.capacity(seen.models["a"]).requests


@given(st.floats(0, 100), st.floats(0, 10), st.floats(0.1, 1000), st.integers(1, 256))
def test_as_many_as_keep_the_target_and_no_more(base: float, each: float, target: float, slots: int) -> None:
    kept = sequences_within(base, each, target, slots)
    assert 1 <= kept <= slots
    if kept > 1:
        assert base + kept * each <= target * (1 + 1e-9)
    if kept < slots:
        assert base + (kept + 1e-6 * slots) * each >= target * (1 - 1e-9)


@pytest.mark.parametrize(
    ("target", "expected"),
    [(0, SLOTS), (1000, SLOTS), (22, SLOTS), (16, 20), (6.5, 1), (1, 1)],
)
def test_capacity_heeds_the_target(target: float, expected: int) -> None:
    assert carries(Measured(), records({"g0": (6.0, 0.5)}, target)) == expected


def test_without_a_pace_or_beyond_the_specs_limit_it_changes_nothing() -> None:
    assert carries(Measured(), records({"g0": None})) == SLOTS
    assert carries(Measured(), records({"g0": (6.0, 0.5)}, limit=4)) == 4
    assert carries(Measured(), records({"g0": (6.0, 0.5)}, tpot_ms=8, limit=16)) == 4


def test_people_are_told_where_the_capacity_is_from() -> None:
    def source(tpot_ms: float) -> str:
        measured, seen = Measured(), records({"g0": (6.0, 0.5)}, tpot_ms)
        measured.learn(seen)
        return measured.capacity(seen.models["a"]).source

    assert source(16) == "so many keep its 16 ms per token on H100, which offers 32"
    assert source(5) == "even one takes 6.5 ms per token on H100; its target is 5"
    assert source(100) == source(0) == "as its instances report on H100"


def test_instances_of_different_pace_count_by_their_mean_and_those_that_are_gone_no_more() -> None:
    measured = Measured()
    alone, beside = (6.0, 0.5), (12.0, 1.0)  # 28 and 8 keep 20 ms
    assert carries(measured, records({"g0": alone, "g1": beside})) == 18
    assert carries(measured, records({"g1": beside})) == 8
    assert carries(measured, records({})) == 8  # as the last one said
    assert carries(measured, records({"g2": None})) == 8
    assert carries(measured, records({"g2": alone})) == 28
    assert carries(measured, records({"g2": alone}, tpot_ms=10)) == 8  # the target is another one
    # Undeployed, and deployed again: it may be another model.
    measured.learn(replace(records({}), models={}))
    assert carries(measured, records({"g0": None})) == SLOTS


def test_the_slowest_device_that_is_there_counts() -> None:
    measured = Measured()
    seen = records({"g0": (6.0, 0.5), "g1": (15.0, 1.0)}, devices={"g1": "T4"})
    assert carries(measured, seen) == 5
    assert "T4" in measured.capacity(seen.models["a"]).source
    assert carries(measured, records({"g0": (6.0, 0.5)}, agents=("g0",))) == 28


def test_what_is_learnt_without_a_target_makes_no_model_anew() -> None:
    """Each wake waits for models that are made anew."""
    for tpot_ms, changed in ((0.0, 0), (20.0, 1)):
        measured = Measured()
        measured.learn(records({"g0": (6.0, 0.5)}, tpot_ms))
        before = measured.changes
        measured.learn(records({"g0": (7.0, 0.5)}, tpot_ms))
        assert measured.changes == before + changed


@pytest.mark.parametrize(("tpot_ms", "further"), [(0.0, 0), (22.0, 0), (10.0, 3)])
def test_a_tight_target_gives_a_model_more_instances(tpot_ms: float, further: int) -> None:
    """Of 20 requests in progress an instance with 32 slots carries all, but only 8 within 10 ms per token."""
    seen, view = records({"g0": (6.0, 0.5)}, tpot_ms), View()
    shown = view.see(seen)
    counts = {"a": QueueCounts(waiting=0, taken=20)}
    there = Memory().snapshot(seen, shown.agents, shown.replicas.values(), counts, Rules(), 100.0, 1e9)
    assert [replica.slots for replica in there.replicas] == [SLOTS]  # what agents and routers admit by stays
    wakes = [action for action in plan(there).actions if action.do is Do.WAKE]
    assert len(wakes) == further


def drained(load: int, other: int) -> list[tuple[str, str]]:
    """What is drained of "a" with instances alone on g0 and beside "b" on g1."""
    spec = model("a", 16, capacity=8, batch=32, running=load, service_s=2.0)
    beside = model("b", 16, capacity=32, running=other, service_s=2.0)
    there = [
        replica("a", "g0", State.ACTIVE, running=load // 2, slots=32),
        replica("a", "g1", State.ACTIVE, running=load // 2, slots=32),
        replica("b", "g1", State.ACTIVE, running=other, slots=32),
    ]
    return done(plan(snapshot([agent("g0"), agent("g1")], [spec, beside], there)), Do.DRAIN)


def test_an_instance_for_the_tokens_time_goes_where_it_costs_its_neighbours_more() -> None:
    assert drained(load=10, other=10) == [("a", "g1")]
    assert drained(load=10, other=0) == []  # nobody is disturbed
    assert drained(load=60, other=10) == []  # without it requests would wait for a slot
