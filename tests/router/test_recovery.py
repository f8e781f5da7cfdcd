"""Agents, token streams and Redis go; requests stay, without a gap and without a repeat."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import grpc
import pytest
from redis.asyncio import Redis

from launcher.backing import Backing, start_redis
from launcher.ports import free_port
from services.common.grpc_frame import channel
from services.common.queues import RequestQueue, Ticket
from tests.router.conftest import ANSWER, Cluster, RunningRouter, gathered, status_of
from tests.router.peers import PeerAgent, until
from warmserve.cluster.events import EventStream
from warmserve.cluster.keys import Keys
from warmserve.cluster.store import Store
from warmserve.v1 import agent_pb2, agent_pb2_grpc, cluster_pb2, inference_pb2


@pytest.mark.parametrize("how", ["its stream breaks", "it is killed", "its record ends"])
async def test_streams_go_on_at_another_agent_where_they_stopped(cluster: Cluster, how: str) -> None:
    await cluster.deploy()
    first = await cluster.agent("a0")
    first.hold_at = 7
    await first.activate("m")
    router = await cluster.router()
    seen: list[list[int]] = [[] for _ in range(5)]
    calls = [asyncio.create_task(gathered(router.generate(), tokens)) for tokens in seen]
    await until(lambda: all(seen), "clients have tokens of all from the first agent")
    stream = await router.openai.chat.completions.create(
        model="m", messages=[{"role": "user", "content": "x"}], stream=True
    )
    chunks = aiter(stream)
    streamed = ""
    while not streamed:
        streamed += (await anext(chunks)).choices[0].delta.content or ""
    await first.stop_pulling()
    match how:
        case "its stream breaks":
            await first.break_streams()
        case "it is killed":
            await first.die(lease_ends=False)  # the stream tells long before the lease
        case "its record ends":
            await first.unregister()  # as when it hangs, or etcd cannot be reached from it
    second = await cluster.agent("a1")
    await second.activate("m")
    for answer, tokens, finished, progress in await asyncio.gather(*calls):
        assert answer == ANSWER
        assert tokens == cluster.answer
        assert finished.timing.resumed == 1
        assert finished.usage.completion_tokens == len(cluster.answer)
        assert inference_pb2.PROGRESS_STATE_RESUMING in [item.state for item in progress]
    async for chunk in chunks:
        streamed += chunk.choices[0].delta.content or ""
    assert streamed == ANSWER
    for request in second.taken:
        assert request.attempt == 1
        assert request.generated <= 7
        prompt = len(request.token_ids) - request.generated
        assert list(request.token_ids[prompt:]) == cluster.answer[: request.generated]
    assert any(request.generated for request in second.taken)
    if how == "its record ends":
        await until(lambda: first.running == 0, "the agent is told to drop what has moved")
    await until(cluster.queue_is_empty, "nothing is left in the queue")
    events = await EventStream(cluster.redis, cluster.keys).newest(10)
    assert [event.kind for _, event in events] == [cluster_pb2.EVENT_KIND_REQUEST_RESUMED] * 6
    assert events[0][1].agent_ids == ["a0"]


async def test_a_resumed_request_keeps_its_seed_and_its_bound(cluster: Cluster) -> None:
    await cluster.deploy()
    first = await cluster.agent("a0")
    first.hold_at = 4
    await first.activate("m")
    router = await cluster.router()
    call = asyncio.create_task(gathered(router.generate(max_tokens=6)))
    await until(lambda: first.running == 1, "it runs")
    await first.die()
    second = await cluster.agent("a1")
    await second.activate("m")
    _, tokens, finished, _ = await call
    assert tokens == cluster.answer[:6]
    assert finished.reason == inference_pb2.FINISH_REASON_LENGTH
    assert second.taken[0].sampling == first.taken[0].sampling


async def test_requests_that_a_dead_instance_had_taken_but_not_begun_are_put_back(cluster: Cluster) -> None:
    await cluster.deploy()
    first = await cluster.agent("a0")
    first.report = False
    await first.activate("m")
    router = await cluster.router()
    calls = [asyncio.create_task(gathered(router.generate())) for _ in range(3)]
    await until(lambda: len(first.taken) == 3, "the first agent has taken them")
    await first.die()
    second = await cluster.agent("a1")
    await second.activate("m")
    answers = await asyncio.gather(*calls)
    assert all(text == ANSWER for text, *_ in answers)
    assert all(finished.timing.resumed == 0 for _, _, finished, _ in answers)
    assert {request.attempt for request in second.taken} == {1}
    await until(cluster.queue_is_empty, "the dead instance's entries are gone")


async def test_two_instances_start_the_same_request(cluster: Cluster) -> None:
    await cluster.deploy()
    first, second = await cluster.agent("a0"), await cluster.agent("a1")
    first.hold_at = second.hold_at = 3
    await first.activate("m")
    router = await cluster.router()
    seen: list[int] = []
    call = asyncio.create_task(gathered(router.generate(), seen))
    await until(lambda: bool(seen), "the first agent has it, and the client a token")
    await first.stop_pulling()
    await cluster.queue.put(first.taken[0])  # as when an answer of Redis was lost and the entry put twice
    await second.activate("m")
    await until(lambda: set(second.cancelled) == {first.taken[0].request_id}, "the second is told to drop it")
    first.go.set()
    text, tokens, finished, _ = await call
    assert text == ANSWER
    assert tokens == cluster.answer
    assert finished.timing.resumed == 0
    await until(lambda: second.running == 0, "the second has dropped it")


async def test_an_agent_with_a_request_that_nobody_waits_for_is_told_so(cluster: Cluster) -> None:
    await cluster.deploy()
    router = await cluster.router()
    agent = await cluster.agent()
    agent.hold_at = 2
    stale = agent_pb2.QueuedRequest(request_id="stale", model="m", relay_address=router.record.address)
    await cluster.queue.put(stale)
    await agent.activate("m")
    await until(lambda: set(agent.cancelled) == {"stale"}, "it is told to drop it")


async def test_an_agent_that_connects_anew_has_given_up_what_it_had(cluster: Cluster) -> None:
    await cluster.deploy()
    first = await cluster.agent("a0")
    first.hold_at = 5
    await first.activate("m")
    router = await cluster.router()
    seen: list[int] = []
    call = asyncio.create_task(gathered(router.generate(), seen))
    await until(lambda: bool(seen), "the client has a token")
    await first.stop_pulling()

    async def hello() -> AsyncIterator[agent_pb2.RelayRequest]:
        yield agent_pb2.RelayRequest(hello=agent_pb2.RelayHello(agent_id="a0"))
        await asyncio.Event().wait()

    async with channel(router.record.address) as connection:
        again = agent_pb2_grpc.TokenRelayServiceStub(connection).Relay(hello())
        second = await cluster.agent("a1")
        await second.activate("m")
        text, _, finished, _ = await call
        assert text == ANSWER
        assert finished.timing.resumed == 1
        again.cancel()


async def test_a_failing_instance_is_tried_elsewhere_and_then_told_to_the_client(cluster: Cluster) -> None:
    await cluster.deploy()
    agent = await cluster.agent()
    agent.error = "logits are NaN"
    await agent.activate("m")
    router = await cluster.router()
    code, message = await status_of(router.generate())
    assert code is grpc.StatusCode.INTERNAL
    assert "failed 3 times" in message
    assert "logits are NaN" in message
    assert [request.attempt for request in agent.taken] == [0, 1, 2]
    await until(cluster.queue_is_empty, "nothing is left in the queue")


async def test_a_sequence_dropped_without_being_asked_for_goes_on(cluster: Cluster) -> None:
    await cluster.deploy()
    agent = await cluster.agent(answer=cluster.answer)
    agent.drops_at = 2
    await agent.activate("m")
    router = await cluster.router()
    text, tokens, *_ = await gathered(router.generate())
    assert len(agent.taken) == 2
    assert text == ANSWER
    assert tokens == cluster.answer


async def test_relay_streams_must_begin_with_hello(cluster: Cluster) -> None:
    router = await cluster.router()

    async def wrong() -> AsyncIterator[agent_pb2.RelayRequest]:
        yield agent_pb2.RelayRequest(step=agent_pb2.RelayStep())

    async with channel(router.record.address) as connection:
        code, message = await status_of(agent_pb2_grpc.TokenRelayServiceStub(connection).Relay(wrong()))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "hello" in message


@pytest.mark.parametrize("data", ["kept", "lost"])
async def test_waiting_requests_outlive_redis(
    etcd: Backing, store: Store, keys: Keys, tokenizer_folder: Path, tmp_path: Path, data: str
) -> None:
    port = free_port()
    server = start_redis(tmp_path / "one", tmp_path / "log", port)
    redis = Redis.from_url(f"redis://{server.address}/0")
    cluster = Cluster(store, keys, redis, etcd.address, f"redis://{server.address}/0", tokenizer_folder)
    try:
        await cluster.deploy("m")
        await cluster.deploy("n")
        running_on = await cluster.agent("a0")
        running_on.hold_at = 6
        await running_on.activate("n")
        router = await cluster.router()
        running = asyncio.create_task(gathered(router.generate("n")))
        await until(lambda: running_on.running == 1, "one runs")
        waiting = [asyncio.create_task(gathered(router.generate("m"))) for _ in range(4)]

        async def queued() -> bool:
            return await cluster.queue.waiting("m") == 4

        await until(queued, "four wait")
        server.child.process.send_signal(signal.SIGKILL)
        server.child.process.wait()
        late = router.generate("m")
        progress = (await anext(aiter(late))).progress
        while progress.state != inference_pb2.PROGRESS_STATE_BLOCKED or "queue" not in progress.reason.text:
            progress = (await anext(aiter(late))).progress
        running_on.go.set()
        text, *_ = await running  # running sequences need no Redis
        assert text == ANSWER

        server = start_redis(tmp_path / ("one" if data == "kept" else "two"), tmp_path / "log", port)
        agent = await cluster.agent("a1")
        await agent.activate("m")
        answers = await asyncio.gather(*waiting, gathered(late))
        assert [text for text, *_ in answers] == [ANSWER] * 5
        assert all(finished.timing.resumed == 0 for _, _, finished, _ in answers)
    finally:
        await cluster.close()
        await redis.aclose()
        server.child.stop(5)


async def two_taken_in_silence(cluster: Cluster) -> tuple[PeerAgent, RunningRouter, list[asyncio.Task[Any]]]:
    """An agent that has taken two requests and said nothing, and the calls that wait for them."""
    await cluster.deploy()
    agent = await cluster.agent()
    agent.report = False
    await agent.activate("m")
    router = await cluster.router()
    calls = [asyncio.create_task(gathered(router.generate())) for _ in range(2)]
    await until(lambda: len(agent.taken) == 2, "they are taken")
    return agent, router, calls


async def test_an_entry_that_vanished_is_put_back_even_if_redis_never_seemed_away(
    cluster: Cluster, redis: Redis
) -> None:
    """As when Redis is restarted without its data between two checks; here the entries alone are deleted."""
    agent, router, calls = await two_taken_in_silence(cluster)
    agent.link(router.record.address)
    await agent.stop_pulling()
    for ticket in await cluster.queue.held("m", ["a0-m"]):
        await cluster.queue.done(ticket)  # the agent drops what it had, as its stream breaks
    await agent.break_streams()
    second = await cluster.agent("a1")
    await second.activate("m")
    assert [text for text, *_ in await asyncio.gather(*calls)] == [ANSWER, ANSWER]


async def test_what_an_agent_dropped_that_cannot_reach_this_router_is_put_back(cluster: Cluster) -> None:
    """It takes the router for lost, and forgets the entries too; nobody tells the router."""
    agent, _, calls = await two_taken_in_silence(cluster)
    for ticket in await cluster.queue.held("m", ["a0-m"]):
        await cluster.queue.done(ticket)
    agent.report = True
    answers = await asyncio.gather(*calls)
    assert [text for text, *_ in answers] == [ANSWER, ANSWER]
    assert [request.attempt for request in agent.taken] == [0, 0, 1, 1]
    assert all(finished.timing.resumed == 0 for _, _, finished, _ in answers)


async def test_a_request_whose_news_is_late_is_not_put_back(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its entry goes when it ends, which may be seen before the news of it comes."""
    await cluster.deploy()
    agent = await cluster.agent()
    agent.report = False
    await agent.activate("m")
    router = await cluster.router()
    call = asyncio.create_task(gathered(router.generate()))
    await until(lambda: len(agent.taken) == 1, "it is taken")
    seen = asyncio.Event()
    missing = RequestQueue.missing

    async def noted(queue: RequestQueue, tickets: Iterable[Ticket]) -> set[Ticket]:
        found = await missing(queue, tickets)
        if found:
            seen.set()
        return found

    monkeypatch.setattr(RequestQueue, "missing", noted)
    for ticket in await cluster.queue.held("m", ["a0-m"]):
        await cluster.queue.done(ticket)
    await seen.wait()
    news = agent_pb2.SequenceUpdate(
        request_id=agent.taken[0].request_id,
        instance_id="a0-m",
        token_ids=cluster.answer,
        finish_reason=inference_pb2.FINISH_REASON_STOP,
    )
    agent.link(router.record.address).send(news)
    text, *_ = await call
    assert text == ANSWER
    assert len(agent.taken) == 1
