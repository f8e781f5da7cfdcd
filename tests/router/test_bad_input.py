"""Nonsense is refused early, by name, with the same words at both doors, and leaves nothing behind."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import grpc
import httpx
import openai
import pytest

from tests.router.conftest import Cluster, RunningRouter, error_of, status_of
from tests.router.peers import make_tokenizer, until
from warmserve.v1 import inference_pb2

MESSAGES = [{"role": "user", "content": "hello"}]
LONG = "quick fox " * 200


@pytest.fixture
async def router(cluster: Cluster) -> RunningRouter:
    await cluster.deploy("llama-small", context=100)
    await cluster.deploy("qwen-small", context=100)
    agent = await cluster.agent()
    for model in ("llama-small", "qwen-small"):
        await agent.activate(model)
    return await cluster.router(max_body_bytes=20_000, max_prompt_chars=5_000)


async def post(router: RunningRouter, path: str, content: Any, **headers: str) -> httpx.Response:
    async with httpx.AsyncClient() as http:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        return await http.post(f"{router.record.http_url}{path}", content=data, headers=headers)


def chat(**changes: Any) -> dict[str, Any]:
    body = {"model": "llama-small", "messages": MESSAGES, "max_tokens": 5} | changes
    return {name: value for name, value in body.items() if value != "LEFT OUT"}


CHAT_REFUSALS = [
    # body, parameter, words of the message
    (chat(max_tokens=-1), "max_tokens", "-1 is not between 1"),
    (chat(max_tokens=0), "max_tokens", "0 is not between 1"),
    (chat(max_tokens=10**30), "max_tokens", "is not between 1"),
    (chat(max_tokens=5000), "max_tokens", "context of 100 tokens"),
    (chat(max_tokens="5"), "max_tokens", "integer"),
    (chat(max_tokens=True), "max_tokens", "integer"),
    (chat(max_tokens=5, max_completion_tokens=6), "max_tokens", "differs"),
    (chat(temperature=2.1), "temperature", "2.1 is not between 0 and 2"),
    (chat(temperature=-0.1), "temperature", "is not between 0 and 2"),
    (chat(top_p=0), "top_p", "above 0"),
    (chat(top_p=1.5), "top_p", "between 0 and 1"),
    (chat(top_k=-1), "top_k", "between 0"),
    (chat(seed=2**65), "seed", "between"),
    (chat(stop=""), "stop", "empty"),
    (chat(stop=["x"] * 17), "stop", "at most 16"),
    (chat(stop=[1]), "stop[0]", "string"),
    (chat(stop="x" * 1001), "stop", "1001 characters"),
    (chat(n=0), "n", "0 is not between 1 and 16"),
    (chat(n=17), "n", "17 is not between 1 and 16"),
    (chat(logprobs=2), "logprobs", "boolean"),
    (chat(top_logprobs=2), "top_logprobs", "logprobs=true"),
    (chat(logprobs=True, top_logprobs=21), "top_logprobs", "21 is not between 0 and 20"),
    (chat(tools=[{"type": "function"}]), "tools", "does not serve"),
    (chat(min_p=1.1), "min_p", "1.1 is not between 0 and 1"),
    (chat(repetition_penalty=0), "repetition_penalty", "above 0"),
    (chat(repetition_penalty=-1), "repetition_penalty", "-1 is not between 0 and 10"),
    (chat(repetition_penalty=11), "repetition_penalty", "11 is not between 0 and 10"),
    (chat(presence_penalty=2.5), "presence_penalty", "2.5 is not between -2 and 2"),
    (chat(frequency_penalty=-3), "frequency_penalty", "-3 is not between -2 and 2"),
    (chat(logit_bias={"5": 101}), "logit_bias[5]", "101 is not between -100 and 100"),
    (chat(logit_bias={"x": 1}), "logit_bias", "'x' is no token id"),
    (chat(logit_bias={"²": 1}), "logit_bias", "'²' is no token id"),
    (chat(logit_bias={"5000000000": 1}), "logit_bias", "5000000000 is not between 0"),
    (chat(logit_bias={"100000": 1}), "logit_bias", "not in the model's vocabulary"),
    (chat(logit_bias={str(i): 1 for i in range(1025)}), "logit_bias", "at most 1024"),
    (chat(stop_token_ids=[5, -1]), "stop_token_ids", "-1 is not between 0"),
    (chat(stop_token_ids=[100_000]), "stop_token_ids", "not in the model's vocabulary"),
    (chat(stop_token_ids=[5] * 129), "stop_token_ids", "at most 128"),
    (chat(min_tokens=6), "min_tokens", "6 is more than max_tokens, which is 5"),
    (chat(max_tokens="LEFT OUT", min_tokens=100), "min_tokens", "context of 100 tokens"),
    (chat(min_tokens=-1), "min_tokens", "-1 is not between 0"),
    (chat(response_format={"type": "yaml"}), "response_format.type", "'json_object'"),
    (chat(response_format={"type": "json_schema"}), "response_format.json_schema.schema", "missing"),
    (chat(response_format={"type": "text", "json_schema": {}}), "response_format.json_schema", "does not take it"),
    (chat(response_format={"type": "json_object"}, min_tokens=2), "min_tokens", "response_format says when"),
    (chat(response_format={"type": "json_object"}, ignore_eos=True), "ignore_eos", "response_format says when"),
    (
        chat(response_format={"type": "json_object"}, structured_outputs={"regex": "a"}),
        "structured_outputs",
        "not both",
    ),
    (chat(structured_outputs={}), "structured_outputs", "exactly one"),
    (chat(structured_outputs={"regex": "a", "choice": ["b"]}), "structured_outputs", "exactly one"),
    (chat(structured_outputs={"regex": " "}), "structured_outputs", "the regex is empty"),
    (chat(structured_outputs={"json": "{"}), "structured_outputs", "not JSON"),
    (chat(structured_outputs={"json": "5"}), "structured_outputs", "is an object"),
    (chat(structured_outputs={"json": "[" * 9000}), "structured_outputs", "not JSON"),
    (chat(structured_outputs={"json_object": False}), "structured_outputs", "only be true"),
    (chat(structured_outputs={"choice": []}), "structured_outputs", "give 1 to 1024"),
    (chat(structured_outputs={"choice": ["a", ""]}), "structured_outputs", "empty choice"),
    (chat(structured_outputs={"choice": ["a", "a"]}), "structured_outputs", "given twice"),
    (chat(structured_outputs={"yaml": "a"}), "structured_outputs.yaml", "no such parameter"),
    (chat(store=True), "store", "does not serve"),
    (chat(temprature=1), "temprature", "did you mean 'temperature'"),
    (chat(nonsense=1), "nonsense", "no such parameter"),
    (chat(messages="LEFT OUT"), "messages", "missing"),
    (chat(messages=[]), "messages", "at least one message"),
    (chat(messages="hello"), "messages", "list"),
    (chat(messages=[{"role": "user"}]), "messages[0].content", "missing"),
    (chat(messages=[{"content": "x"}]), "messages[0].role", "missing"),
    (chat(messages=[{"role": "wizard", "content": "x"}]), "messages[0].role", "'wizard' is not one of"),
    (chat(messages=[{"role": "tool", "content": "x"}]), "messages[0].role", "'tool' is not one of"),
    (chat(messages=[{"role": "user", "content": 5}]), "messages[0].content", "give a text"),
    (chat(messages=[{"role": "user", "content": "x", "colour": "red"}]), "messages[0].colour", "no such parameter"),
    (
        chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
        "messages[0].content",
        "'image_url'",
    ),
    (chat(messages=[{"role": "assistant", "content": "", "tool_calls": [{}]}]), "messages[0].tool_calls", "not serve"),
    (chat(messages=[*MESSAGES, {"role": "system", "content": "x"}]), "messages", "system must come first"),
    (chat(messages=[{"role": "user", "content": LONG}]), "messages", "the model's context is 100 tokens"),
    (chat(messages=[{"role": "user", "content": "x" * 5001}]), "messages", "5,001 characters"),
    (chat(stream_options={"include_usage": True}), "stream_options", "stream=true"),
    (chat(stream=True, stream_options={"include": 1}), "stream_options.include", "no such parameter"),
    (chat(model="LEFT OUT"), "model", "missing"),
    (chat(model=""), "model", "name a deployed model"),
    (chat(model=5), "model", "string"),
]


NO_OBJECTS = [
    b"",
    b"{",
    b"[]",
    b'"text"',
    b'{"model": NaN}',
    b'{"model": "\\ud800"}',
    b"\xff\xfe",
    b"[" * 9000,
]


def problem(answer: httpx.Response, param: str, words: str) -> str | None:
    """What is wrong with a refusal. Clients shorten a prompt where the code says that the context is too small."""
    code = "context_length_exceeded" if "context" in words else "invalid_parameter"
    error = answer.json().get("error", {})
    found = (answer.status_code, error.get("type"), error.get("param"), error.get("code"))
    if found != (400, "invalid_request_error", param, code) or words not in error["message"]:
        return f"{param}, {words!r}: {found}: {answer.text[:200]}"
    return None


async def test_bad_chat_requests_are_refused(router: RunningRouter) -> None:
    problems = [
        problem(await post(router, "/v1/chat/completions", body), param, words) for body, param, words in CHAT_REFUSALS
    ]
    assert [item for item in problems if item] == []


COMPLETION_REFUSALS = [
    ({"prompt": ""}, "prompt", "empty"),
    ({"prompt": []}, "prompt", "empty"),
    ({"prompt": ["a", "b"]}, "prompt", "2 prompts"),
    ({"prompt": [5, "a"]}, "prompt", "text or a list of token ids"),
    ({"prompt": [5, 10**9]}, "prompt", "not in the model's vocabulary"),
    ({"prompt": [-1]}, "prompt", "not in the model's vocabulary"),
    ({"prompt": [True]}, "prompt", "token ids"),
    ({"prompt": [5] * 100}, "prompt", "the prompt has 100 tokens; the model's context is 100 tokens"),
    ({}, "prompt", "missing"),
    ({"prompt": "x", "echo": True}, "echo", "does not serve"),
    ({"prompt": "x", "best_of": 3}, "best_of", "does not serve"),
    ({"prompt": "x", "suffix": "y"}, "suffix", "does not serve"),
    ({"prompt": "x", "logprobs": 21}, "logprobs", "21 is not between 0 and 20"),
    ({"prompt": "x", "logprobs": True}, "logprobs", "integer"),
    ({"prompt": "x", "response_format": {"type": "text"}}, "response_format", "no such parameter"),
    ({"prompt": "x", "messages": []}, "messages", "no such parameter"),
]


async def test_bad_completion_requests_are_refused(router: RunningRouter) -> None:
    problems = [
        problem(await post(router, "/v1/completions", {"model": "llama-small"} | body), param, words)
        for body, param, words in COMPLETION_REFUSALS
    ]
    assert [item for item in problems if item] == []


async def test_what_is_not_a_json_object_is_refused(router: RunningRouter) -> None:
    for content in NO_OBJECTS:
        answer = await post(router, "/v1/chat/completions", content)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "body"


async def test_neutral_values_of_what_is_not_served_are_taken(router: RunningRouter) -> None:
    neutral = {
        "n": 1,
        "logprobs": False,
        "top_logprobs": None,
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "logit_bias": {},
        "store": False,
        "service_tier": "auto",
        "user": "me",
        "metadata": {"team": "a"},
        "stop": None,
        "seed": -5,
        "temperature": None,
        "stream": False,
        "stream_options": None,
    }
    earlier = {"role": "assistant", "content": "hi", "refusal": None, "tool_calls": [], "annotations": []}
    parts = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    messages = [{"role": "developer", "content": "be brief"}, *MESSAGES, earlier, parts]
    answer = await post(router, "/v1/chat/completions", chat(messages=messages, **neutral))
    assert answer.status_code == 200, answer.text


async def test_an_unknown_model_is_answered_with_the_nearest_names(router: RunningRouter) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        await router.openai.chat.completions.create(model="lama-small", messages=MESSAGES)
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"
    assert "did you mean 'llama-small'" in str(caught.value)
    with pytest.raises(openai.NotFoundError, match="'llama-small'"):
        await router.openai.models.retrieve("llama_small")
    error = await error_of(router.generate("lama-small"))
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert "did you mean 'llama-small'" in (error.details() or "")
    assert ("warmserve-suggestion", "llama-small") in [tuple(item) for item in error.trailing_metadata()]
    _, message = await status_of(router.generate("zzz"))
    assert "deployed are llama-small, qwen-small" in message


@pytest.mark.parametrize("declared", [True, False])
async def test_an_oversized_body_is_refused(router: RunningRouter, declared: bool) -> None:
    data = json.dumps(chat(messages=[{"role": "user", "content": "x" * 100_000}])).encode()

    async def chunks():
        for start in range(0, len(data), 10_000):
            yield data[start : start + 10_000]

    async with httpx.AsyncClient() as http:
        answer = await http.post(
            f"{router.record.http_url}/v1/chat/completions", content=data if declared else chunks()
        )
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "body_too_large"
    assert "20,000 bytes" in answer.json()["error"]["message"]


async def test_paths_and_methods_that_are_not_served(router: RunningRouter) -> None:
    async with httpx.AsyncClient(base_url=router.record.http_url) as http:
        lost = await http.get("/v1/embeddings")
        wrong = await http.get("/v1/chat/completions")
        wrong_too = await http.post("/v1/models")
    assert (lost.status_code, lost.json()["error"]["code"]) == (404, "not_found")
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "method_not_allowed")
    assert wrong.headers["allow"] == "POST"
    assert wrong_too.status_code == 405


async def test_a_timeout_that_is_none_is_refused(router: RunningRouter) -> None:
    for value in ("soon", "0", "-5", "1e9", "nan"):
        answer = await post(router, "/v1/chat/completions", chat(), **{"X-Request-Timeout": value})
        assert answer.status_code == 400
        assert "imeout" in answer.json()["error"]["param"]


def generate(**fields: Any) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(**({"model": "llama-small", "prompt": "hello"} | fields))


def sampling(**fields: Any) -> inference_pb2.GenerateRequest:
    return generate(sampling=inference_pb2.SamplingParams(**fields))


def conversation(*messages: tuple[str, str]) -> inference_pb2.GenerateRequest:
    made = [inference_pb2.ChatMessage(role=role, content=content) for role, content in messages]
    return inference_pb2.GenerateRequest(model="llama-small", conversation=inference_pb2.Conversation(messages=made))


GRPC_REFUSALS = [
    (sampling(max_tokens=0), "max_tokens", "at least 1"),
    (sampling(max_tokens=2**32 - 1), "max_tokens", "context of 100 tokens"),
    (sampling(temperature=math.nan), "temperature", "not between 0 and 2"),
    (sampling(temperature=-1), "temperature", "not between 0 and 2"),
    (sampling(top_p=0), "top_p", "above 0"),
    (sampling(top_k=2**31), "top_k", "2,147,483,648 is not between 0"),
    (sampling(stop=[""]), "stop", "empty"),
    (generate(n=17), "n", "between 1 and 16"),
    (sampling(logprobs=21), "logprobs", "between 0 and 20"),
    (sampling(logit_bias={5: math.nan}), "logit_bias[5]", "nan is not between"),
    (sampling(repetition_penalty=math.inf), "repetition_penalty", "inf is not between"),
    (sampling(grammar=inference_pb2.Grammar()), "grammar", "set one of"),
    (sampling(grammar=inference_pb2.Grammar(ebnf="x" * 65_537)), "grammar", "at most 65,536"),
    (generate(model=""), "model", "name a deployed model"),
    (generate(prompt=""), "prompt", "empty"),
    (generate(prompt=LONG), "prompt", "the model's context is 100 tokens"),
    (generate(prompt="x" * 5001), "prompt", "at most 5,000"),
    (generate(request_id="x" * 129), "request_id", "128"),
    (generate(request_id="a\nb"), "request_id", "printable"),
    (generate(priority=77), "priority", "77"),
    (inference_pb2.GenerateRequest(model="llama-small"), "input", "set one of"),
    (conversation(), "conversation.messages", "at least one"),
    (conversation(("wizard", "x")), "conversation.messages[0].role", "'wizard'"),
    (conversation(("user", "x"), ("system", "y")), "conversation.messages", "system must come first"),
    (
        inference_pb2.GenerateRequest(model="llama-small", token_ids=inference_pb2.TokenIds(ids=[7, 4_000_000])),
        "token_ids",
        "position 1 is not in the model's vocabulary",
    ),
]


async def test_bad_grpc_requests_are_refused(router: RunningRouter) -> None:
    for request, field, words in GRPC_REFUSALS:
        code, message = await status_of(router.grpc.Generate(request))
        assert code is grpc.StatusCode.INVALID_ARGUMENT, (field, message)
        assert message.startswith(f"{field}: ")
        assert words in message


async def test_refused_requests_leave_nothing_behind(cluster: Cluster) -> None:
    await cluster.deploy()
    router = await cluster.router(max_requests_per_model=1)
    for _ in range(3):
        await status_of(router.generate(max_tokens=100_000))
    assert await cluster.queue_is_empty()
    agent = await cluster.agent()
    await agent.activate("m")
    assert (await post(router, "/v1/completions", {"model": "m", "prompt": "x"})).status_code == 200


async def test_a_model_without_chat_template_says_so(cluster: Cluster, tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "plain", template=None)
    await cluster.deploy("plain", folder=tmp_path / "plain")
    router = await cluster.router()
    answer = await post(router, "/v1/chat/completions", chat(model="plain"))
    assert answer.status_code == 400
    assert "no chat template" in answer.json()["error"]["message"]


async def test_a_tokenizer_that_cannot_be_loaded_is_told_and_tried_again(cluster: Cluster, tmp_path: Path) -> None:
    folder = tmp_path / "late"
    folder.mkdir()
    await cluster.deploy("late", folder=folder)
    router = await cluster.router()
    answer = await post(router, "/v1/completions", {"model": "late", "prompt": "x"})
    assert answer.status_code == 500
    assert "no tokenizer.json" in answer.json()["error"]["message"]
    (folder / "tokenizer.json").write_text("{")
    answer = await post(router, "/v1/completions", {"model": "late", "prompt": "x"})
    assert "cannot be loaded" in answer.json()["error"]["message"]
    make_tokenizer(folder)
    agent = await cluster.agent()
    await agent.activate("late")

    async def serves() -> bool:
        return (await post(router, "/v1/completions", {"model": "late", "prompt": "x"})).status_code == 200

    await until(serves, "the model is served once its tokenizer is there")
