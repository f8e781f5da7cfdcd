"""Random switching among models that together exceed the arena three times, through a whole agent.

WARMSERVE_ENDURANCE_CYCLES sets how many cycles; WARMSERVE_ENDURANCE_SEED which.
"""

from __future__ import annotations

import asyncio
import os
import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest
import torch
from prometheus_client import REGISTRY

from launcher.backing import Backing
from services.gpu_agent import __main__ as agent_process
from services.gpu_agent.arena.arena import Arena
from services.gpu_agent.arena.memory import Memory
from tests.gpu_agent import checkpoints
from tests.gpu_agent.agent_process import RunningAgent, running_agent
from tests.gpu_agent.test_agent_service import expected
from warmserve.cluster.keys import Keys
from warmserve.v1 import agent_pb2, cluster_pb2, common_pb2, inference_pb2

CYCLES = int(os.environ.get("WARMSERVE_ENDURANCE_CYCLES", "40"))
SEED = int(os.environ.get("WARMSERVE_ENDURANCE_SEED", "1"))
MODELS = 8
TOKENS = 12
OUT_OF_ANON_BYTES = 96 << 20  # what buffers, threads' heaps and caches may add; a leak of weights is far more


@dataclass(frozen=True)
class Scale:
    """How large the models are: eight of them need three times the arena."""

    page: int  # bytes
    arena_pages: int
    tier: str  # room for one model or two
    changes: dict[str, int]  # to the tiny models' configs

    backend: str


HOST = Scale(65536, 24, "1536KiB", {}, "host")
# float32, in which a batch's other sequences do not change which token is the greatest
CUDA = Scale(2 << 20, 56, "100MiB", {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4}, "cuda")


@dataclass
class Model:
    """A deployed model, and what it answers."""

    spec: cluster_pb2.ModelSpec
    prompts: list[list[int]]
    answers: list[list[int]]


@dataclass
class World:
    """An agent, its models, and the arena below it."""

    agent: RunningAgent
    arena: Arena
    models: list[Model]
    random: random.Random
    requests: int = 0
    done: dict[str, int] = field(default_factory=dict)  # how often what was done

    def state(self, model: Model) -> common_pb2.ReplicaState.ValueType:
        shard = self.agent.shard(model.spec.name)
        return shard.state if shard else common_pb2.REPLICA_STATE_COLD

    async def order(self, kind: str, model: Model, keep: float = 0.0) -> bool:
        """Gives an order; False where the agent refuses it for want of room or because the model serves."""
        name, stub = model.spec.name, self.agent.stub
        reason = common_pb2.Reason(cause=common_pb2.CAUSE_OPERATOR, text="endurance", score=self.random.random())
        try:
            if kind == "warm":
                await stub.WarmReplica(
                    agent_pb2.WarmReplicaRequest(spec=model.spec, group=self.agent.group, reason=reason)
                )
            elif kind == "wake":
                await stub.WakeReplica(
                    agent_pb2.WakeReplicaRequest(spec=model.spec, group=self.agent.group, reason=reason)
                )
            elif kind == "drain":
                await stub.DrainReplica(agent_pb2.DrainReplicaRequest(model=name, reason=reason))
            else:
                await stub.EvictReplica(agent_pb2.EvictReplicaRequest(model=name, keep_residency=keep, reason=reason))
        except grpc.aio.AioRpcError as error:
            if error.code() not in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.FAILED_PRECONDITION):
                raise
            return False
        self.done[kind] = self.done.get(kind, 0) + 1
        return True

    async def settled(self, model: Model) -> common_pb2.ReplicaState.ValueType:
        """The model's state once it neither loads nor drains."""
        moving = (common_pb2.REPLICA_STATE_WARMING, common_pb2.REPLICA_STATE_DRAINING)
        await asyncio.wait_for(self.agent.residency.wait_for(lambda _: self.state(model) not in moving), 60)
        return self.state(model)

    async def make_room(self, but: Model) -> None:
        """Takes another model's weights away, as the placer would."""
        other = self.random.choice([model for model in self.models if model is not but])
        await self.order("drain", other)
        await self.settled(other)
        await self.order("evict", other, self.random.choice([0.0, 0.0, 0.5]))

    async def serve(self, model: Model, count: int, cancel: str | None = None) -> None:
        """Requests of a model, answered whatever happens: woken as often as it takes, and put back where they fail."""
        names = [f"r{self.requests + n}" for n in range(count)]
        self.requests += count
        which = {name: self.random.randrange(len(model.prompts)) for name in names}
        for name in names:
            await self.agent.submit(model.spec.name, name, model.prompts[which[name]], TOKENS)
        if cancel is not None and await self.order("wake", model):
            await self.order(cancel, model, 0.5)
        ended = asyncio.gather(*(self._finished(model, name, model.prompts[which[name]]) for name in names))
        while not ended.done():
            if await self.settled(model) != common_pb2.REPLICA_STATE_ACTIVE:
                if not await self.order("wake", model):
                    await self.make_room(model)
                continue
            await asyncio.wait({ended}, timeout=0.05)
        await ended
        for name in names:
            assert self._answer(name) == model.answers[which[name]], (model.spec.name, name, self.done)

    async def _finished(self, model: Model, name: str, prompt: list[int]) -> None:
        attempt = 0
        while True:
            end = await self.agent.relay.finished(name, attempt)
            if end.finish_reason == inference_pb2.FINISH_REASON_LENGTH:
                return
            too_large = end.finish_reason == inference_pb2.FINISH_REASON_TOO_LARGE
            assert too_large or end.finish_reason == inference_pb2.FINISH_REASON_ERROR
            attempt += 1
            if too_large:  # idle instances have the memory, and the placer would have one give way
                await self.make_room(model)
            so_far = self._answer(name)
            await self.agent.submit(
                model.spec.name, name, prompt + so_far, TOKENS, attempt=attempt, generated=len(so_far)
            )

    def _answer(self, name: str) -> list[int]:
        tokens: list[int] = []
        for update in self.agent.relay.updates[name]:
            if update.token_ids:
                assert update.offset == len(tokens)
                tokens += update.token_ids
        return tokens

    async def cycle(self) -> None:
        """One random thing."""
        model, do = self.random.choice(self.models), self.random.random()
        if do < 0.35:
            await self.serve(model, self.random.choice([1, 2, 8]))
        elif do < 0.5:
            await self.serve(model, 1, cancel=self.random.choice(["drain", "evict", "wake"]))
        elif do < 0.7:
            for _ in range(MODELS):
                if await self.order("warm", model):
                    break
                await self.make_room(model)
            if self.random.random() < 0.4:  # in the middle of it
                await self.order(self.random.choice(["evict", "drain", "wake"]), model, 0.5)
            else:
                await self.settled(model)
            active = [other for other in self.models if self.state(other) == common_pb2.REPLICA_STATE_ACTIVE]
            if active:  # and so many requests beside it that they need its pages
                await self.serve(self.random.choice(active), 8)
        elif do < 0.85:
            await self.order("drain", model)
            await self.order("evict", model, self.random.random())
        else:
            await asyncio.gather(*(self.serve(each, 2) for each in self.random.sample(self.models, 2)))

    async def prepared(self) -> None:
        """Returns when all graphs are captured that there will ever be: a model is warm once it has its own."""
        for model in self.models:
            await self.order("drain", model)
            await self.settled(model)
            await self.order("evict", model)
            while not await self.order("warm", model):
                await self.make_room(model)
            await self.agent.until(model.spec.name, common_pb2.REPLICA_STATE_WARM)

    def check(self) -> None:
        """The accounting is exact, and no address range was left behind."""
        self.arena.check()
        usage = self.arena.usage()
        assert usage.free + usage.kv + usage.weights == usage.total
        assert len(self.arena._memory._ranges) <= MODELS


def anonymous_bytes() -> int:
    """Memory of this process that no file is behind, the arena's and the host tier's left out."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon")


def device_bytes(scale: Scale) -> int:
    """What is taken of the GPU's memory: by anyone, or, with other tests beside this one, by torch; 0 on the host."""
    if scale.backend == "host":
        return 0
    if "PYTEST_XDIST_WORKER" in os.environ:
        return torch.cuda.memory_reserved()
    free, total = torch.cuda.mem_get_info()
    return total - free


def captures() -> float:
    """CUDA graphs that were captured so far."""
    return sum(
        sample.value
        for metric in REGISTRY.collect()
        for sample in metric.samples
        if sample.name == "warmserve_gpu_agent_graph_captures_total"
    )


async def deployed(agent: RunningAgent, folder: Path, scale: Scale) -> list[Model]:
    models = []
    for number in range(MODELS):
        name, family = f"m{number}", ("llama", "qwen3", "mistral", "gemma3")[number % 4]
        changes = dict(scale.changes)
        if family == "gemma3":  # whose layers are of two kinds
            changes.pop("num_hidden_layers", None)
        reference = checkpoints.save(checkpoints.CONFIGS[family](**changes), folder / name, seed=number)
        prompts = [[3 + number, 7, *range(20, 20 + 30 * n)] for n in range(4)]
        answers = [expected(reference, prompt, TOKENS) for prompt in prompts]
        models.append(Model(await agent.prepare(name, folder / name), prompts, answers))
    return models


@pytest.fixture
def tier_folder() -> Iterator[Path]:
    """In memory, as a tier is: CUDA registers no file of a disk."""
    with tempfile.TemporaryDirectory(prefix="warmserve-test-", dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.mark.timeout(60 + 3 * CYCLES)
@pytest.mark.usefixtures("own_memory")
@pytest.mark.parametrize("scale", [pytest.param(HOST, id="host"), pytest.param(CUDA, id="cuda", marks=pytest.mark.gpu)])
async def test_models_take_turns_for_long(
    etcd: Backing,
    redis_server: Backing,
    keys: Keys,
    tmp_path: Path,
    tier_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    scale: Scale,
) -> None:
    torch.set_num_threads(1)
    arenas: list[Arena] = []

    class Seen(Arena):
        def __init__(self, memory: Memory) -> None:
            super().__init__(memory)
            arenas.append(self)

    monkeypatch.setattr(agent_process, "Arena", Seen)
    # A third of what the models need, and a host tier for some of them.
    options = {
        "host_tier_bytes": scale.tier,
        "host_tier_dir": tier_folder,
        "backend": scale.backend,
        "page_bytes": scale.page,
        "workspace_bytes": "1GiB",  # of a GPU only
    }
    size = str(scale.arena_pages * scale.page)
    async with running_agent(etcd.address, redis_server.address, keys.prefix, tmp_path, arena=size, **options) as agent:
        models = await deployed(agent, tmp_path, scale)
        (arena,) = arenas
        needed = sum(model.spec.facts.shard_bytes for model in models)
        assert needed >= 3 * arena.num_pages * scale.page
        world = World(agent, arena, models, random.Random(SEED))
        told = arena.on_taken_back

        def on_taken_back(model: str, pages: int, owner: str) -> None:
            world.done["taken back"] = world.done.get("taken back", 0) + pages
            told(model, pages, owner)

        arena.on_taken_back = on_taken_back
        for model in models:  # once each, so that nothing below is a first time
            await world.serve(model, 1)
        await world.prepared()
        before, device_before, captured = anonymous_bytes(), device_bytes(scale), captures()
        for number in range(CYCLES):
            if number % 100 == 0:
                print(f"{number} of {CYCLES} cycles", flush=True)
            await world.cycle()
            world.check()
        grown = anonymous_bytes() - before
        assert grown < OUT_OF_ANON_BYTES, f"{grown >> 20} MiB more than before {CYCLES} cycles"
        assert device_bytes(scale) == device_before
        assert captures() == captured
        for model in models:
            await world.serve(model, 1)
        for model in models:
            while not await world.order("evict", model):
                await world.order("drain", model)
                await asyncio.sleep(0.01)
        usage = arena.usage()
        assert (usage.weights, usage.kv, usage.free) == (0, 0, usage.total)
        assert world.done["evict"] > MODELS
        assert world.done["taken back"] > 0
        print(f"{CYCLES} cycles, {world.requests} requests, orders {world.done}, {grown >> 20} MiB grown")
