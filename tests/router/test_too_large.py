"""A request that an instance's memory could not hold: another one's may, and where none does it fails at once."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import openai
import pytest

from launcher.backing import Backing
from tests.gpu_agent import checkpoints
from tests.gpu_agent.agent_process import running_agent
from tests.gpu_agent.test_agent_service import expected
from tests.router.conftest import ANSWER, Cluster, error_of, gathered
from tests.router.peers import PeerAgent, make_tokenizer, until
from warmserve import AsyncClient, InvalidRequestError, TextDelta
from warmserve.cluster.keys import Keys
from warmserve.v1 import common_pb2, inference_pb2

PAGE = 64 << 10
SAID = "130 tokens need 9 KV blocks, but with nothing else running there would be 8"


async def small_agent(cluster: Cluster, agent_id: str, pages_kv_most: int) -> PeerAgent:
    """An active agent for which every request is too large."""
    agent = await cluster.agent(agent_id)
    agent.error, agent.error_reason = SAID, inference_pb2.FINISH_REASON_TOO_LARGE
    await agent.tell_residency("m", common_pb2.REPLICA_STATE_ACTIVE, pages_kv_most)
    await agent.activate("m")
    return agent


async def test_it_fails_at_once_with_the_numbers_at_all_doors(cluster: Cluster) -> None:
    await cluster.deploy()
    agents = [await small_agent(cluster, "a0", 8), await small_agent(cluster, "a1", 8)]
    router = await cluster.router()
    error = await error_of(router.generate())
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert SAID in (error.details() or "")
    assert "no other instance of model 'm' has more memory" in (error.details() or "")
    assert "warmserve-retry-after-ms" not in dict(error.trailing_metadata() or ())
    with pytest.raises(openai.BadRequestError, match=SAID) as whole:  # 400, which clients do not repeat
        await router.openai.completions.create(model="m", prompt="The quick")
    stream = await router.openai.completions.create(model="m", prompt="The quick", stream=True)
    with pytest.raises(openai.APIError, match=SAID) as streamed:
        await anext(aiter(stream))
    for failed in (whole.value, streamed.value):
        assert (failed.type, failed.code) == ("invalid_request_error", "context_length_exceeded")
    async with AsyncClient(router.record.address) as client:
        with pytest.raises(InvalidRequestError, match=SAID):
            await client.generate("m", "The quick")
    assert sum(len(agent.taken) for agent in agents) == 4  # the first instance's word is enough: both have the same
    await until(cluster.queue_is_empty, "nothing is left in the queue")


async def moving(cluster: Cluster) -> tuple[PeerAgent, asyncio.Task[Any]]:
    """A larger agent beside a small one; it reads nothing yet, and a request waits for it."""
    await cluster.deploy()
    small = await small_agent(cluster, "a0", 8)
    large = await cluster.agent("a1")
    await large.tell_residency("m", common_pb2.REPLICA_STATE_ACTIVE, 9)
    await large.activate("m")
    await large.stop_pulling()
    router = await cluster.router()
    call = asyncio.create_task(gathered(router.generate()))
    await until(lambda: len(small.taken) > 1, "the small one reads it again")
    assert list(small.taken[1].too_large_for) == ["a0-m"]
    return large, call


async def test_an_instance_with_more_memory_serves_it(cluster: Cluster) -> None:
    large, call = await moving(cluster)
    large.start_pulling("m")
    text, tokens, _, _ = await call
    assert (text, tokens) == (ANSWER, cluster.answer)
    assert len(large.taken) == 1
    assert list(large.taken[0].too_large_for) == ["a0-m"]
    await until(cluster.queue_is_empty, "nothing is left in the queue")


async def test_it_fails_when_the_instance_with_more_memory_goes(cluster: Cluster) -> None:
    large, call = await moving(cluster)
    await large.unregister()
    with pytest.raises(grpc.aio.AioRpcError, match=SAID) as caught:
        await call
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    await until(cluster.queue_is_empty, "nothing is left in the queue")


async def answered(client: AsyncClient, prompt: list[int], tokens: list[int]) -> None:
    """A greedy answer of 60 tokens, shown as they come."""
    async with client.stream_generate("m", prompt, max_tokens=60, temperature=0, ignore_eos=True) as stream:
        async for event in stream:
            if isinstance(event, TextDelta):
                tokens += event.token_ids


async def test_real_agents(cluster: Cluster, etcd: Backing, redis_server: Backing, keys: Keys, tmp_path: Path) -> None:
    """An answer that outgrows the smaller agent ends there alone, and goes on at the larger one where there is one."""
    model = checkpoints.llama(tmp_path / "m")
    make_tokenizer(tmp_path / "m")
    prompt = [3 + n for n in range(100)]
    servers = etcd.address, redis_server.address, keys.prefix, tmp_path
    # Room for the weights and one page of KV, which holds the keys and values of 128 tokens.
    async with running_agent(*servers, agent_id="g0", arena="640KiB") as small:
        spec = await small.prepare("m", tmp_path / "m")
        assert spec.facts.shard_bytes == 9 * PAGE
        await cluster.store.put(cluster.keys.model("m"), spec)
        await small.wake(spec)
        shard = small.shard("m")
        assert shard is not None
        assert shard.pages_kv_most == 1
        router = await cluster.router()
        async with AsyncClient(router.record.address) as client:
            tokens: list[int] = []
            with pytest.raises(InvalidRequestError, match=r"130 tokens need 9 KV blocks.* there would be 8"):
                await answered(client, prompt, tokens)
            assert tokens == expected(model, prompt, 29)
            async with running_agent(*servers, agent_id="g1") as large:
                await large.wake(spec)
                answers: list[list[int]] = [[] for _ in range(12)]
                await asyncio.gather(*(answered(client, prompt, answer) for answer in answers))
                assert answers == [expected(model, prompt, 60)] * 12
