"""What etcd holds, as the planner's values: the same whether all is seen anew or only what has changed."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from services.placer.records import Records, View
from warmserve.v1 import cluster_pb2, common_pb2

PAGE = 1 << 20
GROUPS = (("g0",), ("g1",), ("g0", "g1"))
STATES = (
    common_pb2.REPLICA_STATE_COLD,
    common_pb2.REPLICA_STATE_WARMING,
    common_pb2.REPLICA_STATE_WARM,
    common_pb2.REPLICA_STATE_ACTIVE,
)


@st.composite
def residencies(draw: st.DrawFn, agent: str) -> cluster_pb2.AgentResidency:
    """Some shards on an agent."""
    shards = [
        cluster_pb2.ResidentShard(
            model=model,
            group=common_pb2.Group(agent_ids=group),
            state=draw(st.sampled_from(STATES)),
            pages_total=16,
            pages_resident=draw(st.integers(0, 16)),
            instance_id=f"{model}-{len(group)}",
            reason=common_pb2.Reason(cause=draw(st.sampled_from((common_pb2.CAUSE_FAILURE, common_pb2.CAUSE_BURST)))),
        )
        for model in "ab"
        for group in GROUPS
        if agent in group and draw(st.booleans())
    ]
    return cluster_pb2.AgentResidency(agent_id=agent, pages_kv=draw(st.integers(0, 3)), shards=shards)


def agent_record(name: str, stopping: bool = False) -> cluster_pb2.AgentRecord:
    return cluster_pb2.AgentRecord(id=name, node="n0", page_bytes=PAGE, pages_total=64, stopping=stopping)


@st.composite
def changes(draw: st.DrawFn) -> dict[str, dict[str, object]]:
    """Some records that are new, by prefix and key; None: gone."""
    agent, model = draw(st.sampled_from(("g0", "g1"))), draw(st.sampled_from("ab"))
    record = cluster_pb2.AgentRecord(id=agent, node="n0", page_bytes=PAGE, pages_total=64, stopping=draw(st.booleans()))
    spec = cluster_pb2.ModelSpec(name=model, facts=cluster_pb2.ModelFacts(shard_bytes=draw(st.integers(1, 40)) * PAGE))
    name = f"{model}-{draw(st.sampled_from((1, 2)))}"
    possible: list[tuple[str, str, object]] = [
        ("agents", agent, record),
        ("residency", agent, draw(residencies(agent))),
        ("controls", agent, cluster_pb2.AgentControl(cordoned=True, drained=draw(st.booleans()))),
        ("models", model, spec),
        ("instances", name, cluster_pb2.InstanceRecord(id=name, model=model, slots=draw(st.integers(0, 9)))),
    ]
    kind, key, value = draw(st.sampled_from(possible))
    return {kind: {key: draw(st.sampled_from((value, value, None)))}}


def changed(records: Records, news: dict[str, dict[str, object]]) -> Records:
    """The records with the news; what has not changed is the same objects."""
    values = {
        kind: {key: value for key, value in {**getattr(records, kind), **some}.items() if value is not None}
        for kind, some in news.items()
    }
    return replace(records, **values)


@given(st.tuples(residencies("g0"), residencies("g1")), st.lists(changes(), min_size=3, max_size=25))
def test_what_is_seen_step_by_step_is_what_is_seen_at_once(
    there: tuple[cluster_pb2.AgentResidency, ...], steps: list[dict[str, dict[str, object]]]
) -> None:
    names = ("g0", "g1")
    view = View()
    records = Records(
        {name: agent_record(name) for name in names}, dict(zip(names, there, strict=True)), {}, {}, {}, {}
    )
    view.see(records)
    for news in steps:
        records = changed(records, news)
        assert view.see(records) == View().see(records)


def test_a_replica_has_the_slots_that_its_instance_offers_now() -> None:
    shard = cluster_pb2.ResidentShard(
        model="a", group=common_pb2.Group(agent_ids=["g0"]), state=STATES[3], pages_total=16, instance_id="i"
    )
    residency = {"g0": cluster_pb2.AgentResidency(agent_id="g0", shards=[shard])}
    without = Records({"g0": agent_record("g0")}, residency, {}, {}, {}, {})
    view = View()
    for slots in (0, 7, 3):
        instances = {"i": cluster_pb2.InstanceRecord(id="i", model="a", slots=slots)} if slots else {}
        seen = view.see(replace(without, instances=instances))
        assert seen.replicas["a", ("g0",)].slots == slots
