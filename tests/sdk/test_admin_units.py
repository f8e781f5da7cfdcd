"""Numbers for people, and what the views make of unusual states."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.sdk.cluster_state import agent, group, shard, spec
from warmserve.admin import arena_map, render, units, views
from warmserve.admin.plain import plain
from warmserve.admin.state import ClusterState, parse_state
from warmserve.admin.target import console
from warmserve.cluster.keys import Keys
from warmserve.cluster.store import Change, encode
from warmserve.v1 import cluster_pb2, common_pb2


@pytest.mark.parametrize(
    ("said", "text"),
    [
        (units.size(0), "0 B"),
        (units.size(1023), "1023 B"),
        (units.size(1 << 20), "1.00 MiB"),
        (units.size(16_060_000_000), "15.0 GiB"),
        (units.size(5 << 40), "5.00 TiB"),
        (units.quantity(999), "999"),
        (units.quantity(8_030_000_000), "8.03B"),
        (units.quantity(125_400_000), "125M"),
        (units.duration(0), "0 ms"),
        (units.duration(999.4), "999 ms"),
        (units.duration(1200), "1.2 s"),
        (units.duration(59_990), "1 min 0 s"),
        (units.duration(184_000), "3 min 4 s"),
        (units.duration(7_500_000), "2 h 5 min"),
        (units.duration(273_600_000), "3 d 4 h"),
        (units.age(0, 5000), "-"),
        (units.age(4000, 5000), "1.0 s ago"),
        (units.age(6000, 5000), "now"),
        (units.share(0.999), "99 %"),
        (units.share(1), "100 %"),
        (units.bar([(50, "█"), (25, "▓")], 100, 8), "████▓▓░░"),
        (units.bar([], 0, 4), "░░░░"),
    ],
)
def test_numbers_for_people(said: str, text: str) -> None:
    assert said == text


@given(st.lists(st.floats(0, 1e12), min_size=1, max_size=4), st.floats(0, 1e12), st.integers(1, 60))
def test_a_bar_keeps_its_width(parts: list[float], free: float, width: int) -> None:
    drawn = units.bar(
        [(part, character) for part, character in zip(parts, "█▓▒x", strict=False)], sum(parts) + free, width
    )
    assert len(drawn) == width


def sharded(*states: str) -> ClusterState:
    """A replica on a0 + a1; as many of its shards as there are states are reported."""
    both = group("a0", "a1")
    return ClusterState(
        models={"m": spec("m", tp=2)},
        agents={"a0": agent("a0", 0), "a1": agent("a1", 1)},
        residency={
            f"a{index}": cluster_pb2.AgentResidency(shards=[shard("m", state, 10, both)])
            for index, state in enumerate(states)
        },
    )


@pytest.mark.parametrize(
    ("states", "state", "residency"),
    [
        (("ACTIVE", "ACTIVE"), "active", 1.0),
        (("ACTIVE", "WARMING"), "warming", 1.0),
        (("WARM", "ACTIVE"), "warm", 1.0),
        (("WARM",), "cold", 0.5),  # the other agent has nothing of it, or is lost
    ],
)
def test_a_replica_is_as_ready_as_its_least_ready_shard(states: tuple[str, ...], state: str, residency: float) -> None:
    [replica] = views.replicas(sharded(*states))
    assert (replica.state, replica.residency) == (state, residency)
    assert views.model_summaries(sharded(*states))[0].state == state


def test_a_model_is_as_ready_as_its_readiest_replica() -> None:
    state = sharded("WARM", "WARM")
    state.residency["a2"] = cluster_pb2.AgentResidency(shards=[shard("m", "DRAINING", 10, group("a2"))])
    assert views.model_summaries(state)[0].state == "warm"
    state.residency["a3"] = cluster_pb2.AgentResidency(shards=[shard("m", "ACTIVE", 10, group("a3"))])
    assert views.model_summaries(state)[0].state == "active"


def test_a_newer_versions_words_are_shown_as_numbers() -> None:
    future = common_pb2.Reason(cause=99, text="as told")  # type: ignore[arg-type]
    assert plain(future) == {"cause": "99", "text": "as told", "by_model": "", "score": 0.0}


def test_json_keeps_large_numbers_numbers() -> None:
    document = json.loads(json.dumps(plain(spec("m"))))
    assert document["facts"]["parameters"] == 8_030_000_000
    assert document["limits"] is None


def test_models_whose_names_begin_alike_do_not_mix() -> None:
    keys = Keys("c")
    changes = [Change(keys.model(name), encode(spec(name)), 1, 1) for name in ("a", "a/b", "a-b")] + [
        Change(keys.plan() + "ner", b"{}", 1, 1)
    ]
    state = parse_state(changes, keys)
    assert list(state.models) == ["a", "a-b", "a/b"]
    assert state.plan is None


def test_text_from_the_cluster_is_not_markup(capsys: pytest.CaptureFixture[str]) -> None:
    model = spec("m")
    model.source = "/models/[bold]m[/bold]"
    state = ClusterState(models={"m": model})
    console().print(render.model(views.describe(state, "m", None), units.now_ms()))
    assert "/models/[bold]m[/bold]" in capsys.readouterr().out
    unknown = ClusterState(plan=cluster_pb2.Plan(outlooks=[{"model": "m", "reason": {"text": "[red]why[/red]"}}]))
    unknown.models["m"] = model
    console().print(render.explanation(views.explain(unknown, "m", None, 0), 0))
    assert "m is cold: [red]why[/red]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("bytes_per_s", "said"),
    [(0, "0 B/s"), (999, "999 B/s"), (1_500, "1.50 kB/s"), (33_554_432, "33.6 MB/s"), (54.3e9, "54.3 GB/s")],
)
def test_speeds_are_in_powers_of_ten(bytes_per_s: float, said: str) -> None:
    assert units.speed(bytes_per_s) == said


@given(pages=st.lists(st.integers(0, 1000), min_size=1, max_size=40))
def test_an_arena_is_drawn_to_scale_and_leaves_nobody_out(pages: list[int]) -> None:
    drawn = arena_map.cells(pages, 64)
    total = sum(pages)
    assert sum(drawn) == (64 if total else 0)
    for count, cells in zip(pages, drawn, strict=True):
        assert (cells > 0) == (count > 0)
    for one, other in itertools.combinations(zip(pages, drawn, strict=True), 2):
        if one[0] > other[0]:
            assert one[1] >= other[1] - 1
