"""warmctl plan, models pin and set, agents cordon: a process, against a real etcd."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.sdk.cluster_state import group, reason
from tests.sdk.conftest import Warmctl, words
from warmserve.admin.edit import edit
from warmserve.admin.target import CommandError
from warmserve.admin.units import now_ms
from warmserve.cluster.keys import Keys
from warmserve.cluster.store import Store
from warmserve.v1 import cluster_pb2


def action(kind: str, model: str, agents: tuple[str, ...], text: str, **more: Any) -> cluster_pb2.Action:
    return cluster_pb2.Action(
        kind=cluster_pb2.ActionKind.Value(f"ACTION_KIND_{kind}"),
        model=model,
        group=group(*agents),
        reason=reason("MADE_ROOM", text, **more),
    )


async def plan(store: Store, keys: Keys, *actions: cluster_pb2.Action, advisory: bool = False) -> None:
    lost = cluster_pb2.Competitor(model="org/llama", won=False, score=3.5, group=group("a1"))
    won = cluster_pb2.Competitor(model="sharded", won=True, score=0.25, group=group("a0"))
    qwen = cluster_pb2.ModelOutlook(
        model="qwen",
        burst_replicas=1,
        reason=reason("MADE_ROOM", "llama's is worth more"),
        competitors=[lost, won],
        capacity=8,
        capacity_source="assumed, until an instance reports",
    )
    await store.put(
        keys.plan(),
        cluster_pb2.Plan(
            fence=5,
            made_unix_ms=now_ms() - 4000,
            planner="expected value",
            placer_id="p0",
            actions=actions,
            outlooks=[qwen],
            advisory=advisory,
        ),
    )


# ---- plan


async def test_plan_show_has_actions_with_reasons_and_scores(
    warmctl: Warmctl, cluster: None, store: Store, keys: Keys
) -> None:
    await plan(store, keys, action("WARM", "qwen", ("a1",), "its peak needs 1", score=0.75))
    text = words((await warmctl("plan", "show")).out)
    assert "by p0, by the expected value rule" in text
    assert "warm qwen a1 0.75 its peak needs 1" in text
    assert "qwen 0 + 1 0 0 8 llama's is worth more" in text
    document = (await warmctl("plan", "show", "-o", "json")).json
    assert (document["advisory"], document["actions"][0]["reason"]["score"]) == (False, 0.75)
    assert document["outlooks"][0]["capacity_source"] == "assumed, until an instance reports"


async def test_plan_explain_names_competitors(warmctl: Warmctl, cluster: None, store: Store, keys: Keys) -> None:
    await plan(store, keys)
    for arguments in (("plan", "explain"), ("plan", "explain", "qwen"), ("explain", "qwen")):
        text = words((await warmctl(*arguments)).out)
        assert "qwen is cold: llama's is worth more" in text
        assert "lost to org/llama on a1, worth 3.5 s of waiting to it" in text
        assert "won against sharded on a0, worth 0.25 s of waiting to it" in text
    assert "sharded is warm: the newest plan does not mention it" in words((await warmctl("plan", "explain")).out)
    [document] = (await warmctl("plan", "explain", "qwen", "-o", "json")).json
    assert [(c["model"], c["won"]) for c in document["competitors"]] == [("org/llama", False), ("sharded", True)]
    unknown = await warmctl("plan", "explain", "qwem")
    assert (unknown.status, unknown.err) == (1, "Error: no model 'qwem' is deployed: did you mean qwen?\n")


async def test_plan_diff_compares_with_what_is_now(warmctl: Warmctl, cluster: None, store: Store, keys: Keys) -> None:
    half = action("EVICT", "sharded", ("a0", "a1"), "gives 5 pages", by_model="qwen", score=0.25)
    half.keep_residency = 0.5
    done_already = action("WAKE", "org/llama", ("a0",), "2 requests wait")
    await plan(store, keys, half, action("WARM", "qwen", ("a1",), "its peak needs 1"), done_already, advisory=True)
    diff = (await warmctl("plan", "diff", "-o", "json")).json
    assert [
        (c["model"], c["now"], c["then"], c["residency_now"], c["residency_then"], c["actions"])
        for c in diff["changes"]
    ] == [
        ("sharded", "warm", "warm", 0.75, 0.5, ["evict"]),
        ("qwen", "cold", "warm", 0.0, 1.0, ["warm"]),
    ]
    assert (diff["unchanged"], diff["advisory"]) == (1, True)
    text = words((await warmctl("plan", "diff")).out)
    assert "would change 2 replica(s)" in text
    assert "sharded a0 + a1 warm warm 75 % -> 50 % 0.25 gives 5 pages" in text


async def test_without_a_plan_each_says_so(warmctl: Warmctl) -> None:
    for command in ("show", "diff", "explain"):
        done = await warmctl("plan", command)
        assert done.status == 0
        assert "No plan has been made yet" in done.out


async def test_advisory_is_switched_and_told(warmctl: Warmctl, cluster: None, store: Store, keys: Keys) -> None:
    assert "are carried out" in (await warmctl("plan", "advisory")).out
    assert (await warmctl("plan", "advisory", "on", "-o", "json")).json == {"advisory": True, "by": "operator"}
    written = await store.get(keys.placer_mode(), cluster_pb2.PlacerMode)
    assert written is not None
    assert written.value.advisory
    for command in (("status",), ("plan", "show"), ("explain", "qwen")):
        assert "the placer only advises" in (await warmctl(*command)).out
    assert (await warmctl("plan", "advisory", "off", "-o", "json")).json["advisory"] is False
    assert "the placer only advises" not in (await warmctl("status")).out
    await plan(store, keys, advisory=True)
    assert "started with --advisory" in (await warmctl("plan", "advisory")).out
    assert (await warmctl("plan", "advisory", "maybe")).status == 2


# ---- models pin, unpin, set


async def spec_of(store: Store, keys: Keys, model: str) -> cluster_pb2.ModelSpec:
    entry = await store.get(keys.model(model), cluster_pb2.ModelSpec)
    assert entry is not None
    return entry.value


async def test_pin_and_unpin(warmctl: Warmctl, cluster: None, store: Store, keys: Keys) -> None:
    assert (await warmctl("models", "pin", "qwen", "--replicas", "2")).out == "qwen: pinned_replicas 0 -> 2.\n"
    assert (await spec_of(store, keys, "qwen")).pinned_replicas == 2
    assert "replicas pinned 2" in words((await warmctl("models", "describe", "qwen")).out)
    assert "nothing has changed" in (await warmctl("models", "pin", "qwen", "--replicas", "2")).out
    assert (await warmctl("models", "unpin", "qwen", "-o", "json")).json["pinned_replicas"] == 0
    unknown = await warmctl("models", "pin", "qwem")
    assert (unknown.status, unknown.err) == (1, "Error: no model 'qwem' is deployed: did you mean qwen?\n")
    assert (await warmctl("models", "pin", "qwen", "--replicas", "0")).status == 2


async def test_set_changes_only_what_is_given(warmctl: Warmctl, cluster: None, store: Store, keys: Keys) -> None:
    before = await spec_of(store, keys, "qwen")
    done = await warmctl(
        *("models", "set", "qwen", "--min-replicas", "1", "--max-replicas", "3", "--priority", "2.5"),
        *("--ttft-p95-ms", "500", "--tpot-ms", "20", "--max-batch", "16"),
    )
    assert done.out == (
        "qwen: priority 0 -> 2.5, min_replicas 0 -> 1, max_replicas 0 -> 3, "
        "ttft_p95_ms 0 -> 500, tpot_ms 0 -> 20, max_batch 0 -> 16.\n"
    )
    await warmctl("models", "set", "qwen", "--tpot-ms", "0")
    wanted = cluster_pb2.ModelSpec()
    wanted.CopyFrom(before)
    wanted.min_replicas, wanted.max_replicas, wanted.priority = 1, 3, 2.5
    wanted.target.ttft_p95_ms = 500
    wanted.limits.max_batch = 16
    after = await spec_of(store, keys, "qwen")
    assert after == wanted


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (("qwen",), 2, "give at least one option"),
        (("qwen", "--min-replicas", "3", "--max-replicas", "2"), 1, "min_replicas is 3, more than max_replicas"),
        (("qwen", "--priority", "inf"), 1, "priority is inf"),
        (("qwen", "--priority", "-1"), 2, "--priority"),
        (("qwen", "--tpot-ms", "inf"), 1, "tpot_ms is inf"),
        (("qwem", "--min-replicas", "1"), 1, "did you mean qwen?"),
    ],
)
async def test_set_refuses_what_cannot_be(
    warmctl: Warmctl, cluster: None, store: Store, keys: Keys, arguments: tuple[str, ...], status: int, says: str
) -> None:
    before = await spec_of(store, keys, "qwen")
    done = await warmctl("models", "set", *arguments)
    assert (done.status, done.out) == (status, "")
    assert says in words(done.err)
    assert await spec_of(store, keys, "qwen") == before


async def test_nothing_is_lost_when_many_change_a_model_at_once(cluster: None, store: Store, keys: Keys) -> None:
    async def add(field: str) -> None:
        def change(spec: cluster_pb2.ModelSpec) -> None:
            setattr(spec, field, getattr(spec, field) + 1)

        await edit(store, keys.model("qwen"), cluster_pb2.ModelSpec, change, "gone")

    await asyncio.gather(*(add(field) for field in ("min_replicas", "pinned_replicas") for _ in range(4)))
    after = await spec_of(store, keys, "qwen")
    assert (after.min_replicas, after.pinned_replicas) == (4, 4)
    await store.delete(keys.model("qwen"))
    with pytest.raises(CommandError, match="gone"):
        await add("min_replicas")
    assert await store.get(keys.model("qwen"), cluster_pb2.ModelSpec) is None


# ---- agents cordon, uncordon


async def test_cordon_and_uncordon(warmctl: Warmctl, cluster: None, store: Store, keys: Keys) -> None:
    assert "a0 is cordoned: nothing new is placed on it" in (await warmctl("agents", "cordon", "a0")).out
    written = await store.get(keys.control("a0"), cluster_pb2.AgentControl)
    assert written is not None
    assert (written.value.cordoned, written.value.drained) == (True, False)
    assert "is not being drained" in (await warmctl("agents", "drain", "a0", "--undo")).err
    assert "a0 is draining" in (await warmctl("agents", "drain", "a0")).out
    refused = await warmctl("agents", "cordon", "a0")
    assert (refused.status, "is being drained already" in refused.err) == (1, True)
    assert (await warmctl("agents", "uncordon", "a0", "-o", "json")).json["control"] == ""
    assert await store.get(keys.control("a0"), cluster_pb2.AgentControl) is None
    undone = await warmctl("agents", "uncordon", "a0")
    assert (undone.status, undone.err) == (1, "Error: a0 is neither cordoned nor drained\n")
