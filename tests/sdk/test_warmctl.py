"""warmctl as its users run it: a process, against a real etcd and Redis whose state is as the services write it."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from redis.asyncio import Redis

from tests.sdk.cluster_state import PAGE, agent, group, reason, shard, spec, write_busy_agent, write_events
from tests.sdk.conftest import Warmctl, words
from tests.sdk.inference_server import unused_address
from warmserve.admin.units import now_ms
from warmserve.cluster.keys import Keys
from warmserve.cluster.mirror import Mirror
from warmserve.cluster.store import Store
from warmserve.v1 import cluster_pb2, common_pb2, placement_pb2, placement_pb2_grpc


def ageless(text: str) -> str:
    """The words of a text, whatever the time is: "3 min 4 s ago" becomes AGO."""
    return re.sub(r"([\d.]+ (ms|s|min|h|d) )+ago", "AGO", words(text))


# ---- models


async def test_models_list_shows_how_ready_each_is(warmctl: Warmctl, cluster: None) -> None:
    table = await warmctl("models", "list")
    assert table.status == 0
    assert re.search(r"org/llama +active +1 active +LlamaForCausalLM +8.03B +1 +8192 +2 h 0 min ago", table.out)
    assert re.search(r"sharded +warm +1 warm ", table.out)
    assert re.search(r"qwen +cold +- ", table.out)
    for arguments in (("models", "list", "-o", "json"), ("-o", "json", "models", "list")):
        models = (await warmctl(*arguments)).json
        assert [(model["name"], model["state"], model["tp"]) for model in models] == [
            ("org/llama", "active", 1),
            ("qwen", "cold", 1),
            ("sharded", "warm", 2),
        ]
        assert models[0]["parameters"] == 8_030_000_000
        assert models[2]["replicas"] == {"active": 0, "warm": 1, "draining": 0, "warming": 0, "cold": 0}


async def test_models_list_of_an_empty_cluster(warmctl: Warmctl) -> None:
    assert "No model is deployed" in (await warmctl("models", "list")).out
    assert (await warmctl("models", "list", "-o", "json")).json == []


async def test_models_describe_shows_the_spec_and_where_replicas_are(warmctl: Warmctl, cluster: None) -> None:
    described = (await warmctl("models", "describe", "sharded", "-o", "json")).json
    assert described["spec"]["facts"]["shard_bytes"] == 10 * (16 << 20)
    assert described["spec"]["limits"] is None
    [replica] = described["replicas"]
    assert (replica["agents"], replica["state"], replica["residency"]) == (["a0", "a1"], "warm", 0.75)
    assert (described["instances"], described["transitions"]) == ([], [])
    text = words((await warmctl("models", "describe", "sharded")).out)
    assert "/models/sharded" in text
    assert "a0 + a1 warm" in text
    assert "75 %" in text
    assert "No events about it." in text


async def test_models_describe_shows_instances_and_the_last_transitions(
    warmctl: Warmctl, cluster: None, store: Store, redis: Redis, keys: Keys
) -> None:
    await write_busy_agent(store, keys)
    await write_events(redis, keys)
    llama = words((await warmctl("models", "describe", "org/llama")).out)
    assert "i-1 a0 active 3 of 8 6.25 to 8 ms 400 MiB" in llama
    assert llama.count("2 requests wait") == 1 + 10  # of the replica, and of the last transitions
    qwen = ageless((await warmctl("models", "describe", "qwen")).out)
    assert "a0 warming AGO 40 % (33.6 MB/s) 64.0 MiB" in qwen
    assert "warmed warming → warm a1 1.2 s 160 MiB at 168 MB/s from host its peak needs 1" in qwen
    assert "evicted warm → cold a1 its pages are worth more elsewhere (for sharded)" in qwen
    warmctl.environment["WARMSERVE_REDIS_URL"] = f"redis://{unused_address()}/0"
    done = await warmctl("models", "describe", "qwen", "-o", "json")
    assert (done.status, done.json["transitions"]) == (0, None)
    assert "events are left out" in done.err


async def test_an_unknown_model_is_answered_with_the_nearest_names(warmctl: Warmctl, cluster: None) -> None:
    for command in (("models", "describe"), ("models", "undeploy", "--yes"), ("explain",)):
        done = await warmctl(*command, "qwem")
        assert (done.status, done.out) == (1, "")
        assert done.err == "Error: no model 'qwem' is deployed: did you mean qwen?\n"


async def test_undeploy_deletes_the_model_and_nothing_else(
    warmctl: Warmctl, cluster: None, store: Store, keys: Keys
) -> None:
    done = await warmctl("models", "undeploy", "org/llama")  # nobody is there to answer, so nobody is asked
    assert (done.status, done.out) == (0, "Undeployed org/llama.\n")
    left = await store.get_all(keys.models(), cluster_pb2.ModelSpec)
    assert [entry.value.name for entry in left] == ["qwen", "sharded"]
    assert (await warmctl("models", "undeploy", "org/llama")).status == 1


@pytest.mark.parametrize(("answer", "stays"), [(b"n\n", True), (b"y\n", False)])
async def test_undeploy_asks_at_a_terminal(
    warmctl: Warmctl, cluster: None, store: Store, keys: Keys, answer: bytes, stays: bool
) -> None:
    ours, theirs = pty.openpty()
    os.write(ours, answer)
    done = await warmctl("models", "undeploy", "org/llama", stdin=theirs)
    os.close(theirs)
    os.close(ours)
    assert "Undeploy org/llama, which 1 active instance(s) serve now," in done.err
    assert done.status == (1 if stays else 0)
    assert (await store.get(keys.model("org/llama"), cluster_pb2.ModelSpec) is not None) is stays


# ---- deploy


class Placer(placement_pb2_grpc.PlacementServiceServicer):
    """Deploys as the placer does: progress, then the model, which is then in etcd. Or refuses."""

    def __init__(self, store: Store, keys: Keys) -> None:
        self._store = store
        self._keys = keys
        self.refusal: tuple[grpc.StatusCode, str] | None = None
        self.asked: list[cluster_pb2.ModelSpec] = []

    async def DeployModel(
        self, request: placement_pb2.DeployModelRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[placement_pb2.DeployModelResponse]:
        self.asked.append(request.spec)
        yield placement_pb2.DeployModelResponse(stage="checking on node-1")
        if self.refusal is not None:
            await context.abort(*self.refusal)
        for part in (1, 2):
            yield placement_pb2.DeployModelResponse(
                stage="writing the image on node-1", bytes_done=part << 20, bytes_total=2 << 20
            )
        deployed = spec(request.spec.name)
        deployed.MergeFrom(request.spec)
        await self._store.create(self._keys.model(deployed.name), deployed)
        yield placement_pb2.DeployModelResponse(stage="deployed", spec=deployed)


@pytest.fixture
async def placer(store: Store, keys: Keys) -> AsyncIterator[Placer]:
    """A leading placer."""
    placer = Placer(store, keys)
    server = grpc.aio.server()
    placement_pb2_grpc.add_PlacementServiceServicer_to_server(placer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    await store.put(keys.placer_leader(), cluster_pb2.LeaderRecord(id="p0", address=f"127.0.0.1:{port}"))
    yield placer
    await server.stop(0)


async def test_deploy_has_the_leading_placer_deploy(warmctl: Warmctl, placer: Placer, tmp_path: Path) -> None:
    done = await warmctl(
        *("models", "deploy", "org/new-model", "--source", "checkpoint", "--dtype", "bf16", "--tp", "2"),
        *("--max-context-tokens", "4096", "--max-batch", "8", "--priority", "2.5", "--min-replicas", "1"),
        *("--max-replicas", "3", "--ttft-p95-ms", "500", "--tpot-ms", "20"),
        cwd=tmp_path,
    )
    assert (done.status, done.err) == (0, "checking on node-1\nwriting the image on node-1\n")
    assert done.out.startswith("Deployed org/new-model: LlamaForCausalLM, 8.03B parameters, 160 MiB per shard")
    assert placer.asked == [
        cluster_pb2.ModelSpec(
            name="org/new-model",
            source=f"{tmp_path}/checkpoint",
            dtype=common_pb2.D_TYPE_BF16,
            tp=2,
            limits=cluster_pb2.ModelLimits(max_context_tokens=4096, max_batch=8),
            target=cluster_pb2.ServiceTarget(ttft_p95_ms=500, tpot_ms=20),
            priority=2.5,
            min_replicas=1,
            max_replicas=3,
        )
    ]
    document = (await warmctl("models", "deploy", "other", "--source", "/m", "-o", "json")).json
    assert (document["name"], document["source"], document["facts"]["layers"]) == ("other", "/m", 32)


async def test_deploy_waits_until_the_model_is_active(
    warmctl: Warmctl, placer: Placer, store: Store, keys: Keys
) -> None:
    models = Mirror(store, keys.models(), cluster_pb2.ModelSpec)
    await models.start()
    process = await warmctl.start("models", "deploy", "m", "--source", "/m", "--min-replicas", "1", "--wait")
    await models.wait_for(lambda found: "m" in found)
    await models.close()
    assert process.stderr is not None
    while b"waiting for 1 active" not in (line := await process.stderr.readline()):
        assert line
    assert process.returncode is None
    await store.put(
        keys.instance("m", "i-9"),
        cluster_pb2.InstanceRecord(id="i-9", model="m", group=group("a0"), state=common_pb2.REPLICA_STATE_ACTIVE),
    )
    out, _ = await process.communicate()
    assert process.returncode == 0
    assert b"Deployed m" in out


async def test_deploy_stops_waiting_for_a_model_that_is_undeployed(
    warmctl: Warmctl, placer: Placer, store: Store, keys: Keys
) -> None:
    process = await warmctl.start("models", "deploy", "m", "--source", "/m", "--min-replicas", "1", "--wait")
    assert process.stderr is not None
    while b"waiting for 1 active" not in (line := await process.stderr.readline()):
        assert line
    await store.delete(keys.model("m"))
    _, err = await process.communicate()
    assert (process.returncode, err) == (1, b"Error: m was undeployed while waiting for it\n")


async def test_deploy_passes_on_what_the_placer_refuses(warmctl: Warmctl, placer: Placer) -> None:
    placer.refusal = (grpc.StatusCode.INVALID_ARGUMENT, "model.safetensors is truncated: 10 of 20 bytes are there")
    done = await warmctl("models", "deploy", "m", "--source", "/m")
    assert (done.status, done.out) == (1, "")
    assert done.err.endswith("Error: model.safetensors is truncated: 10 of 20 bytes are there\n")


async def test_deploy_without_a_leader(warmctl: Warmctl, store: Store, keys: Keys) -> None:
    done = await warmctl("models", "deploy", "m", "--source", "/m")
    assert done.status == 1
    assert "no placer leads" in done.err
    gone = unused_address()
    await store.put(keys.placer_leader(), cluster_pb2.LeaderRecord(id="p0", address=gone))
    done = await warmctl("models", "deploy", "m", "--source", "/m")
    assert done.status == 1
    assert f"placer p0 at {gone}: " in done.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("models", "deploy", "m"), "--source"),
        (("models", "deploy", "../m", "--source", "/m"), "model name '../m' is not allowed"),
        (("models", "deploy", "m", "--source", "/m", "--tp", "0"), "--tp"),
        (("models", "deploy", "m", "--source", "/m", "--dtype", "int3"), "--dtype"),
        (("models", "deploy", "m", "--source", "/m", "--wait"), "--min-replicas"),
        (("models", "deploy", "m", "--source", "/m", "--min-replicas", "2", "--max-replicas", "1"), "--max-replicas"),
        (("models", "lst"), "lst"),
        (("--etcd", "nonsense", "status"), "not host:port"),
        (("--prefix", "a/b", "status"), "--prefix"),
        (("status", "-o", "xml"), "xml"),
        (("events", "-n", "-1"), "-n"),
    ],
)
async def test_usage_errors_have_status_2(warmctl: Warmctl, arguments: tuple[str, ...], says: str) -> None:
    done = await warmctl(*arguments)
    assert (done.status, done.out) == (2, "")
    assert says in words(done.err)


# ---- agents


async def test_agents_list_shows_what_memory_holds(warmctl: Warmctl, cluster: None, store: Store, keys: Keys) -> None:
    await store.put(keys.agent("a2"), agent("a2", 2))
    await store.put(keys.control("a1"), cluster_pb2.AgentControl(cordoned=True, drained=True))
    await store.put(keys.control("a2"), cluster_pb2.AgentControl(cordoned=True))
    await store.put(keys.control("gone"), cluster_pb2.AgentControl(drained=True))
    agents = {agent["id"]: agent for agent in (await warmctl("agents", "list", "-o", "json")).json}
    assert {name: agent["control"] for name, agent in agents.items()} == {
        "a0": "",
        "a1": "draining",
        "a2": "cordoned",
        "gone": "drained",
    }
    assert (agents["a0"]["models"], agents["a0"]["instances"]) == (["org/llama", "sharded"], 1)
    assert (agents["gone"]["registered"], agents["a0"]["pages_free"]) == (False, 70)
    table = (await warmctl("agents", "list")).out
    assert re.search(r"a0 +node-1 +0 Test GPU \(host\) +ready +1.56 GiB +██▓▓▓░+ 30 % +2 +1 +1 h 0 min", table)
    assert re.search(r"gone +- +- +not registered, drained", table)


async def test_agents_describe_draws_the_arena_and_the_tiers(
    warmctl: Warmctl, cluster: None, store: Store, keys: Keys
) -> None:
    await write_busy_agent(store, keys)
    done = await warmctl("agents", "describe", "a0")
    assert (done.status, done.err) == (0, "")
    lines = [line.rstrip() for line in done.out.splitlines()]
    [drawn] = [index for index, line in enumerate(lines) if line.startswith("  ██")]
    bar, below = lines[drawn][2:], lines[drawn + 1][2:]
    # 64 cells for 100 pages: llama's weights and KV; what sharded and qwen lend; what is being copied in; what is free.
    assert re.fullmatch(r"█+▓+▄+▁+·+░+", bar)
    assert [bar.count(glyph) for glyph in "█▓▄▁·░"] == [6, 16, 6, 10, 5, 21]
    assert [(letter, bar[place]) for place, letter in enumerate(below) if letter != " "] == [
        ("a", "█"),
        ("b", "▄"),
        ("c", "▄"),
    ]
    text = ageless(done.out)
    for piece in (
        "a org/llama active 1 min",
        " 100 % 160 MiB - 400 MiB 3 - 2 requests wait",
        "b sharded warm 1 min",
        " 50 % 80.0 MiB 80.0 MiB - - 0.25 s peak",
        "qwen host → gpu ██████░░░░░░░░░░ 40 % 160 MiB 33.6 MB/s 3.0 s",
        "org/llama disk → host ████████░░░░░░░░ 50 % 160 MiB 1.00 GB/s 84 ms",
        "sharded remote → disk ████░░░░░░░░░░░░ 25 % 64.0 MiB - -",
        "gpu 960 MiB ██████████░░░░░░ 60 % 1.56 GiB 640 MiB free, of which 128 MiB promised to KV, 144 MiB of weights",
        "host 160 MiB ██░░░░░░░░░░░░░░ 10 % 1.56 GiB 1 image(s) in memory",
        "disk 11.7 GiB ████████████░░░░ 75 % 15.6 GiB 3 image(s) of 480 MiB; 3.91 GiB free",
        "org/llama 160 MiB - - yes",
        "qwen 160 MiB yes 3.5 requests yes",
        "no deployed model (0123-float32-4096.image) 160 MiB - - yes",
    ):
        assert piece in text
    described = (await warmctl("agents", "describe", "a0", "-o", "json")).json
    assert [(s["model"], s["weight_pages"], s["lent_pages"], s["kv_pages"]) for s in described["shares"]] == [
        ("org/llama", 10, 0, 25),
        ("sharded", 5, 5, 0),
        ("qwen", 4, 4, 0),
    ]
    assert described["pages_arriving"] == 35 - 19
    assert [(c["models"], c["target"], c["bytes_done"], c["remaining_ms"]) for c in described["copies"]] == [
        (["qwen"], "gpu", 4 * PAGE, 3000),
        (["org/llama"], "host", 5 * PAGE, pytest.approx(5 * PAGE / 1e6)),
        (["sharded"], "disk", PAGE, None),
    ]


async def test_what_is_drawn_fits_where_it_is_watched(
    warmctl: Warmctl, cluster: None, store: Store, keys: Keys
) -> None:
    await write_busy_agent(store, keys)
    warmctl.environment["COLUMNS"] = "80"  # as watch(1) does
    lines = (await warmctl("agents", "describe", "a0")).out.splitlines()
    assert max(len(line.rstrip()) for line in lines) <= 80
    assert any(line.strip() == "2 requests wait" for line in lines)


async def test_agents_describe_of_one_that_has_little_to_say(
    warmctl: Warmctl, cluster: None, store: Store, keys: Keys
) -> None:
    done = await warmctl("agents", "describe", "a00")
    assert (done.status, done.err) == (1, "Error: no agent 'a00': did you mean a0?\n")
    await store.put(keys.control("gone"), cluster_pb2.AgentControl(drained=True))
    assert "not registered, drained" in (await warmctl("agents", "describe", "gone")).out
    await store.put(keys.agent("a2"), agent("a2", 2))
    assert "has not told yet" in (await warmctl("agents", "describe", "a2")).out
    await store.put(
        keys.residency("a2"), cluster_pb2.AgentResidency(agent_id="a2", pages_free=100, updated_unix_ms=now_ms())
    )
    empty = words((await warmctl("agents", "describe", "a2")).out)
    assert "░" * 64 in empty
    assert "No model is resident." in empty
    assert "no images are kept in memory (host_tier_bytes is 0)" in empty


async def test_agents_drain_and_undo(warmctl: Warmctl, cluster: None, store: Store, keys: Keys) -> None:
    before = now_ms()
    done = await warmctl("agents", "drain", "a0")
    assert done.status == 0
    assert "a0 is draining: 1 instance(s) and weights of 2 model(s) (org/llama, sharded)" in done.out
    written = await store.get(keys.control("a0"), cluster_pb2.AgentControl)
    assert written is not None
    assert written.value.drained
    assert written.value.cordoned
    assert written.value.set_unix_ms >= before

    await warmctl("agents", "drain", "a0")  # again: the wish stays as it is
    again = await store.get(keys.control("a0"), cluster_pb2.AgentControl)
    assert again is not None
    assert again.mod_revision == written.mod_revision

    left = cluster_pb2.AgentResidency(agent_id="a0")
    left.shards.append(shard("sharded", "COLD", 0, group("a0", "a1"), reason=reason("OPERATOR", "a0 is to be left")))
    await store.put(keys.residency("a0"), left)  # which also tells why what is not there went
    assert "a0 is drained" in (await warmctl("agents", "drain", "a0")).out
    assert (await warmctl("agents", "drain", "a0", "--undo", "-o", "json")).json["control"] == ""
    assert await store.get(keys.control("a0"), cluster_pb2.AgentControl) is None
    undone = await warmctl("agents", "drain", "a0", "--undo")
    assert (undone.status, undone.err) == (1, "Error: a0 is not being drained\n")


async def test_drain_of_an_unknown_agent(warmctl: Warmctl, cluster: None, store: Store, keys: Keys) -> None:
    done = await warmctl("agents", "drain", "a00")
    assert (done.status, done.err) == (1, "Error: no agent 'a00': did you mean a0?\n")
    assert await store.get_all(keys.controls(), cluster_pb2.AgentControl) == []


# ---- status, explain


async def test_status_on_one_screen(warmctl: Warmctl, cluster: None) -> None:
    screen = words((await warmctl("status")).out)
    for piece in (
        "placer p0 at 127.0.0.1:9",
        "by the published rule, 1 action(s)",
        "by the published predictor",
        "r0 (127.0.0.1:8000, http://127.0.0.1:8080)",
        "active 1 org/llama",
        "warm 1 sharded",
        "cold 1 qwen",
    ):
        assert piece in screen
    status = (await warmctl("status", "-o", "json")).json
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", status["etcd_version"])
    assert status["models"] == {"active": ["org/llama"], "warm": ["sharded"], "cold": ["qwen"]}
    assert status["notes"] == []
    assert (status["leader"]["id"], status["plan_actions"]) == ("p0", 1)


async def test_status_of_an_empty_cluster_says_what_is_missing(warmctl: Warmctl) -> None:
    done = await warmctl("status")
    assert done.status == 0
    for missing in ("no placer leads", "no agent is registered", "no router is registered", "No model is deployed"):
        assert missing in done.out


async def test_status_names_what_it_cannot_read(warmctl: Warmctl, cluster: None, store: Store, keys: Keys) -> None:
    await store._call(lambda client: client.put(keys.model("bad").encode(), b"{not json"))
    status = (await warmctl("status", "-o", "json")).json
    [note] = status["notes"]
    assert keys.model("bad") in note
    assert "qwen" in status["models"]["cold"]


async def test_explain_gives_the_plans_reason(warmctl: Warmctl, cluster: None, redis: Redis, keys: Keys) -> None:
    await write_events(redis, keys)
    why = "sharded saves 3.1 s with these pages, qwen 0.2 s"
    text = words((await warmctl("explain", "qwen")).out)
    for piece in (
        f"qwen is cold: {why}",
        "0 for the mean load, 1 for its peak",
        "mean 0.25 (p90 0.75), peak 1.50 (p90 4.00) requests in progress",
        "evict a1 its pages are worth more elsewhere (for sharded)",
        "warmed warming → warm a1 1.2 s 160 MiB at 168 MB/s from host its peak needs 1",
        "evicted warm → cold a1 its pages are worth more elsewhere (for sharded)",
        "nothing of it is resident",
    ):
        assert piece in text
    explained = (await warmctl("explain", "qwen", "-o", "json")).json
    assert (explained["state"], explained["why"]) == ("cold", why)
    assert explained["outlook"]["reason"] == {
        "cause": "made_room",
        "text": why,
        "by_model": "sharded",
        "score": 0.0,
    }
    assert [event["kind"] for event in explained["events"]] == ["warmed", "evicted"]
    assert [action["kind"] for action in explained["actions"]] == ["evict"]


async def test_explain_shows_replicas_with_their_reasons(warmctl: Warmctl, cluster: None) -> None:
    text = words((await warmctl("explain", "org/llama")).out)
    assert "org/llama is active: the mean load of the next window needs 1" in text
    assert re.search(r"a0 active .* ago 100 % 160 MiB 240 MiB - the mean load of the next window needs 1", text)


async def test_explain_where_no_plan_speaks_of_it(warmctl: Warmctl, cluster: None, store: Store, keys: Keys) -> None:
    async def why() -> str:
        return str((await warmctl("explain", "sharded", "-o", "json")).json["why"])

    assert await why() == "the newest plan does not mention it"
    late = spec("sharded")
    late.deployed_unix_ms = now_ms()
    await store.put(keys.model("sharded"), late)
    assert "deployed after the newest plan" in await why()
    await store.delete(keys.plan())
    await store.delete(keys.placer_leader())
    explained = (await warmctl("explain", "sharded", "-o", "json")).json
    assert explained["why"] == "no plan has been made yet"
    assert explained["notes"] == ["no placer leads: nothing is placed anew until one does"]


async def test_explain_goes_on_without_redis(warmctl: Warmctl, cluster: None) -> None:
    warmctl.environment["WARMSERVE_REDIS_URL"] = f"redis://{unused_address()}/0"
    done = await warmctl("explain", "qwen", "-o", "json")
    assert done.status == 0
    assert done.json["events"] is None
    assert "events are left out" in done.err


# ---- events


async def test_events_shows_the_newest(warmctl: Warmctl, redis: Redis, keys: Keys) -> None:
    await write_events(redis, keys)
    lines = (await warmctl("events", "-n", "2")).out.splitlines()
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\d [\d:]{8}  woken +org/llama on a1 in 12 ms: 2 requests wait", lines[0].rstrip()
    )
    assert lines[1].rstrip().endswith("qwen on a1: its pages are worth more elsewhere (for sharded)")
    assert len(lines) == 2
    assert len((await warmctl("events", "-o", "json")).json) == 20
    # Past the newest of all to the newest of one model.
    of_qwen = (await warmctl("events", "--model", "qwen", "-o", "json")).json
    assert [(event["kind"], event["bytes"]) for event in of_qwen] == [("warmed", 10 * (16 << 20)), ("evicted", 0)]
    assert (await warmctl("events", "-n", "0", "-o", "json")).json == []
    unknown = await warmctl("events", "--model", "qwem")
    assert (unknown.status, unknown.out) == (0, "")
    assert unknown.err == "Warning: no model 'qwem' is deployed: there is none\n"


async def test_events_of_a_cluster_without_any(warmctl: Warmctl) -> None:
    done = await warmctl("events")
    assert (done.status, done.out, done.err) == (0, "", "")


@pytest.mark.parametrize(("count", "past"), [("0", []), ("5", ["warmed", "evicted"])])
async def test_events_follows_one_model(
    warmctl: Warmctl, redis: Redis, keys: Keys, count: str, past: list[str]
) -> None:
    stream = await write_events(redis, keys)
    process = await warmctl.start("events", "-f", "-n", count, "--model", "qwen", "-o", "json")
    assert process.stdout is not None
    for kind in past:
        assert json.loads(await process.stdout.readline())["kind"] == kind
    if not past:
        await reading(redis)
    for model in ("org/llama", "qwen"):
        await stream.append(
            cluster_pb2.Event(
                unix_ms=now_ms(), kind=cluster_pb2.EVENT_KIND_DRAINED, model=model, reason=reason("OPERATOR", "so said")
            )
        )
    event = json.loads(await process.stdout.readline())
    assert (event["model"], event["kind"], event["reason"]["cause"]) == ("qwen", "drained", "operator")
    process.send_signal(2)  # Ctrl-C
    _, err = await process.communicate()
    assert (process.returncode, err) == (130, b"")


async def reading(redis: Redis) -> None:
    """Returns once somebody blocks on a stream."""
    while not any(client["cmd"] == "xread" for client in await redis.client_list()):
        await asyncio.sleep(0.01)


# ---- servers away, help, completion


async def test_servers_that_do_not_answer(warmctl: Warmctl) -> None:
    warmctl.environment["WARMSERVE_ETCD_ENDPOINTS"] = unused_address()
    for command in (("status",), ("models", "list"), ("agents", "drain", "a0")):
        done = await warmctl(*command)
        assert (done.status, done.out) == (1, "")
        assert "etcd does not answer" in done.err
    warmctl.environment["WARMSERVE_REDIS_URL"] = f"redis://{unused_address()}/0"
    done = await warmctl("events")
    assert done.status == 1
    assert "does not answer" in done.err
    warmctl.environment["WARMSERVE_REDIS_URL"] = "http://127.0.0.1:1"
    done = await warmctl("events")
    assert done.status == 1
    assert "not a Redis URL" in done.err


COMMANDS = [
    *("models deploy", "models list", "models describe", "models undeploy"),
    *("agents list", "agents describe", "agents drain"),
]


@pytest.mark.parametrize("command", ["", *COMMANDS, "status", "explain", "events"])
async def test_help_has_examples(warmctl: Warmctl, command: str) -> None:
    done = await warmctl(*command.split(), "--help")
    assert done.status == 0
    assert f"warmctl {command}".strip() in words(done.out.partition("Examples:")[2])


async def test_shells_complete_model_names(warmctl: Warmctl, cluster: None) -> None:
    async def complete(line: str) -> list[str]:
        position = len(line.split(" ")) - 1
        warmctl.environment |= {
            "_WARMCTL_COMPLETE": "complete_bash",
            "COMP_WORDS": line,
            "COMP_CWORD": str(position),
        }
        return (await warmctl()).out.split()

    assert await complete("warmctl explain q") == ["qwen"]
    assert await complete("warmctl models undeploy ") == ["org/llama", "qwen", "sharded"]
    assert await complete("warmctl agents drain a") == ["a0", "a1"]
    warmctl.environment["WARMSERVE_ETCD_ENDPOINTS"] = unused_address()
    assert await complete("warmctl explain q") == []
