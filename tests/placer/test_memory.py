"""What the leader remembers between snapshots."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.common.queues import QueueCounts
from services.placer.memory import Memory
from services.placer.records import Records, View
from services.placer.snapshot import Replica, Rules, Snapshot, State
from warmserve.v1 import cluster_pb2, common_pb2

PAGE = 1 << 20
GROUP = common_pb2.Group(agent_ids=["g0"], node="n0")


def records(*shards: cluster_pb2.ResidentShard, slots: int = 0, deployed: tuple[str, ...] = ("a",)) -> Records:
    return Records(
        agents={"g0": cluster_pb2.AgentRecord(id="g0", node="n0", page_bytes=PAGE, pages_total=64)},
        residency={"g0": cluster_pb2.AgentResidency(agent_id="g0", shards=shards)},
        instances={"a/i": cluster_pb2.InstanceRecord(id="i", model="a", group=GROUP, slots=slots)} if slots else {},
        models={
            name: cluster_pb2.ModelSpec(name=name, facts=cluster_pb2.ModelFacts(shard_bytes=16 * PAGE))
            for name in deployed
        },
        controls={},
        forecasts={},
    )


def shard(state: common_pb2.ReplicaState, running: int = 0, cold_load_ms: float = 0) -> cluster_pb2.ResidentShard:
    return cluster_pb2.ResidentShard(
        model="a",
        group=GROUP,
        state=state,
        pages_total=16,
        pages_resident=16,
        running=running,
        cold_load_ms=cold_load_ms,
    )


def see(memory: Memory, now: float, seen: Records, waiting: int = 0, taken: int = 0) -> Snapshot:
    counts, shown = {"a": QueueCounts(waiting, taken)}, View().see(seen)
    return memory.snapshot(seen, shown.agents, shown.replicas.values(), counts, Rules(), now, 1e9 + now)


def only(snapshot: Snapshot) -> Replica:
    [replica] = snapshot.replicas
    return replica


def ages(snapshot: Snapshot) -> tuple[float, float]:
    """How long the replica has been in its state, and idle."""
    return snapshot.in_state_s(only(snapshot)), snapshot.idle_s(only(snapshot))


def test_time_in_a_state_and_idle_time() -> None:
    memory = Memory()
    see(memory, 0, records(shard(common_pb2.REPLICA_STATE_WARMING)))
    assert ages(see(memory, 5, records(shard(common_pb2.REPLICA_STATE_ACTIVE)))) == (0, 0)
    assert ages(see(memory, 8, records(shard(common_pb2.REPLICA_STATE_ACTIVE, running=2)))) == (3, 0)
    assert ages(see(memory, 12, records(shard(common_pb2.REPLICA_STATE_ACTIVE)))) == (7, 4)
    # Draining is no use: the time goes on.
    drained = see(memory, 13, records(shard(common_pb2.REPLICA_STATE_WARM)))
    assert only(drained).state is State.WARM
    assert ages(drained) == (0, 5)


def test_waiting_is_timed_while_no_instance_is_active() -> None:
    memory = Memory()
    assert see(memory, 0, records(), waiting=3).models["a"].waited_s == 0
    assert see(memory, 4, records(), waiting=1).models["a"].waited_s == 4
    assert see(memory, 5, records(shard(common_pb2.REPLICA_STATE_ACTIVE)), waiting=1).models["a"].waited_s == 0
    assert see(memory, 6, records(), waiting=1).models["a"].waited_s == 0


def test_requests_of_a_draining_instance_are_not_load_of_those_that_stay() -> None:
    seen = records(shard(common_pb2.REPLICA_STATE_DRAINING, running=2))
    assert see(Memory(), 0, seen, taken=5).models["a"].running == 3


def test_measured_loads_and_slots_outlive_the_replica_but_not_the_model() -> None:
    memory = Memory()
    before = see(memory, 0, records()).models["a"]
    assert not before.cold_load_measured
    assert before.capacity == 8
    see(memory, 1, records(shard(common_pb2.REPLICA_STATE_ACTIVE, cold_load_ms=250), slots=3))
    after = see(memory, 2, records()).models["a"]
    assert (after.cold_load_s, after.cold_load_measured, after.capacity) == (0.25, True, 3)
    see(memory, 3, records(deployed=()))
    assert not see(memory, 4, records()).models["a"].cold_load_measured


def test_failed_replicas_are_left_alone_longer_each_time() -> None:
    memory = Memory()
    key = ("a", ("g0",))
    pauses = []
    for attempt in range(4):
        at = 100.0 * attempt
        memory.failed(key, f"try {attempt}", at)
        assert see(memory, at, records()).refused == {key: f"try {attempt}"}
        pauses.append(next(s for s in range(1, 400) if not see(memory, at + s / 8, records()).refused) / 8)
    assert pauses == [0.25, 0.5, 1, 2]
    memory.succeeded(key)
    memory.failed(key, "again", 1000)
    assert not see(memory, 1000.25, records()).refused


def test_the_states_of_a_groups_shards_make_one() -> None:
    def joint(*states: common_pb2.ReplicaState) -> Replica:
        group = common_pb2.Group(agent_ids=["g0", "g1"], node="n0")
        agents = {g: cluster_pb2.AgentRecord(id=g, node="n0", page_bytes=PAGE, pages_total=64) for g in ("g0", "g1")}
        residency = {
            g: cluster_pb2.AgentResidency(
                agent_id=g,
                shards=[
                    cluster_pb2.ResidentShard(model="a", group=group, state=state, pages_total=16, pages_resident=pages)
                ],
            )
            for g, state, pages in zip(("g0", "g1"), states, (16, 10), strict=False)
        }
        return View().see(Records(agents, residency, {}, {}, {}, {})).replicas["a", ("g0", "g1")]

    warm, active = common_pb2.REPLICA_STATE_WARM, common_pb2.REPLICA_STATE_ACTIVE
    assert (joint(warm, warm).state, joint(warm, warm).resident) == (State.WARM, 10)
    assert joint(active, active).state is State.ACTIVE
    assert joint(active, warm).state is State.WARMING
    assert joint(active, common_pb2.REPLICA_STATE_DRAINING).state is State.DRAINING
    assert joint(active).state is State.WARMING
    assert (joint(warm).state, joint(warm).resident) == (State.WARM, 0)


def test_what_is_learnt_of_one_model_leaves_the_others_as_they_are() -> None:
    # What wakes know of a model holds as long as it is the same object.
    memory, both = Memory(), ("a", "b")
    before = see(memory, 0, records(shard(common_pb2.REPLICA_STATE_WARM), deployed=both)).models
    loaded = records(shard(common_pb2.REPLICA_STATE_ACTIVE, cold_load_ms=700), slots=4, deployed=both)
    after = see(memory, 1, loaded).models
    assert after["a"].capacity == 4 != before["a"].capacity
    assert after["b"] is before["b"]


standing = st.none() | st.tuples(st.sampled_from([s for s in State if s is not State.WAKING]), st.integers(0, 1))


@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(0, 3), st.lists(standing, min_size=3, max_size=3)), max_size=12)
)
def test_ages_are_what_they_are_without_remembering_what_has_not_changed(steps) -> None:
    """Unchanged replicas are the same objects, equal ones, or come and go; clocks jump."""
    memory, deployed = Memory(), records(deployed=("a", "b", "c"))
    there: dict[str, Replica] = {}
    since, used, now, jump = {}, {}, 0.0, 1e9
    for seconds, jumps, wanted in steps:
        now += seconds
        jump += 100.0 * (jumps == 3)
        for name, what in zip("abc", wanted, strict=True):
            old = there.get(name)
            if what is None:
                there.pop(name, None)
                since.pop(name, None)
                continue
            state, running = what
            new = Replica(name, ("g0",), state, 16, 16, running=running)
            there[name] = old if old == new and seconds % 2 else new
            drained = old is not None and old.state in (State.ACTIVE, State.DRAINING)
            drained = drained and state in (State.DRAINING, State.WARM)
            if old is None or old.state is not state:
                since[name] = now
            if running or old is None or (old.state is not state and not drained):
                used[name] = now
        seen = memory.snapshot(deployed, {}, list(there.values()), {}, Rules(), now, now + jump)
        found = {r.model: (seen.in_state_s(r), seen.idle_s(r)) for r in seen.replicas}
        assert found == {name: (now - since[name], now - used[name]) for name in there}
