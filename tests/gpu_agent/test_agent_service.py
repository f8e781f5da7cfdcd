"""A whole agent over real gRPC, etcd and Redis: its orders, its states, and the tokens it sends."""

from __future__ import annotations

import asyncio
import re
import signal
import threading
import weakref
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import redis.exceptions
import torch

from launcher.backing import Backing, start_redis
from services.common.queues import RequestQueue
from services.gpu_agent.arena.arena import Arena
from services.gpu_agent.arena.weight_range import WeightRange
from services.gpu_agent.engine import host
from services.gpu_agent.engine.grammar import GrammarCompiler
from services.gpu_agent.engine.loop import EngineLoop
from services.gpu_agent.engine.model import BoundModel
from services.gpu_agent.weights.image import Image
from tests.gpu_agent import checkpoints
from tests.gpu_agent.agent_process import REASON, RunningAgent, running_agent, status_of
from tests.router.peers import make_tokenizer
from warmserve.cluster.keys import Keys
from warmserve.v1 import agent_pb2, cluster_pb2, common_pb2, inference_pb2

PROMPT = [5, 6, 7, 8, 9]


@pytest.fixture
async def agent(etcd: Backing, redis_server: Backing, keys: Keys, tmp_path: Path) -> AsyncIterator[RunningAgent]:
    async with running_agent(etcd.address, redis_server.address, keys.prefix, tmp_path) as agent:
        yield agent


def expected(model: torch.nn.Module, prompt: list[int], count: int) -> list[int]:
    """What transformers generates greedily."""
    output = model.generate(
        torch.tensor([prompt]), max_new_tokens=count, min_new_tokens=count, do_sample=False, eos_token_id=None
    )
    return output[0, len(prompt) :].tolist()


async def test_prepare_tells_facts_and_progress(agent: RunningAgent, tmp_path: Path) -> None:
    model = checkpoints.llama(tmp_path / "m")
    spec = cluster_pb2.ModelSpec(name="m", source=str(tmp_path / "m"))
    answers = [a async for a in agent.stub.PrepareModel(agent_pb2.PrepareModelRequest(spec=spec))]
    assert answers[0].stage == "checking the checkpoint"
    facts = answers[-1].facts
    assert facts.architecture == "LlamaForCausalLM"
    assert facts.parameters == sum(p.numel() for p in model.parameters())
    assert facts.context_tokens == 256
    assert answers[-1].bytes_done == answers[-1].bytes_total == facts.shard_bytes
    assert list((tmp_path / "images").glob("*.image"))


async def test_a_request_is_served_and_forgotten(agent: RunningAgent, tmp_path: Path) -> None:
    model = checkpoints.llama(tmp_path / "m")
    spec = await agent.prepare("m", tmp_path / "m")
    await agent.submit("m", "r0", PROMPT, 12)
    instance = await agent.wake(spec)
    end = await agent.relay.finished("r0")
    assert end.finish_reason == inference_pb2.FINISH_REASON_LENGTH
    assert agent.relay.tokens("r0") == expected(model, PROMPT, 12)
    first = agent.relay.updates["r0"][0]
    assert (first.instance_id, list(first.token_ids)) == (instance, [])
    assert agent.relay.streams == 1
    await agent.until("m", common_pb2.REPLICA_STATE_ACTIVE)
    while await agent.queue.held("m", [instance]):
        await asyncio.sleep(0.01)
    assert await agent.queue.waiting("m") == 0


async def test_cold_warm_active_draining_warm_cold(agent: RunningAgent, tmp_path: Path) -> None:
    checkpoints.llama(tmp_path / "m")
    spec = await agent.prepare("m", tmp_path / "m")
    await agent.warm(spec)
    shard = agent.shard("m")
    assert shard is not None
    assert shard.residency == 1
    assert shard.tier == common_pb2.TIER_GPU
    assert shard.cold_load_ms > 0
    # Repeated orders change nothing.
    answer = await agent.stub.WarmReplica(agent_pb2.WarmReplicaRequest(spec=spec, group=agent.group, reason=REASON))
    assert answer.state == common_pb2.REPLICA_STATE_WARM
    instance = await agent.wake(spec)
    assert await agent.wake(spec) == instance
    code, message = await status_of(agent.stub.EvictReplica(agent_pb2.EvictReplicaRequest(model="m", reason=REASON)))
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    assert "drain it first" in message
    await agent.stub.DrainReplica(agent_pb2.DrainReplicaRequest(model="m", reason=REASON))
    await agent.until("m", common_pb2.REPLICA_STATE_WARM)
    await agent.instances.wait_for(lambda items: not items)
    half = await agent.stub.EvictReplica(agent_pb2.EvictReplicaRequest(model="m", keep_residency=0.5, reason=REASON))
    assert half.state == common_pb2.REPLICA_STATE_WARM
    assert half.pages_freed == shard.pages_total // 2
    rest = await agent.stub.EvictReplica(agent_pb2.EvictReplicaRequest(model="m", reason=REASON))
    assert rest.state == common_pb2.REPLICA_STATE_COLD
    assert rest.pages_freed == shard.pages_total - half.pages_freed
    await agent.residency.wait_for(lambda items: items["g0"].pages_weights == 0)
    following = agent.node.events.follow(after="0")
    assert [(await anext(following))[1].kind for _ in range(7)] == [
        cluster_pb2.EVENT_KIND_WARMING,
        cluster_pb2.EVENT_KIND_WARMED,
        cluster_pb2.EVENT_KIND_WOKEN,
        cluster_pb2.EVENT_KIND_DRAINING,
        cluster_pb2.EVENT_KIND_DRAINED,
        cluster_pb2.EVENT_KIND_EVICTED,
        cluster_pb2.EVENT_KIND_EVICTED,
    ]
    await following.aclose()


async def test_output_is_the_same_after_eviction_and_another_models_use_of_the_pages(
    agent: RunningAgent, tmp_path: Path
) -> None:
    first, second = checkpoints.llama(tmp_path / "a"), checkpoints.checkpoint("qwen3", tmp_path / "b")
    specs = [await agent.prepare(name, tmp_path / name) for name in ("a", "b")]
    for turn, (spec, model) in enumerate([(specs[0], first), (specs[1], second), (specs[0], first)]):
        await agent.wake(spec)
        await agent.submit(spec.name, f"r{turn}", PROMPT, 8)
        await agent.relay.finished(f"r{turn}")
        assert agent.relay.tokens(f"r{turn}") == expected(model, PROMPT, 8)
        await agent.stub.DrainReplica(agent_pb2.DrainReplicaRequest(model=spec.name, reason=REASON))
        await agent.until(spec.name, common_pb2.REPLICA_STATE_WARM)
        await agent.stub.EvictReplica(agent_pb2.EvictReplicaRequest(model=spec.name, reason=REASON))


async def test_draining_finishes_what_runs_and_leaves_what_waits(agent: RunningAgent, tmp_path: Path) -> None:
    checkpoints.llama(tmp_path / "m")
    spec = await agent.prepare("m", tmp_path / "m")
    await agent.wake(spec)
    await agent.submit("m", "r0", PROMPT, 200)
    await agent.relay.some_tokens("r0", 1)
    await agent.stub.DrainReplica(agent_pb2.DrainReplicaRequest(model="m", reason=REASON))
    await agent.submit("m", "r1", PROMPT, 4)
    await agent.until("m", common_pb2.REPLICA_STATE_WARM)
    assert len(agent.relay.tokens("r0")) == 200
    assert await agent.queue.waiting("m") == 1
    assert "r1" not in agent.relay.updates
    await agent.wake(spec)
    await agent.relay.finished("r1")


async def test_a_wake_while_draining_goes_on_serving(agent: RunningAgent, tmp_path: Path) -> None:
    checkpoints.llama(tmp_path / "m")
    spec = await agent.prepare("m", tmp_path / "m")
    instance = await agent.wake(spec)
    await agent.submit("m", "r0", PROMPT, 240)
    await agent.relay.some_tokens("r0", 1)
    await agent.stub.DrainReplica(agent_pb2.DrainReplicaRequest(model="m", reason=REASON))
    assert await agent.wake(spec) == instance
    await agent.submit("m", "r1", PROMPT, 4)
    await agent.relay.finished("r1")
    await agent.relay.finished("r0")


async def test_no_room_is_refused_with_numbers(etcd, redis_server, keys, tmp_path: Path) -> None:
    checkpoints.llama(tmp_path / "a")
    checkpoints.llama(tmp_path / "b", seed=7)
    async with running_agent(etcd.address, redis_server.address, keys.prefix, tmp_path, arena="768KiB") as agent:
        specs = [await agent.prepare(name, tmp_path / name) for name in ("a", "b")]
        await agent.warm(specs[0])
        request = agent_pb2.WarmReplicaRequest(spec=specs[1], group=agent.group, reason=REASON)
        code, message = await status_of(agent.stub.WarmReplica(request))
        assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "more pages on g0" in message


async def test_an_eviction_cuts_warming_short(agent: RunningAgent, tmp_path: Path, monkeypatch) -> None:
    checkpoints.llama(tmp_path / "m")
    spec = await agent.prepare("m", tmp_path / "m")
    for _ in range(20):
        await agent.stub.WarmReplica(agent_pb2.WarmReplicaRequest(spec=spec, group=agent.group, reason=REASON))
        answer = await agent.stub.EvictReplica(agent_pb2.EvictReplicaRequest(model="m", reason=REASON))
        assert answer.state == common_pb2.REPLICA_STATE_COLD
    await agent.residency.wait_for(lambda items: items["g0"].pages_free == agent.settings.arena_bytes // 65536)


async def test_an_older_leaders_orders_are_refused(agent: RunningAgent, tmp_path: Path) -> None:
    checkpoints.llama(tmp_path / "m")
    spec = await agent.prepare("m", tmp_path / "m")
    order = agent_pb2.WarmReplicaRequest(spec=spec, group=agent.group, reason=REASON, fence=7)
    await agent.stub.WarmReplica(order)
    order.fence = 6
    code, message = await status_of(agent.stub.WarmReplica(order))
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    assert "another placer leads" in message


async def test_a_router_cancels_a_sequence(agent: RunningAgent, tmp_path: Path) -> None:
    checkpoints.llama(tmp_path / "m")
    spec = await agent.prepare("m", tmp_path / "m")
    await agent.wake(spec)
    await agent.submit("m", "r0", PROMPT, 250)
    await agent.relay.some_tokens("r0", 1)
    await agent.relay.cancels.put("r0")
    end = await agent.relay.finished("r0")
    assert end.finish_reason == inference_pb2.FINISH_REASON_CANCELLED
    assert len(agent.relay.tokens("r0")) < 250


async def test_a_lost_routers_sequences_end(agent: RunningAgent, tmp_path: Path) -> None:
    checkpoints.llama(tmp_path / "m")
    spec = await agent.prepare("m", tmp_path / "m")
    instance = await agent.wake(spec)
    reserved = agent.residency.items["g0"].pages_kv
    await agent.submit("m", "r0", PROMPT, 250)
    await agent.relay.some_tokens("r0", 1)
    await agent.relay_server.stop(0)
    while await agent.queue.held("m", [instance]):
        await asyncio.sleep(0.01)
    await agent.residency.wait_for(lambda items: items["g0"].pages_kv == reserved and not items["g0"].shards[0].running)


async def test_a_resumed_request_goes_on_at_its_offset(agent: RunningAgent, tmp_path: Path) -> None:
    model = checkpoints.llama(tmp_path / "m")
    spec = await agent.prepare("m", tmp_path / "m")
    whole = expected(model, PROMPT, 10)
    await agent.wake(spec)
    await agent.submit("m", "r0", PROMPT + whole[:4], 10, attempt=1, generated=4)
    await agent.relay.finished("r0", attempt=1)
    updates = [u for u in agent.relay.updates["r0"] if u.token_ids]
    assert updates[0].offset == 4
    assert [t for u in updates for t in u.token_ids] == whole[4:]


async def test_stopping_hands_running_requests_over(etcd, redis_server, keys, tmp_path: Path) -> None:
    longest = 4000  # tokens of an answer: more than could be made before the agent stops
    checkpoints.save(checkpoints.CONFIGS["llama"](max_position_embeddings=longest + 96), tmp_path / "m")
    async with running_agent(etcd.address, redis_server.address, keys.prefix, tmp_path) as agent:
        object.__setattr__(agent.settings, "grace_s", 0.0)
        spec = await agent.prepare("m", tmp_path / "m")
        for name in ("r0", "r1"):  # both wait before it is woken, so that they run side by side
            await agent.submit("m", name, PROMPT, longest)
        await agent.wake(spec)
        for name in ("r0", "r1"):
            await agent.relay.some_tokens(name, 1)
        agent.node.stop.set()
        for name in ("r0", "r1"):
            end = await agent.relay.finished(name)
            assert end.finish_reason == inference_pb2.FINISH_REASON_ERROR
            assert "stopped" in end.error


async def test_undeploying_gives_everything_back(
    agent: RunningAgent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the program, which nothing collects while the model is there."""
    programs: list[weakref.ref[BoundModel]] = []
    build = host.HostBackend.program

    def built(*arguments: Any) -> Any:
        program = build(*arguments)
        programs.append(weakref.ref(program.model))
        return program

    monkeypatch.setattr(host.HostBackend, "program", built)
    checkpoints.llama(tmp_path / "m")
    spec = await agent.prepare("m", tmp_path / "m")
    await agent.node.store.put(agent.node.keys.model("m"), spec)
    await agent.wake(spec)
    await agent.node.store.delete(agent.node.keys.model("m"))
    await agent.residency.wait_for(lambda items: not items["g0"].shards and items["g0"].pages_weights == 0)
    while list((tmp_path / "images").glob("*")) or programs[0]() is not None:
        await asyncio.sleep(0.01)


async def test_a_late_order_does_not_bring_an_undeployed_model_back(agent: RunningAgent, tmp_path: Path) -> None:
    """A placer may not know yet; and the model that is deployed next under the name would find its place taken."""
    checkpoints.llama(tmp_path / "m")
    spec = await agent.prepare("m", tmp_path / "m")
    await agent.node.store.put(agent.node.keys.model("m"), spec)
    await agent.node.store.delete(agent.node.keys.model("m"))
    while list((tmp_path / "images").glob("*.image")):
        await asyncio.sleep(0.01)
    code, text = await status_of(agent.stub.WakeReplica(_wake(agent, spec)))
    assert code == grpc.StatusCode.FAILED_PRECONDITION
    assert "undeployed" in text
    spec = await agent.prepare("m", tmp_path / "m")
    spec.deployed_unix_ms = 2
    await agent.node.store.put(agent.node.keys.model("m"), spec)
    await agent.wake(spec)


async def test_an_end_that_is_no_token_of_the_model_is_left_out(agent: RunningAgent, tmp_path: Path) -> None:
    model = checkpoints.llama(tmp_path / "m")
    (tmp_path / "m" / "generation_config.json").write_text('{"eos_token_id": [2, 99999]}')
    await agent.wake(await agent.prepare("m", tmp_path / "m"))
    await agent.queue.put(
        agent_pb2.QueuedRequest(
            request_id="r0",
            model="m",
            router_id="test",
            relay_address=agent.relay_address,
            token_ids=PROMPT,
            sampling=inference_pb2.SamplingParams(max_tokens=6, min_tokens=6, temperature=0),
        )
    )
    assert (await agent.relay.finished("r0")).finish_reason == inference_pb2.FINISH_REASON_LENGTH
    assert len(agent.relay.tokens("r0")) == 6
    assert model.config.vocab_size < 99999


async def test_a_damaged_image_is_found_and_said(agent: RunningAgent, tmp_path: Path) -> None:
    checkpoints.llama(tmp_path / "m")
    spec = await agent.prepare("m", tmp_path / "m")
    [image] = (tmp_path / "images").glob("*.image")
    with image.open("r+b") as file:
        file.seek(1000)
        byte = file.read(1)
        file.seek(1000)
        file.write(bytes([byte[0] ^ 1]))
    await agent.stub.WakeReplica(agent_pb2.WakeReplicaRequest(spec=spec, group=agent.group, reason=REASON))
    # The image is built anew from the checkpoint, and the model is served all the same.
    await agent.until("m", common_pb2.REPLICA_STATE_ACTIVE)


@pytest.mark.parametrize(
    ("source", "tp", "code", "message"),
    [
        ("missing", 1, grpc.StatusCode.NOT_FOUND, "missing"),
        ("/etc", 1, grpc.StatusCode.PERMISSION_DENIED, "outside the allowed model folders"),
        ("m", 2, grpc.StatusCode.INVALID_ARGUMENT, "tp=1"),
    ],
)
async def test_what_cannot_be_prepared(
    agent: RunningAgent, tmp_path: Path, source: str, tp: int, code: grpc.StatusCode, message: str
) -> None:
    checkpoints.llama(tmp_path / "m")
    spec = cluster_pb2.ModelSpec(name="m", source=str(tmp_path / source), tp=tp)
    got = await status_of(agent.stub.PrepareModel(agent_pb2.PrepareModelRequest(spec=spec)))
    assert got[0] == code
    assert message in got[1]
    assert not list((tmp_path / "images").glob("*"))


async def test_a_model_larger_than_the_arena(etcd, redis_server, keys, tmp_path: Path) -> None:
    checkpoints.llama(tmp_path / "m")
    async with running_agent(etcd.address, redis_server.address, keys.prefix, tmp_path, arena="256KiB") as agent:
        spec = cluster_pb2.ModelSpec(name="m", source=str(tmp_path / "m"))
        code, message = await status_of(agent.stub.PrepareModel(agent_pb2.PrepareModelRequest(spec=spec)))
        assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "the arena has 4" in message


class Gate:
    """Holds a method up, in whatever thread it is called, until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> None:
        self.entered, self._opened = threading.Event(), threading.Event()
        method = getattr(owner, name)

        def held(*arguments: Any) -> Any:
            self.entered.set()
            assert self._opened.wait(30)
            return method(*arguments)

        async def held_async(*arguments: Any) -> Any:
            self.entered.set()
            assert await asyncio.to_thread(self._opened.wait, 30)
            return await method(*arguments)

        monkeypatch.setattr(owner, name, held_async if asyncio.iscoroutinefunction(method) else held)

    async def reached(self) -> None:
        assert await asyncio.to_thread(self.entered.wait, 30)

    def open(self) -> None:
        self._opened.set()


async def test_a_wake_during_an_eviction_comes_after_it(
    agent: RunningAgent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = checkpoints.llama(tmp_path / "m")
    spec = await agent.prepare("m", tmp_path / "m")
    await agent.warm(spec)
    gate = Gate(monkeypatch, WeightRange, "shrink")
    evicting = asyncio.create_task(_answer(agent.stub.EvictReplica(_evict("m"))))
    await gate.reached()
    waking = asyncio.create_task(_answer(agent.stub.WakeReplica(_wake(agent, spec))))
    done, _ = await asyncio.wait({waking}, timeout=0.1)
    gate.open()
    assert not done
    assert (await evicting).state == common_pb2.REPLICA_STATE_COLD
    assert (await waking).state == common_pb2.REPLICA_STATE_WARMING
    await agent.submit("m", "r0", PROMPT, 4)
    await agent.relay.finished("r0")
    assert agent.relay.tokens("r0") == expected(model, PROMPT, 4)


async def test_an_eviction_is_carried_out_although_its_caller_has_gone(
    agent: RunningAgent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints.llama(tmp_path / "m")
    spec = await agent.prepare("m", tmp_path / "m")
    gate = Gate(monkeypatch, Image, "read_page")
    await agent.stub.WarmReplica(agent_pb2.WarmReplicaRequest(spec=spec, group=agent.group, reason=REASON))
    await gate.reached()
    code, _ = await status_of(agent.stub.EvictReplica(_evict("m"), timeout=0.1))
    assert code == grpc.StatusCode.DEADLINE_EXCEEDED
    gate.open()
    await agent.until("m", common_pb2.REPLICA_STATE_COLD)
    await agent.warm(spec)


async def test_the_last_of_several_drains_and_wakes_holds(
    agent: RunningAgent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints.llama(tmp_path / "m")
    spec = await agent.prepare("m", tmp_path / "m")
    instance = await agent.wake(spec)
    gate = Gate(monkeypatch, RequestQueue, "release")  # the first drain does not get on
    for _ in range(2):
        await agent.stub.DrainReplica(agent_pb2.DrainReplicaRequest(model="m", reason=REASON))
        await gate.reached()
        answer = await agent.stub.WakeReplica(_wake(agent, spec))
        assert answer.state == common_pb2.REPLICA_STATE_ACTIVE
    gate.open()
    await asyncio.wait([task for task in asyncio.all_tasks() if task.get_name() == "drain m"])
    await agent.submit("m", "r0", PROMPT, 4)
    end = await asyncio.wait_for(agent.relay.finished("r0"), 20)
    assert end.instance_id == instance


async def test_a_request_whose_delivery_was_lost_on_the_way_is_served(
    agent: RunningAgent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints.llama(tmp_path / "m")
    spec = await agent.prepare("m", tmp_path / "m")
    read, lost = RequestQueue._read, []

    async def lossy(*arguments: Any) -> Any:
        answer = await read(*arguments)
        if answer and not lost:
            lost.extend(answer)
            raise redis.exceptions.ConnectionError("the answer was lost")
        return answer

    monkeypatch.setattr(RequestQueue, "_read", lossy)
    await agent.wake(spec)
    await agent.submit("m", "r0", PROMPT, 4)
    await asyncio.wait_for(agent.relay.finished("r0"), 20)
    assert lost


async def test_what_redis_has_not_yet_been_told_is_done_is_not_given_back(
    agent: RunningAgent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints.llama(tmp_path / "m")
    spec = await agent.prepare("m", tmp_path / "m")
    await agent.wake(spec)
    gate = Gate(monkeypatch, RequestQueue, "done")
    await agent.submit("m", "r0", PROMPT, 4)
    await agent.relay.finished("r0")
    await agent.stub.DrainReplica(agent_pb2.DrainReplicaRequest(model="m", reason=REASON))
    await agent.until("m", common_pb2.REPLICA_STATE_WARM)  # though Redis does not answer
    assert await agent.queue.waiting("m") == 0
    gate.open()


async def test_stopping_does_not_wait_for_a_redis_that_is_away(etcd, keys, tmp_path: Path) -> None:
    checkpoints.llama(tmp_path / "m")
    own = start_redis(tmp_path / "redis", tmp_path / "redis.log")
    async with running_agent(etcd.address, own.address, keys.prefix, tmp_path) as agent:
        spec = await agent.prepare("m", tmp_path / "m")
        await agent.wake(spec)
        await agent.submit("m", "r0", PROMPT, 100)
        await agent.relay.some_tokens("r0", 1)
        own.child.process.send_signal(signal.SIGKILL)
        own.child.process.wait()
        await agent.relay.finished("r0")


async def test_without_its_engine_the_agent_hands_over_and_ends(
    etcd, redis_server, keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(engine: EngineLoop, request_id: str) -> None:
        raise RuntimeError("no such luck")

    checkpoints.llama(tmp_path / "m")
    monkeypatch.setattr(EngineLoop, "_cancel", broken)
    with pytest.raises(OSError, match=r"the engine has died.*no such luck"):  # noqa: PT012
        async with running_agent(etcd.address, redis_server.address, keys.prefix, tmp_path) as agent:
            await agent.wake(await agent.prepare("m", tmp_path / "m"))
            await agent.submit("m", "r0", PROMPT, 250)
            await agent.relay.some_tokens("r0", 1)
            await agent.relay.cancels.put("r0")
            end = await agent.relay.finished("r0")
            assert end.finish_reason == inference_pb2.FINISH_REASON_ERROR
            await asyncio.wait({agent.task}, timeout=20)
            assert agent.task.done()


@pytest.mark.parametrize("asked_for_meanwhile", [False, True])
async def test_weights_that_compute_nonsense_are_copied_anew(
    etcd, redis_server, keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked_for_meanwhile: bool
) -> None:
    """Their instance hands its requests over, others do not notice, and the model can serve again at once."""
    arenas: list[Arena] = []
    make = Arena.__init__
    monkeypatch.setattr(Arena, "__init__", lambda arena, memory: (arenas.append(arena), make(arena, memory))[1])
    models = {name: checkpoints.FAMILIES[kind](tmp_path / name) for name, kind in (("m", "llama"), ("n", "mistral"))}
    async with running_agent(etcd.address, redis_server.address, keys.prefix, tmp_path) as agent:
        specs = {name: await agent.prepare(name, tmp_path / name) for name in models}
        for spec in specs.values():
            await agent.wake(spec)
        weights = arenas[0]._ranges["m"]
        giving_up = Gate(monkeypatch, WeightRange, "shrink")
        weights.page_view(weights.num_pages - 1).fill_(0xFF)  # as floats: NaN
        await agent.submit("n", "r1", PROMPT, 120)
        await agent.relay.some_tokens("r1", 1)
        await agent.submit("m", "r0", PROMPT, 250)
        end = await agent.relay.finished("r0")
        assert end.finish_reason == inference_pb2.FINISH_REASON_ERROR
        assert "NaN" in end.error
        await giving_up.reached()
        if asked_for_meanwhile:
            await agent.stub.WakeReplica(_wake(agent, specs["m"]))
            giving_up.open()
            await agent.until("m", common_pb2.REPLICA_STATE_ACTIVE)
        else:
            giving_up.open()
            shard = await agent.until("m", common_pb2.REPLICA_STATE_COLD)
            assert "NaN" in shard.reason.text
            await agent.wake(specs["m"])
        await agent.submit("m", "r2", PROMPT, 6)
        for name, model, count in (("r2", "m", 6), ("r1", "n", 120)):
            assert (await agent.relay.finished(name)).finish_reason == inference_pb2.FINISH_REASON_LENGTH
            assert agent.relay.tokens(name) == expected(models[model], PROMPT, count)
        arenas[0].check()


async def test_an_eviction_that_finds_the_device_lost_ends_the_agent(
    etcd, redis_server, keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever meets the error first: the engine may be idle, and its supervisor starts the agent again."""

    def lost(weights: WeightRange, keep: int) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    checkpoints.llama(tmp_path / "m")
    with pytest.raises(OSError, match="illegal memory access"):  # noqa: PT012
        async with running_agent(etcd.address, redis_server.address, keys.prefix, tmp_path) as agent:
            await agent.warm(await agent.prepare("m", tmp_path / "m"))
            monkeypatch.setattr(WeightRange, "shrink", lost)
            with pytest.raises(grpc.aio.AioRpcError):
                await agent.stub.EvictReplica(agent_pb2.EvictReplicaRequest(model="m", reason=REASON))
            await asyncio.wait({agent.task}, timeout=20)
            assert agent.task.done()


async def test_a_load_that_fails_in_an_unforeseen_way_does_not_seem_to_go_on(
    agent: RunningAgent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise KeyError("rope_theta")

    checkpoints.llama(tmp_path / "m")
    spec = await agent.prepare("m", tmp_path / "m")
    monkeypatch.setattr(host, "build_model", broken)
    await agent.stub.WakeReplica(_wake(agent, spec))
    await agent.residency.wait_for(
        lambda items: any(s.reason.cause == common_pb2.CAUSE_FAILURE for r in items.values() for s in r.shards)
    )
    shard = agent.shard("m")
    assert shard is not None
    assert shard.state == common_pb2.REPLICA_STATE_COLD
    assert "rope_theta" in shard.reason.text
    monkeypatch.undo()
    await agent.wake(spec)


async def test_undeploying_a_model_that_was_never_warmed_deletes_its_image(agent: RunningAgent, tmp_path: Path) -> None:
    checkpoints.llama(tmp_path / "m")
    spec = await agent.prepare("m", tmp_path / "m")
    await agent.node.store.put(agent.node.keys.model("m"), spec)
    await agent.node.store.delete(agent.node.keys.model("m"))
    while list((tmp_path / "images").glob("*")):
        await asyncio.sleep(0.01)


# What requests can ask for


async def test_logprobs_are_the_models_own_and_come_with_every_token(agent: RunningAgent, tmp_path: Path) -> None:
    model = checkpoints.llama(tmp_path / "m")
    await agent.wake(await agent.prepare("m", tmp_path / "m"))
    await _submit(agent, "r0", max_tokens=6, logprobs=3, ignore_eos=True, frequency_penalty=2.0)
    await _submit(agent, "r1", max_tokens=6, ignore_eos=True)
    for name in ("r0", "r1"):
        await agent.relay.finished(name)
    updates = agent.relay.updates["r0"]
    tokens = agent.relay.tokens("r0")
    given = [item for update in updates for item in update.logprobs]
    assert all(len(update.logprobs) == len(update.token_ids) for update in updates)
    assert [item.token_id for item in given] == tokens
    with torch.no_grad():
        expected_logprobs = model(torch.tensor([PROMPT + tokens])).logits[0].log_softmax(-1)
    for place, item in enumerate(given):
        reference = expected_logprobs[len(PROMPT) - 1 + place]
        assert item.logprob == pytest.approx(reference[item.token_id].item(), abs=1e-4)
        values, ids = reference.topk(3)
        assert [other.token_id for other in item.top] == ids.tolist()
        assert [other.logprob for other in item.top] == pytest.approx(values.tolist(), abs=1e-4)
    assert not any(update.logprobs for update in agent.relay.updates["r1"])


async def test_bias_and_penalties_hold_over_a_resumed_request(agent: RunningAgent, tmp_path: Path) -> None:
    checkpoints.llama(tmp_path / "m")
    await agent.wake(await agent.prepare("m", tmp_path / "m"))
    bias = {70: 50.0, 80: 49.0}
    await _submit(agent, "r0", max_tokens=6, logit_bias=bias, frequency_penalty=2.0)
    await agent.relay.finished("r0")
    assert agent.relay.tokens("r0") == [70, 80, 70, 80, 70, 80]
    await _submit(agent, "r1", [70, 80, 70], attempt=1, max_tokens=6, logit_bias=bias, frequency_penalty=2.0)
    await agent.relay.finished("r1", attempt=1)
    assert [token for update in agent.relay.updates["r1"] for token in update.token_ids] == [80, 70, 80]


async def test_stop_tokens_end_the_answer_but_not_before_min_tokens(agent: RunningAgent, tmp_path: Path) -> None:
    checkpoints.llama(tmp_path / "m")
    await agent.wake(await agent.prepare("m", tmp_path / "m"))
    bias = {70: 50.0, 80: 40.0}
    await _submit(agent, "r0", max_tokens=9, logit_bias=bias, stop_token_ids=[70])
    await _submit(agent, "r1", max_tokens=9, logit_bias=bias, stop_token_ids=[70], min_tokens=3)
    for name, tokens in (("r0", [70]), ("r1", [80, 80, 80, 70])):
        end = await agent.relay.finished(name)
        assert end.finish_reason == inference_pb2.FINISH_REASON_STOP
        assert agent.relay.tokens(name) == tokens


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_answers_follow_their_grammar_also_when_resumed(agent: RunningAgent, tmp_path: Path, seed: int) -> None:
    checkpoints.llama(tmp_path / "m")
    tokenizer = make_tokenizer(tmp_path / "m")
    await agent.wake(await agent.prepare("m", tmp_path / "m"))
    grammars = {
        "regex": (inference_pb2.Grammar(regex="[ab]{4}c"), r"[ab]{4}c"),
        "choice": (inference_pb2.Grammar(choice=inference_pb2.Choices(texts=["yes", 'n"o'])), 'yes|n"o'),
        "ebnf": (inference_pb2.Grammar(ebnf='root ::= "x" | "y" root'), "y*x"),
        "schema": (inference_pb2.Grammar(json_schema='{"enum": ["red", 5]}'), '"red"|5'),
    }
    answers = {}
    for name, (grammar, pattern) in grammars.items():
        await _submit(agent, name, max_tokens=200, temperature=1.0, seed=seed, grammar=grammar)
        end = await agent.relay.finished(name)
        answers[name] = agent.relay.tokens(name)
        text = tokenizer.decode(answers[name])
        if end.finish_reason == inference_pb2.FINISH_REASON_STOP:
            assert re.fullmatch(pattern, text)
        else:  # the only one without a bound
            assert (name, len(answers[name]), set(text)) == ("ebnf", 200, {"y"})
    whole = answers["regex"]
    grammar = grammars["regex"][0]
    await _submit(agent, "again", whole[:2], attempt=1, max_tokens=200, temperature=1.0, seed=seed, grammar=grammar)
    await agent.relay.finished("again", attempt=1)
    assert whole[:2] + [token for update in agent.relay.updates["again"] for token in update.token_ids] == whole


async def test_what_cannot_be_served_is_refused_and_nothing_else_suffers(agent: RunningAgent, tmp_path: Path) -> None:
    checkpoints.llama(tmp_path / "m")
    checkpoints.llama(tmp_path / "bare")
    make_tokenizer(tmp_path / "m")
    for name in ("m", "bare"):
        instance = await agent.wake(await agent.prepare(name, tmp_path / name))
    await _submit(agent, "r0", max_tokens=5, grammar=inference_pb2.Grammar(regex="[a"))
    await _submit(agent, "r1", max_tokens=5, model="bare", grammar=inference_pb2.Grammar(regex="a"))
    await _submit(agent, "r2", max_tokens=5, temperature=9.0)
    await _submit(agent, "r3", [5], attempt=1, max_tokens=5, grammar=inference_pb2.Grammar(regex="a"))
    for name, words in (("r0", "regex"), ("r1", "tokenizer"), ("r2", "temperature")):
        end = await agent.relay.finished(name)
        assert end.finish_reason == inference_pb2.FINISH_REASON_REFUSED
        assert words in end.error
    # An answer that an earlier attempt gave is not the client's mistake.
    assert (await agent.relay.finished("r3", attempt=1)).finish_reason == inference_pb2.FINISH_REASON_ERROR
    await agent.submit("m", "r4", PROMPT, 3)
    await agent.submit("bare", "r5", PROMPT, 3)
    for name in ("r4", "r5"):
        assert (await agent.relay.finished(name)).finish_reason == inference_pb2.FINISH_REASON_LENGTH
    while await agent.queue.held("bare", [instance]):
        await asyncio.sleep(0.01)


async def test_a_grammar_that_takes_long_to_compile_holds_up_nobody_else_and_can_be_cancelled(
    agent: RunningAgent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints.llama(tmp_path / "m")
    make_tokenizer(tmp_path / "m")
    instance = await agent.wake(await agent.prepare("m", tmp_path / "m"))
    gate = Gate(monkeypatch, GrammarCompiler, "matcher")
    for name in ("r0", "r1"):
        await _submit(agent, name, max_tokens=5, grammar=inference_pb2.Grammar(regex="ab"))
    await gate.reached()
    await agent.submit("m", "r2", PROMPT, 4)
    await agent.relay.finished("r2")
    await agent.relay.cancels.put("r0")
    assert (await agent.relay.finished("r0")).finish_reason == inference_pb2.FINISH_REASON_CANCELLED
    gate.open()
    assert (await agent.relay.finished("r1")).finish_reason == inference_pb2.FINISH_REASON_STOP
    while await agent.queue.held("m", [instance]):
        await asyncio.sleep(0.01)
    assert not [update for update in agent.relay.updates["r0"] if update.token_ids]


async def _submit(
    agent: RunningAgent, name: str, answer: list[int] | None = None, attempt: int = 0, model: str = "m", **sampling: Any
) -> None:
    """Queues a request behind `answer`, the tokens of earlier attempts; greedy unless `sampling` says otherwise."""
    await agent.queue.put(
        agent_pb2.QueuedRequest(
            request_id=name,
            model=model,
            attempt=attempt,
            router_id="test",
            relay_address=agent.relay_address,
            token_ids=PROMPT + (answer or []),
            generated=len(answer or []),
            sampling=inference_pb2.SamplingParams(**({"temperature": 0} | sampling)),
        )
    )


def _evict(model: str) -> agent_pb2.EvictReplicaRequest:
    return agent_pb2.EvictReplicaRequest(model=model, reason=REASON)


def _wake(agent: RunningAgent, spec: cluster_pb2.ModelSpec) -> agent_pb2.WakeReplicaRequest:
    return agent_pb2.WakeReplicaRequest(spec=spec, group=agent.group, reason=REASON)


async def _answer(call: Any) -> Any:
    return await call
