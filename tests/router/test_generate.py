"""Answers through both doors, over real sockets."""

from __future__ import annotations

import httpx
import pytest

from tests.router.conftest import ANSWER, Cluster, gathered
from tests.router.peers import until
from warmserve.v1 import common_pb2, inference_pb2

MESSAGES = [{"role": "user", "content": "The quick?"}]


@pytest.fixture
async def serving(cluster: Cluster):
    await cluster.deploy()
    agent = await cluster.agent()
    await agent.activate("m")
    return cluster, agent, await cluster.router()


async def test_grpc_streams_whole_characters_and_ends_with_finished(serving) -> None:
    cluster, agent, router = serving
    text, tokens, finished, progress = await gathered(router.generate(seed=7))
    assert text == ANSWER
    assert tokens == cluster.answer
    assert finished.reason == inference_pb2.FINISH_REASON_STOP
    [request] = agent.taken
    assert list(request.token_ids) == cluster.tokenizer.encode("The quick").ids
    assert finished.usage.prompt_tokens == len(request.token_ids)
    assert finished.usage.completion_tokens == len(tokens)
    assert request.sampling.seed == 7
    assert request.sampling.max_tokens == 512 - len(request.token_ids)
    assert finished.timing.found_state == common_pb2.REPLICA_STATE_ACTIVE
    assert 0 < finished.timing.queue_ms <= finished.timing.ttft_ms <= finished.timing.total_ms
    assert finished.timing.resumed == 0
    assert all(item.state == inference_pb2.PROGRESS_STATE_QUEUED for item in progress)


async def test_no_piece_of_text_holds_half_a_character(serving) -> None:
    _, _, router = serving
    pieces = [item.delta.text async for item in router.generate() if item.WhichOneof("event") == "delta"]
    assert len(pieces) > 3
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


async def test_conversations_and_token_ids_reach_the_agent_as_tokens(serving) -> None:
    cluster, agent, router = serving
    message = inference_pb2.ChatMessage(role="user", content="The quick?")
    await gathered(
        router.grpc.Generate(
            inference_pb2.GenerateRequest(model="m", conversation=inference_pb2.Conversation(messages=[message]))
        )
    )
    expected = cluster.tokenizer.encode("<|user|>The quick?</s><|assistant|>").ids
    assert list(agent.taken[0].token_ids) == expected
    await gathered(
        router.grpc.Generate(inference_pb2.GenerateRequest(model="m", token_ids=inference_pb2.TokenIds(ids=[9, 8])))
    )
    assert list(agent.taken[1].token_ids) == [9, 8]


async def test_seeds_differ_where_none_is_given(serving) -> None:
    _, agent, router = serving
    for _ in range(2):
        await gathered(router.generate())
    assert agent.taken[0].sampling.HasField("seed")
    assert agent.taken[0].sampling.seed != agent.taken[1].sampling.seed


async def test_priority_chooses_the_stream(serving) -> None:
    _, agent, router = serving
    request = inference_pb2.GenerateRequest(model="m", prompt="x", priority=common_pb2.PRIORITY_LOW, request_id="mine")
    responses = [item async for item in router.grpc.Generate(request)]
    assert {item.request_id for item in responses} == {"mine"}
    assert agent.taken[0].priority == common_pb2.PRIORITY_LOW
    assert agent.taken[0].request_id != "mine"  # clients may give the same id twice


async def test_openai_chat_whole_and_streamed(serving) -> None:
    cluster, agent, router = serving
    whole = await router.openai.chat.completions.create(
        model="m", messages=MESSAGES, max_completion_tokens=100, user="u", metadata={"a": "b"}, store=False, n=1
    )
    assert whole.object == "chat.completion"
    assert whole.choices[0].message.role == "assistant"
    assert whole.choices[0].message.content == ANSWER
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage is not None
    assert whole.usage.completion_tokens == len(cluster.answer)
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    assert agent.taken[0].sampling.max_tokens == 100

    stream = await router.openai.chat.completions.create(
        model="m", messages=MESSAGES, stream=True, stream_options={"include_usage": True}, temperature=0, top_p=0.5
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == ANSWER
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(cluster.answer)
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1
    assert agent.taken[1].sampling.temperature == 0
    assert agent.taken[1].sampling.top_p == 0.5


async def test_openai_completions_whole_and_streamed(serving) -> None:
    cluster, agent, router = serving
    whole = await router.openai.completions.create(model="m", prompt="The quick", max_tokens=5)
    assert whole.choices[0].text == cluster.tokenizer.decode(cluster.answer[:5])
    assert whole.choices[0].finish_reason == "length"
    stream = await router.openai.completions.create(model="m", prompt=[[5, 6]], max_tokens=300, stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == ANSWER
    assert list(agent.taken[1].token_ids) == [5, 6]
    await router.openai.completions.create(model="m", prompt=["one"])
    assert agent.taken[2].sampling.max_tokens == 16


async def test_the_stream_ends_with_done_and_names_the_request(serving) -> None:
    _, _, router = serving
    body = {"model": "m", "messages": MESSAGES, "stream": True}
    async with httpx.AsyncClient() as http:
        answer = await http.post(
            f"{router.record.http_url}/v1/chat/completions", json=body, headers={"X-Request-Id": "abc"}
        )
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["x-request-id"] == "abc"
    lines = [line for line in answer.text.split("\n\n") if line and not line.startswith(":")]
    assert lines[-1] == "data: [DONE]"
    assert all(line.startswith("data: ") for line in lines)


@pytest.mark.parametrize("stop", ["fox", " quick fox", "日本"])
async def test_a_stop_text_over_several_tokens_ends_the_answer_and_frees_the_agent(serving, stop: str) -> None:
    cluster, agent, router = serving
    expected = ANSWER[: ANSWER.index(stop)]
    assert len(cluster.tokenizer.encode(stop).ids) > 1
    agent.hold_at = len(cluster.answer) - 1  # the agent would go on
    text, tokens, finished, _ = await gathered(router.generate(stop=["never", stop]))
    assert text == expected
    assert finished.reason == inference_pb2.FINISH_REASON_STOP
    assert finished.usage.completion_tokens == len(tokens) < len(cluster.answer)
    await until(lambda: agent.running == 0, "the sequence is cancelled")
    whole = await router.openai.completions.create(model="m", prompt="x", stop=stop, max_tokens=300)
    assert whole.choices[0].text == expected
    assert whole.choices[0].finish_reason == "stop"
    await until(cluster.queue_is_empty, "the queue entries are gone")


async def test_what_only_looked_like_a_stop_text_is_given_out(serving) -> None:
    _, _, router = serving
    text, *_ = await gathered(router.generate(stop=["goes on.!", "🙂🙂"]))
    assert text == ANSWER


async def test_models_are_listed_by_both_doors(serving) -> None:
    cluster, _, router = serving
    await cluster.deploy("org/other", context=64)
    await cluster.models_known(router, "m", "org/other")
    listed = (await router.grpc.ListModels(inference_pb2.ListModelsRequest())).models
    assert [(item.name, item.state, item.context_tokens) for item in listed] == [
        ("m", common_pb2.REPLICA_STATE_ACTIVE, 512),
        ("org/other", common_pb2.REPLICA_STATE_COLD, 64),
    ]
    assert [item.id async for item in router.openai.models.list()] == ["m", "org/other"]
    assert (await router.openai.models.retrieve("org/other")).id == "org/other"


@pytest.mark.parametrize("state", ["WARM", "WARMING"])
async def test_found_state_is_the_best_replicas_at_arrival(cluster: Cluster, state: str) -> None:
    await cluster.deploy()
    agent = await cluster.agent()
    await agent.tell_residency("m", common_pb2.ReplicaState.Value(f"REPLICA_STATE_{state}"))
    placer = await cluster.placer()
    placer.agent = agent
    router = await cluster.router()
    _, _, finished, _ = await gathered(router.generate())
    assert finished.timing.found_state == common_pb2.ReplicaState.Value(f"REPLICA_STATE_{state}")


async def test_requests_of_several_models_do_not_mix(serving) -> None:
    cluster, _, router = serving
    await cluster.deploy("n")
    other = await cluster.agent("a1", cluster.tokenizer.encode("another text").ids)
    await other.activate("n")
    await cluster.models_known(router, "m", "n")
    text, *_ = await gathered(router.generate("n"))
    assert text == "another text"


async def test_health(serving) -> None:
    _, _, router = serving
    async with httpx.AsyncClient() as http:
        answer = await http.get(f"{router.record.http_url}/health")
    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})
