"""A router in this process, with real etcd, Redis and sockets, and peers to talk to."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from openai import AsyncOpenAI
from redis.asyncio import Redis
from tokenizers import Tokenizer

from launcher.backing import Backing
from services.common.grpc_frame import channel
from services.common.process import make_node
from services.common.queues import RequestQueue
from services.router.service import serve
from services.router.settings import RouterSettings
from tests.router.peers import PeerAgent, PeerPlacer, make_tokenizer, until
from warmserve.cluster.keys import Keys
from warmserve.cluster.store import Store
from warmserve.v1 import cluster_pb2, inference_pb2, inference_pb2_grpc

ANSWER = "Ein schöner Tag: the quick fox says 日本 and 🙂 goes on."


class RunningRouter:
    """A router's doors."""

    def __init__(self, record: cluster_pb2.RouterRecord, stop: asyncio.Event, task: asyncio.Task[None]) -> None:
        self.record = record
        self.stop = stop
        self.task = task
        self.channel = channel(record.address)
        self.grpc = inference_pb2_grpc.InferenceServiceStub(self.channel)
        self.openai = AsyncOpenAI(base_url=f"{record.http_url}/v1", api_key="none", max_retries=0)

    def generate(self, model: str = "m", timeout: float | None = None, **fields: Any) -> Any:
        """A Generate call; `fields` are SamplingParams'."""
        prompt = fields.pop("prompt", "The quick")
        request = inference_pb2.GenerateRequest(
            model=model, prompt=prompt, sampling=inference_pb2.SamplingParams(**fields)
        )
        return self.grpc.Generate(request, timeout=timeout)

    async def close(self) -> None:
        self.stop.set()
        await self.openai.close()
        await self.channel.close(None)
        await asyncio.wait_for(self.task, 20)


class Cluster:
    """What a test sets up."""

    def __init__(self, store: Store, keys: Keys, redis: Redis, etcd: str, redis_url: str, folder: Path) -> None:
        self.store = store
        self.keys = keys
        self.redis = redis
        self.queue = RequestQueue(redis, keys)
        self.folder = folder
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.answer = self.tokenizer.encode(ANSWER).ids
        self.redis_url = redis_url
        self._etcd = etcd
        self._closing: list[Any] = []

    async def deploy(self, name: str = "m", context: int = 512, folder: Path | None = None) -> cluster_pb2.ModelSpec:
        spec = cluster_pb2.ModelSpec(
            name=name,
            source=str(folder or self.folder),
            tp=1,
            deployed_unix_ms=int(time.time() * 1000),
            facts=cluster_pb2.ModelFacts(context_tokens=context),
        )
        await self.store.put(self.keys.model(name), spec)
        return spec

    async def undeploy(self, name: str = "m") -> None:
        await self.store.delete(self.keys.model(name))

    async def agent(self, agent_id: str = "a0", answer: Sequence[int] | None = None) -> PeerAgent:
        agent = PeerAgent(agent_id, self.store, self.keys, self.redis, self.answer if answer is None else answer)
        await agent.start()
        self._closing.append(agent)
        return agent

    async def placer(self) -> PeerPlacer:
        placer = PeerPlacer(self.store, self.keys)
        await placer.start()
        self._closing.append(placer)
        return placer

    async def router(self, **settings: Any) -> RunningRouter:
        chosen = {"id": "r0", "lease_ttl_s": 2, "check_s": 0.1, "wake_retry_s": 30.0, "grace_s": 0.0} | settings
        configuration = RouterSettings(
            etcd_endpoints=[self._etcd], redis_url=self.redis_url, prefix=self.keys.prefix, **chosen
        )
        stop = asyncio.Event()
        node = make_node(configuration, stop)

        async def run() -> None:
            await node.session.start()
            try:
                await serve(configuration, node)
            finally:
                await node.close()

        task = asyncio.create_task(run())
        key = self.keys.router(configuration.id)

        async def registered() -> bool:
            if task.done():
                task.result()
            return await self.store.get(key, cluster_pb2.RouterRecord) is not None

        await until(registered, "the router's record")
        entry = await self.store.get(key, cluster_pb2.RouterRecord)
        assert entry is not None
        router = RunningRouter(entry.value, stop, task)
        self._closing.append(router)
        return router

    async def models_known(self, router: RunningRouter, *names: str) -> None:
        """Waits until the router has seen these models, and no others."""

        async def known() -> bool:
            answer = await router.grpc.ListModels(inference_pb2.ListModelsRequest())
            return {model.name for model in answer.models} == set(names)

        await until(known, f"the router knows {names}")

    async def queue_is_empty(self, model: str = "m") -> bool:
        return sum([await self.redis.xlen(self.keys.queue(model, name)) for name in ("high", "normal", "low")]) == 0

    async def close(self) -> None:
        for item in reversed(self._closing):
            await item.close()


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "m"
    make_tokenizer(folder)
    return folder


@pytest.fixture
async def cluster(
    etcd: Backing, redis_server: Backing, store: Store, keys: Keys, redis: Redis, tokenizer_folder: Path
) -> AsyncIterator[Cluster]:
    cluster = Cluster(store, keys, redis, etcd.address, f"redis://{redis_server.address}/0", tokenizer_folder)
    yield cluster
    await cluster.close()


async def gathered(
    call: Any, tokens: list[int] | None = None
) -> tuple[str, list[int], inference_pb2.Finished, list[inference_pb2.Progress]]:
    """A whole answer over gRPC; checks that tokens come once each and in order, and `finished` once, at the end.

    `tokens`, where given, shows them as they come.
    """
    tokens = [] if tokens is None else tokens
    text, finished, progress = "", None, []
    async for response in call:
        assert finished is None
        match response.WhichOneof("event"):
            case "progress":
                progress.append(response.progress)
            case "delta":
                assert response.delta.offset == len(tokens)
                text += response.delta.text
                tokens += response.delta.token_ids
            case "finished":
                finished = response.finished
    assert finished is not None
    return text, tokens, finished, progress


async def error_of(call: Any) -> grpc.aio.AioRpcError:
    """The error that a call ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    return caught.value


async def status_of(call: Any) -> tuple[grpc.StatusCode, str]:
    """Code and message of the error that a call ends with."""
    error = await error_of(call)
    return error.code(), error.details() or ""
