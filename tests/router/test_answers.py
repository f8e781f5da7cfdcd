"""What requests can ask for beyond one plain text: several answers, log probabilities, penalties, grammars."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import grpc
import openai
import pytest

from services.router.openai_logprobs import CompletionLogprobs
from tests.router.conftest import ANSWER, Cluster, RunningRouter, status_of
from tests.router.peers import PeerAgent, until
from warmserve.v1 import agent_pb2, common_pb2, inference_pb2

MESSAGES = [{"role": "user", "content": "The quick?"}]
TEXTS = ["one fox", ANSWER, "two lazy dogs"]
SCHEMA = {"type": "object", "properties": {"größe": {"type": "integer"}}, "required": ["größe"]}


def varied(cluster: Cluster, agent: PeerAgent, seed: int = 100) -> None:
    """Has an agent answer each of the seeds from `seed` on with a text of its own."""

    def answer(request: agent_pb2.QueuedRequest) -> Sequence[int]:
        return cluster.tokenizer.encode(TEXTS[(request.sampling.seed - seed) % 2**64]).ids

    agent.answer_to = answer


@pytest.fixture
async def serving(cluster: Cluster):
    await cluster.deploy()
    agent = await cluster.agent()
    await agent.activate("m")
    return cluster, agent, await cluster.router()


def request(n: int, **sampling: Any) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(
        model="m", prompt="The quick", n=n, sampling=inference_pb2.SamplingParams(**sampling)
    )


class Gathered:
    """The answers of a call over gRPC; their tokens come once each and in order, and `finished` once, last."""

    def __init__(self, n: int) -> None:
        self.texts = [""] * n
        self.tokens: list[list[int]] = [[] for _ in range(n)]
        self.logprobs: list[list[inference_pb2.TokenLogprob]] = [[] for _ in range(n)]
        self.finished: dict[int, inference_pb2.Finished] = {}
        self.progress: list[inference_pb2.Progress] = []

    def take(self, response: inference_pb2.GenerateResponse) -> None:
        index = response.index
        assert index not in self.finished
        match response.WhichOneof("event"):
            case "progress":
                self.progress.append(response.progress)
            case "delta":
                assert response.delta.offset == len(self.tokens[index])
                self.texts[index] += response.delta.text
                self.tokens[index] += response.delta.token_ids
                self.logprobs[index] += response.delta.logprobs
            case "finished":
                self.finished[index] = response.finished


async def gathered(
    router: RunningRouter, asked: inference_pb2.GenerateRequest, answers: Gathered | None = None
) -> Gathered:
    """The whole answers; `answers`, where given, shows them as they come."""
    answers = answers or Gathered(asked.n or 1)
    async for response in router.grpc.Generate(asked):
        answers.take(response)
    assert len(answers.finished) == (asked.n or 1)
    return answers


async def test_several_answers_have_their_own_seeds_ids_and_ends(serving) -> None:
    cluster, agent, router = serving
    varied(cluster, agent)
    answers = await gathered(router, request(3, seed=100, max_tokens=60))
    assert answers.texts == TEXTS
    assert {item.sampling.seed for item in agent.taken} == {100, 101, 102}
    assert len({item.request_id for item in agent.taken}) == 3
    assert {tuple(item.token_ids) for item in agent.taken} == {tuple(cluster.tokenizer.encode("The quick").ids)}
    for index, finished in answers.finished.items():
        assert finished.usage.prompt_tokens == len(agent.taken[0].token_ids)
        assert finished.usage.completion_tokens == len(answers.tokens[index])
    await until(cluster.queue_is_empty, "the queue entries are gone")


async def test_seeds_of_several_answers_wrap_around_and_are_as_good_as_given(serving) -> None:
    _, agent, router = serving
    await gathered(router, request(2, seed=2**64 - 1))
    assert {item.sampling.seed for item in agent.taken} == {2**64 - 1, 0}
    await gathered(router, request(2))
    first, second = (item.sampling.seed for item in agent.taken[2:])
    assert abs(first - second) in (1, 2**64 - 1)


async def test_openai_several_answers_whole_and_streamed(serving) -> None:
    cluster, agent, router = serving
    varied(cluster, agent)
    tokens = sum(len(cluster.tokenizer.encode(text).ids) for text in TEXTS)
    create = router.openai.chat.completions.create
    whole = await create(model="m", messages=MESSAGES, n=3, seed=100)
    assert [(choice.index, choice.message.content) for choice in whole.choices] == list(enumerate(TEXTS))
    assert whole.usage is not None
    assert whole.usage.completion_tokens == tokens
    assert whole.usage.prompt_tokens == len(agent.taken[0].token_ids)  # once

    texts = [""] * 3
    roles: list[int] = []
    ends: list[int] = []
    agent.hold_at = 2  # until each answer has begun
    usage = None
    stream = await create(
        model="m", messages=MESSAGES, n=3, seed=100, stream=True, stream_options={"include_usage": True}
    )
    async for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            roles += [choice.index] if choice.delta.role else []
            ends += [choice.index] if choice.finish_reason else []
            assert choice.index not in ends[:-1]
            if all(texts):
                agent.go.set()
    assert texts == TEXTS
    assert roles == [0, 1, 2]
    assert sorted(ends) == [0, 1, 2]
    assert usage == whole.usage

    legacy = await router.openai.completions.create(model="m", prompt="x", n=2, seed=100, max_tokens=100)
    assert [choice.text for choice in legacy.choices] == TEXTS[:2]


async def test_a_stop_text_ends_one_of_several_answers(serving) -> None:
    cluster, agent, router = serving
    varied(cluster, agent)
    answers = await gathered(router, request(3, seed=100, stop=[" lazy"]))
    assert answers.texts == [TEXTS[0], TEXTS[1], "two"]


async def test_leaving_ends_all_answers(serving) -> None:
    cluster, agent, router = serving
    agent.hold_at = 3
    call = router.grpc.Generate(request(4))
    await until(lambda: agent.running == 4, "all run")
    call.cancel()
    await until(lambda: agent.running == 0, "all are dropped")
    assert len(set(agent.cancelled)) == 4
    await until(cluster.queue_is_empty, "nothing is left in the queue")


async def test_an_answer_that_fails_ends_the_call_and_the_others(serving) -> None:
    cluster, agent, router = serving
    agent.error = "logits are NaN"
    code, message = await status_of(router.grpc.Generate(request(3)))
    assert code is grpc.StatusCode.INTERNAL
    assert "logits are NaN" in message
    await until(cluster.queue_is_empty, "nothing is left in the queue")
    agent.error = ""
    assert (await gathered(router, request(3))).texts == [ANSWER] * 3


async def test_each_answer_counts_towards_the_limits(cluster: Cluster) -> None:
    await cluster.deploy()
    agent = await cluster.agent()
    agent.hold_at = 2
    await agent.activate("m")
    router = await cluster.router(max_requests_per_model=5, max_requests=6)
    first = asyncio.create_task(gathered(router, request(3)))
    await until(lambda: agent.running == 3, "three run")
    code, message = await status_of(router.grpc.Generate(request(3)))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "3 requests of model 'm' are in progress" in message
    code, message = await status_of(router.grpc.Generate(request(6)))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert message == "n: 6 answers asked for, and this router takes 5 at a time"
    agent.go.set()
    agent.hold_at = None
    await first
    await gathered(router, request(5))


async def test_what_is_true_of_all_waiting_answers_is_told_once(cluster: Cluster) -> None:
    await cluster.deploy()
    placer = await cluster.placer()
    placer.agent = await cluster.agent()
    placer.gate.clear()
    router = await cluster.router()
    answers = Gathered(8)
    call = router.grpc.Generate(request(8))

    async def read() -> None:
        async for response in call:
            answers.take(response)

    reading = asyncio.create_task(read())
    await until(lambda: any(item.HasField("estimated_wait_ms") for item in answers.progress), "the estimate has come")
    assert len(answers.progress) < 8
    placer.gate.set()
    await reading
    assert answers.texts == [ANSWER] * 8


@pytest.mark.parametrize("how", ["dies", "breaks"])
async def test_answers_go_on_elsewhere_each_on_its_own_with_logprobs(cluster: Cluster, how: str) -> None:
    await cluster.deploy()
    first, second = await cluster.agent("a0"), await cluster.agent("a1")
    for agent in (first, second):
        varied(cluster, agent)
    first.hold_at = 2
    await first.activate("m")
    router = await cluster.router()
    asked = request(3, seed=100, logprobs=1, frequency_penalty=1.5, grammar=inference_pb2.Grammar(regex=".*"))
    answers = Gathered(3)
    call = asyncio.create_task(gathered(router, asked, answers))
    await until(lambda: all(answers.tokens), "the client has a token of each")
    await first.stop_pulling()
    await (first.die() if how == "dies" else first.break_streams())
    await second.activate("m")
    await call
    assert answers.texts == TEXTS
    for index in range(3):
        assert [item.token_id for item in answers.logprobs[index]] == answers.tokens[index]
        assert [-item.logprob for item in answers.logprobs[index]] == list(range(len(answers.tokens[index])))
        assert answers.finished[index].timing.resumed == 1
    by_id = {item.request_id: item for item in first.taken}
    for item in second.taken:
        assert item.sampling == by_id[item.request_id].sampling
        prompt = len(by_id[item.request_id].token_ids)
        assert len(item.token_ids) - item.generated == prompt  # so that penalties know what was generated


async def test_grpc_logprobs_name_the_bytes_of_tokens(serving) -> None:
    cluster, _, router = serving
    answers = await gathered(router, request(1, logprobs=2))
    given = answers.logprobs[0]
    assert b"".join(item.token for item in given).decode() == ANSWER
    assert [item.token_id for item in given] == cluster.answer
    assert [[other.token_id for other in item.top] for item in given] == [[t, t + 1] for t in cluster.answer]
    assert all(item.top[0].token == item.token for item in given)
    assert not (await gathered(router, request(1))).logprobs[0]


async def test_openai_chat_logprobs(serving) -> None:
    _, agent, router = serving
    create = router.openai.chat.completions.create
    whole = await create(model="m", messages=MESSAGES, logprobs=True, top_logprobs=2)
    assert agent.taken[0].sampling.logprobs == 2
    assert whole.choices[0].logprobs is not None
    content = whole.choices[0].logprobs.content
    assert content is not None
    assert b"".join(bytes(item.bytes or []) for item in content).decode() == ANSWER
    assert [item.logprob for item in content] == [-float(i) for i in range(len(content))]
    assert all(len(item.top_logprobs) == 2 and item.top_logprobs[0].token == item.token for item in content)

    streamed = []
    async for chunk in await create(model="m", messages=MESSAGES, logprobs=True, top_logprobs=2, stream=True):
        if chunk.choices[0].logprobs is not None:
            streamed += chunk.choices[0].logprobs.content or []
    assert streamed == content
    without = await create(model="m", messages=MESSAGES, logprobs=True)
    assert without.choices[0].logprobs is not None
    assert [item.top_logprobs for item in without.choices[0].logprobs.content or []] == [[]] * len(content)
    assert (await create(model="m", messages=MESSAGES, logprobs=False)).choices[0].logprobs is None


async def test_openai_completion_logprobs(serving) -> None:
    cluster, agent, router = serving
    create = router.openai.completions.create
    whole = await create(model="m", prompt="x", logprobs=1, max_tokens=100)
    given = whole.choices[0].logprobs
    assert given is not None
    assert given.token_logprobs == [-float(i) for i in range(len(cluster.answer))]
    assert given.top_logprobs == [
        {token: logprob} for token, logprob in zip(given.tokens or [], given.token_logprobs, strict=True)
    ]
    offsets = given.text_offset
    assert offsets is not None
    assert offsets == sorted(offsets)
    for start, token in zip(offsets, given.tokens or [], strict=True):
        if "\N{REPLACEMENT CHARACTER}" not in token:
            assert ANSWER.startswith(token, start)
    none = await create(model="m", prompt="x", logprobs=0, max_tokens=100)
    assert agent.taken[1].sampling.HasField("logprobs")
    assert none.choices[0].logprobs is not None
    assert none.choices[0].logprobs.top_logprobs == given.top_logprobs


def test_openai_completion_logprobs_hold_the_chosen_token_where_it_is_none_of_the_likeliest() -> None:
    top = [inference_pb2.TopLogprob(token=token, logprob=-rank) for rank, token in ((1, b" one"), (2, b" two"))]
    given = [
        inference_pb2.TokenLogprob(token=b" fox", logprob=-7, top=top),
        inference_pb2.TokenLogprob(token=b" two", logprob=-2, top=top),
    ]
    assert CompletionLogprobs().of(given)["top_logprobs"] == [
        {" one": -1, " two": -2, " fox": -7},
        {" one": -1, " two": -2},
    ]


async def test_logprobs_end_where_a_stop_text_ends_the_answer(serving) -> None:
    _, _, router = serving
    answers = await gathered(router, request(1, logprobs=0, stop=["fox"]))
    assert answers.texts[0] == ANSWER[: ANSWER.index("fox")]
    assert [item.token_id for item in answers.logprobs[0]] == answers.tokens[0]


async def test_a_stop_text_counts_only_after_min_tokens(serving) -> None:
    cluster, agent, router = serving
    agent.answer = cluster.tokenizer.encode("fox one fox two fox").ids
    first, second = (len(cluster.tokenizer.encode(text).ids) for text in ("fox", "fox one fox"))
    assert (await gathered(router, request(1, stop=["fox"]))).texts == [""]
    assert (await gathered(router, request(1, stop=["fox"], min_tokens=first))).texts == ["fox one "]
    assert (await gathered(router, request(1, stop=["fox"], min_tokens=second))).texts == ["fox one fox two "]


async def test_an_instance_that_sends_no_logprobs_is_a_failing_one(serving) -> None:
    cluster, agent, router = serving
    agent.sends_logprobs = False
    code, message = await status_of(router.grpc.Generate(request(1, logprobs=0)))
    assert code is grpc.StatusCode.INTERNAL
    assert "sent no log probabilities" in message
    await until(lambda: agent.running == 0, "the agent is told to drop it")
    await until(cluster.queue_is_empty, "nothing is left in the queue")


async def test_openai_parameters_reach_the_agent(serving) -> None:
    _, agent, router = serving
    await router.openai.chat.completions.create(
        model="m",
        messages=MESSAGES,
        presence_penalty=0.5,
        frequency_penalty=-1,
        logit_bias={"5": -100, "7": 2},
        response_format={"type": "json_schema", "json_schema": {"name": "size", "schema": SCHEMA, "strict": True}},
        extra_body={"min_p": 0.1, "repetition_penalty": 1.2, "stop_token_ids": [3, 4]},
    )
    sampling = agent.taken[0].sampling
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.5, -1)
    assert (sampling.min_p, sampling.repetition_penalty) == (0.1, 1.2)
    assert dict(sampling.logit_bias) == {5: -100, 7: 2}
    assert list(sampling.stop_token_ids) == [3, 4]
    assert json.loads(sampling.grammar.json_schema) == SCHEMA
    await router.openai.completions.create(model="m", prompt="x", extra_body={"min_tokens": 3})
    assert agent.taken[1].sampling.min_tokens == 3
    assert not agent.taken[1].sampling.HasField("grammar")


@pytest.mark.parametrize(
    ("constraint", "expected"),
    [
        ({"regex": "a+"}, inference_pb2.Grammar(regex="a+")),
        ({"grammar": 'root ::= "a"'}, inference_pb2.Grammar(ebnf='root ::= "a"')),
        ({"choice": ["yes", "no"]}, inference_pb2.Grammar(choice=inference_pb2.Choices(texts=["yes", "no"]))),
        ({"json": {"type": "object"}}, inference_pb2.Grammar(json_schema='{"type":"object"}')),
        ({"json": '{"type": "object"}'}, inference_pb2.Grammar(json_schema='{"type": "object"}')),
        ({"json_object": True}, inference_pb2.Grammar(json_object=True)),
    ],
)
async def test_openai_constraints_reach_the_agent(
    serving, constraint: dict[str, Any], expected: inference_pb2.Grammar
) -> None:
    _, agent, router = serving
    extra = {"structured_outputs": constraint}
    await router.openai.completions.create(model="m", prompt="x", extra_body=extra)
    await router.openai.chat.completions.create(model="m", messages=MESSAGES, extra_body=extra)
    assert [item.sampling.grammar for item in agent.taken] == [expected, expected]


async def test_what_no_instance_can_serve_is_the_clients_mistake_and_not_tried_again(serving) -> None:
    cluster, agent, router = serving
    agent.error = "grammar: the regex has an unclosed bracket"
    agent.error_reason = inference_pb2.FINISH_REASON_REFUSED
    asked = request(1, grammar=inference_pb2.Grammar(regex="[a"))
    code, message = await status_of(router.grpc.Generate(asked))
    assert (code, message) == (grpc.StatusCode.INVALID_ARGUMENT, agent.error)
    assert len(agent.taken) == 1
    with pytest.raises(openai.BadRequestError, match="unclosed bracket"):
        await router.openai.completions.create(
            model="m", prompt="x", extra_body={"structured_outputs": {"regex": "[a"}}
        )
    await until(cluster.queue_is_empty, "nothing is left in the queue")


async def test_priority_is_that_of_all_answers(serving) -> None:
    _, agent, router = serving
    asked = request(2)
    asked.priority = common_pb2.PRIORITY_LOW
    await gathered(router, asked)
    assert [item.priority for item in agent.taken] == [common_pb2.PRIORITY_LOW] * 2
