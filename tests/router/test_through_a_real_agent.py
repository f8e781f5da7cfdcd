"""From the client through a router and an agent's engine, and back: nothing of what was asked for is lost between."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from launcher.backing import Backing
from tests.gpu_agent import checkpoints
from tests.gpu_agent.agent_process import running_agent
from tests.router.conftest import Cluster, RunningRouter
from tests.router.peers import make_tokenizer
from warmserve import AsyncClient, InvalidRequestError
from warmserve.cluster.keys import Keys

SCHEMA = {
    "type": "object",
    "properties": {"size": {"enum": [1, 2]}},
    "required": ["size"],
    "additionalProperties": False,
}
MESSAGES = [{"role": "user", "content": "The quick?"}]


@pytest.fixture
async def router(
    cluster: Cluster, etcd: Backing, redis_server: Backing, keys: Keys, tmp_path: Path
) -> AsyncIterator[RunningRouter]:
    checkpoints.llama(tmp_path / "m")
    make_tokenizer(tmp_path / "m")
    async with running_agent(etcd.address, redis_server.address, keys.prefix, tmp_path) as agent:
        spec = await agent.prepare("m", tmp_path / "m")
        await cluster.store.put(cluster.keys.model("m"), spec)
        await agent.wake(spec)
        yield await cluster.router()


async def test_several_answers_with_logprobs(router: RunningRouter) -> None:
    async with AsyncClient(router.record.address) as client:
        completion = await client.generate("m", "The quick", n=3, seed=5, logprobs=2, max_tokens=6)
        assert len({choice.token_ids for choice in completion.choices}) == 3
        for choice in completion.choices:
            assert [item.token_id for item in choice.logprobs] == list(choice.token_ids)
            assert all(len(item.top) == 2 and item.top[0].logprob >= item.logprob for item in choice.logprobs)
        alone = await client.generate("m", "The quick", seed=6, max_tokens=6)
        assert alone.token_ids == completion.choices[1].token_ids


async def test_penalties_and_bias(router: RunningRouter) -> None:
    async with AsyncClient(router.record.address) as client:
        bias = {70: 50.0, 80: 50.0}  # the model's own preference is less than the penalty
        completion = await client.generate(
            "m", "x", temperature=0, max_tokens=4, logit_bias=bias, frequency_penalty=2, stop_token_ids=[2]
        )
    assert set(completion.token_ids[:2]) == set(completion.token_ids[2:]) == {70, 80}


async def test_constraints(router: RunningRouter) -> None:
    async with AsyncClient(router.record.address) as client:
        chosen = await client.generate("m", "x", choice=["yes", "no"], n=4)
        assert {choice.text for choice in chosen.choices} <= {"yes", "no"}
        assert {choice.finish_reason for choice in chosen.choices} == {"stop"}
        with pytest.raises(InvalidRequestError, match="regex"):
            await client.generate("m", "x", regex="[a")
    whole = await router.openai.chat.completions.create(
        model="m",
        messages=MESSAGES,
        logprobs=True,
        top_logprobs=1,
        response_format={"type": "json_schema", "json_schema": {"name": "size", "schema": SCHEMA}},
    )
    choice = whole.choices[0]
    assert json.loads(choice.message.content or "")["size"] in (1, 2)
    assert choice.finish_reason == "stop"
    assert choice.logprobs is not None
    assert choice.logprobs.content
