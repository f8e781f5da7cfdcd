"""What holds of every plan."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.placer.board import Board
from services.placer.decisions import Do
from services.placer.groups import groups
from services.placer.planner import plan
from services.placer.snapshot import Model, Node, Quantiles, Replica, Snapshot, State, Tier, WindowLoad
from services.placer.target import target
from services.placer.value import expected_value, stakes
from tests.placer.cluster import NOW, PAGE, after, agent, pages_on, snapshot, window
from warmserve.v1 import common_pb2

NAMES = ["a", "b", "c", "d"]


@st.composite
def forecasts(draw: st.DrawFn, mean: float) -> tuple[WindowLoad, ...]:
    """Sure ones, unsure ones, old ones, nonsense, and none."""
    spread = draw(st.sampled_from([0, 3, 30]))
    unsure = WindowLoad(NOW, NOW + 300, Quantiles(mean, mean + 1, mean + 2), Quantiles(mean, mean + spread, 2 * spread))
    nonsense = WindowLoad(NOW, NOW + 300, Quantiles(float("nan"), -1, 0), Quantiles(0, 0, 0))
    return draw(
        st.sampled_from(
            [
                (window(NOW, mean, mean + spread),),
                (unsure,),
                (window(NOW - 900, mean),),
                (nonsense,),
                (nonsense, unsure),
                (),
            ]
        )
    )


@st.composite
def models(draw: st.DrawFn, name: str) -> Model:
    mean = draw(st.sampled_from([0, 0.5, 4, 20]))
    minimum = draw(st.sampled_from([0, 0, 0, 1, 2]))
    return Model(
        name,
        draw(st.integers(1, 70)) * PAGE,
        tp=draw(st.sampled_from([1, 1, 2, 4])),
        capacity=draw(st.sampled_from([1, 8])),
        priority=draw(st.sampled_from([0.5, 1, 3])),
        min_replicas=minimum,
        max_replicas=draw(st.sampled_from([0, minimum + 1])),
        cold_load_s=draw(st.floats(0.01, 100)),
        pinned=draw(st.sampled_from([0, 0, 0, 1, 2])),
        ttft_p95_s=draw(st.sampled_from([0, 0.5])),
        load_s=draw(st.sampled_from([{}, {Tier.PEER: 0.1, Tier.HOST: 1.0, Tier.DISK: 20.0}])),
        images={"n0": Tier.HOST, "n1": Tier.DISK},
        service_s=draw(st.sampled_from([0, 5])),
        kv_bytes_per_request=draw(st.sampled_from([0, PAGE / 2])),
        windows=draw(forecasts(mean)),
        waiting=draw(st.sampled_from([0, 0, 1, 30])),
        running=draw(st.integers(0, 8)),
        waited_s=draw(st.sampled_from([0, 1, 20])),
    )


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    """Possible clusters: what is there fits, and one agent holds at most one replica of a model."""
    agents = [
        agent(
            f"g{i}",
            64,
            node=f"n{i // 4}",
            cordoned=draw(st.integers(0, 9)) == 0,
            drained=draw(st.integers(0, 19)) == 0,
        )
        for i in range(draw(st.integers(0, 8)))
    ]
    deployed = [draw(models(name)) for name in NAMES[: draw(st.integers(0, 4))]]
    free = {a.id: 64 for a in agents}
    there: list[Replica] = []
    for name in NAMES:
        known = next((m for m in deployed if m.name == name), None)
        pages = (known.shard_bytes // PAGE) if known else draw(st.integers(1, 20))
        for group in groups(agents, known.tp if known else 1):
            state = draw(st.sampled_from([None, None, *State]))
            if state is None or min(free[a] for a in group) < pages:
                continue
            resident = draw(st.integers(1, pages)) if state is State.WARM else pages
            busy = draw(st.integers(0, 3)) if state in (State.ACTIVE, State.DRAINING) else 0
            one = Replica(
                name,
                group,
                state,
                pages,
                resident,
                running=busy,
                slots=draw(st.sampled_from([0, 8])),
                since_s=NOW - draw(st.sampled_from([0.5, 50])),
                used_s=NOW - draw(st.sampled_from([0.5, 50])),
            )
            there.append(one)
            for a in group:
                free[a] -= one.pages
    agents = [replace(a, pages_kv=draw(st.integers(0, free[a.id]))) for a in agents]
    nodes = {name: Node(name, copy_bytes_per_s=draw(st.sampled_from([0.0, 20.0 * PAGE]))) for name in ("n0", "n1")}
    refused = {("a", ("g1",)): "the image is damaged"} if draw(st.integers(0, 4)) == 0 else {}
    return snapshot(agents, deployed, there, nodes=nodes, refused=refused)


many = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@many
@given(snapshots())
def test_no_agent_gets_more_pages_than_it_has(before: Snapshot) -> None:
    made = plan(before)
    then = after(before, made)
    for agent_id, one in before.agents.items():
        grown = {key for key, r in then.items() if agent_id in r.group} - {r.key for r in before.replicas}
        assert pages_on(then, agent_id) + one.pages_kv <= one.pages_total
        if grown:
            assert pages_on(then, agent_id) + 1 <= one.pages_total  # an instance without any KV serves nothing


@many
@given(snapshots())
def test_every_action_fits_its_replica_and_has_a_reason(before: Snapshot) -> None:
    made = plan(before)
    after(before, made)  # fails where an active or draining replica is evicted
    for action in made.actions:
        assert action.reason.text
        assert action.reason.cause != common_pb2.CAUSE_UNSPECIFIED
    assert [o.model for o in made.outlooks] == sorted(before.models)
    assert all(o.reason.text and o.reason.cause != common_pb2.CAUSE_UNSPECIFIED for o in made.outlooks)


@many
@given(snapshots())
def test_what_is_placed_lies_on_an_aligned_group_with_one_replica_of_a_model_per_agent(before: Snapshot) -> None:
    made = plan(before)
    for action in made.actions:
        if action.do in (Do.WAKE, Do.WARM):
            assert action.group in groups(before.agents.values(), before.models[action.model].tp)
            assert not any(before.agents[a].cordoned or before.agents[a].drained for a in action.group)
    for name in before.models:
        used = [a for r in after(before, made).values() if r.model == name for a in r.group]
        assert len(used) == len(set(used))


@many
@given(snapshots())
def test_the_same_snapshot_gives_the_same_plan(before: Snapshot) -> None:
    shuffled = Snapshot(
        before.now_s,
        dict(reversed(before.agents.items())),
        dict(reversed(before.models.items())),
        tuple(reversed(before.replicas)),
        before.refused,
        before.rules,
        before.nodes,
    )
    assert plan(shuffled) == plan(before)


@many
@given(snapshots())
def test_minimum_and_maximum_of_instances_are_honoured(before: Snapshot) -> None:
    made = plan(before)
    then = after(before, made)
    for name, one in before.models.items():
        serving = [r for r in then.values() if r.model == name and r.state in (State.ACTIVE, State.WAKING)]
        had = [r for r in before.replicas if r.model == name and r.state in (State.ACTIVE, State.WAKING)]
        if one.max_replicas and len(serving) > len(had):
            assert len(serving) <= one.max_replicas
        if len(serving) < one.min_replicas:
            # Only an operator's drain of an agent may lower it, and what is missing could not be woken.
            assert made.wakes[name].outcome.value != "now" or len(serving) > 0
            drained = [a for a in made.actions if a.do is Do.DRAIN and a.model == name]
            assert all(a.reason.cause == common_pb2.CAUSE_OPERATOR for a in drained)


@many
@given(snapshots())
def test_nothing_is_placed_where_it_was_refused(before: Snapshot) -> None:
    for action in plan(before).actions:
        assert action.do not in (Do.WAKE, Do.WARM) or (action.model, action.group) not in before.refused


@many
@given(snapshots())
def test_the_layouts_value_is_the_objective(before: Snapshot) -> None:
    """The search's sum, kept up to date change by change, is what `expected_value` computes afresh."""
    before = replace(
        before,
        refused={},
        rules=replace(before.rules, margin=1.0),
        # Whose pages are not counted as a model's, because it is on an agent that takes nothing, would differ.
        agents={name: replace(one, cordoned=False, drained=False) for name, one in before.agents.items()},
        models={
            n: replace(m, windows=tuple(w for w in m.windows if w.start_s == NOW)) for n, m in before.models.items()
        },
        replicas=tuple(
            r for r in before.replicas if r.model in before.models and r.state in (State.WARM, State.ACTIVE)
        ),
    )
    found = target(Board(before), stakes(before, before.replicas))
    serving = [r for r in before.replicas if r.state is State.ACTIVE]
    laid = [
        Replica(name, found.ids(item.agents), State.WARM, item.pages, item.used)
        for name, seat in found.seats.items()
        for item in seat.order
    ]
    late = sum(  # what has yet to be loaded counts a little less for the search
        seat.stakes.waits[item.rank] * seat.stakes.pain(seat.stakes.cold_s(item.rank))
        for seat in found.seats.values()
        for item in seat.order
        if item.rank < len(seat.stakes.waits) and item.used > seat.held.get(item.agents, 0)
    )
    assert found.layout.value <= expected_value(before, serving + laid) + 1e-6
    assert found.layout.value >= expected_value(before, serving + laid) - late - 1e-6


@many
@given(snapshots())
def test_plans_come_to_rest(before: Snapshot) -> None:
    """Carried out again and again, with nothing new happening, there is soon nothing left to do."""
    now = before
    for _ in range(40):
        made = plan(now)
        if not made.actions:
            return
        settled = []
        for r in after(now, made).values():
            state = {State.WARMING: State.WARM, State.WAKING: State.ACTIVE, State.DRAINING: State.WARM}.get(
                r.state, r.state
            )
            settled.append(replace(r, state=state, resident=r.pages, running=0, since_s=NOW - 50, used_s=NOW - 50))
        quiet = {n: replace(m, waiting=0, running=0, waited_s=0) for n, m in now.models.items()}
        now = replace(now, replicas=tuple(settled), models=quiet)
    raise AssertionError(f"still busy: {[(a.do, a.model, a.group, a.reason.text) for a in made.actions]}")
