"""Requests that wait: for a model to be woken, for a place, until their deadline, or until nobody wants them."""

from __future__ import annotations

import asyncio

import grpc
import httpx
import openai
import pytest

from tests.router.conftest import ANSWER, Cluster, error_of, gathered, status_of
from tests.router.peers import until
from warmserve.v1 import common_pb2, inference_pb2

MESSAGES = [{"role": "user", "content": "hello"}]


async def first_progress(call) -> inference_pb2.Progress:
    return (await anext(aiter(call))).progress


async def test_twenty_waiters_wake_a_model_once_and_are_all_served(cluster: Cluster) -> None:
    await cluster.deploy()
    placer = await cluster.placer()
    placer.agent = await cluster.agent()
    placer.gate.clear()
    router = await cluster.router()
    calls = [asyncio.create_task(gathered(router.generate())) for _ in range(20)]

    async def queued() -> bool:
        return await cluster.queue.waiting("m") == 20

    await until(queued, "all wait")
    placer.gate.set()
    answers = await asyncio.gather(*calls)
    assert all(text == ANSWER for text, *_ in answers)
    assert len(placer.calls) == 1
    assert placer.calls[0].model == "m"
    for _, _, finished, progress in answers:
        assert finished.timing.found_state == common_pb2.REPLICA_STATE_COLD
        assert progress[0].state == inference_pb2.PROGRESS_STATE_WAKING
    told = [item for _, _, _, progress in answers for item in progress if item.HasField("estimated_wait_ms")]
    assert told
    assert all(0 < item.estimated_wait_ms <= 40_000 for item in told)
    assert {item.reason.text for item in told} == {"requests wait"}


async def test_a_burst_is_queued_without_a_fault(cluster: Cluster) -> None:
    await cluster.deploy()
    agent = await cluster.agent(answer=cluster.answer[:2])
    await agent.activate("m")
    router = await cluster.router()
    answers = await asyncio.gather(*(gathered(router.generate()) for _ in range(300)))
    assert all(tokens == cluster.answer[:2] for _, tokens, *_ in answers)
    assert {request.attempt for request in agent.taken} == {0}
    states = {item.state for _, _, _, progress in answers for item in progress}
    assert inference_pb2.PROGRESS_STATE_BLOCKED not in states
    await until(cluster.queue_is_empty, "nothing is left in the queue")


async def test_a_blocked_wake_is_told_with_its_reason_and_tried_again(cluster: Cluster) -> None:
    await cluster.deploy()
    placer = await cluster.placer()
    router = await cluster.router(wake_retry_s=0.05)
    call = router.generate()
    progress = await first_progress(call)
    while progress.state != inference_pb2.PROGRESS_STATE_BLOCKED:
        progress = await first_progress(call)
    assert progress.reason.cause == common_pb2.CAUSE_NO_CAPACITY
    assert progress.reason.text == "all pages hold active models"
    assert progress.requests_in_progress == 1
    await until(lambda: len(placer.calls) >= 3, "the placer is asked again")
    placer.agent = await cluster.agent()
    text, *_ = await gathered(call)
    assert text == ANSWER


async def test_without_a_placer_requests_wait_until_one_leads(cluster: Cluster) -> None:
    await cluster.deploy()
    router = await cluster.router()
    call = router.generate()
    progress = await first_progress(call)
    while progress.state != inference_pb2.PROGRESS_STATE_BLOCKED:
        progress = await first_progress(call)
    assert progress.reason.cause == common_pb2.CAUSE_NO_PLACER
    agent = await cluster.agent()
    placer = await cluster.placer()  # its election is seen; the next periodic try would be far away
    placer.agent = agent
    await until(lambda: placer.calls != [], "the new placer is asked")
    await agent.activate("m")
    text, *_ = await gathered(call)
    assert text == ANSWER


async def test_nothing_is_woken_while_an_instance_is_active(cluster: Cluster) -> None:
    await cluster.deploy()
    placer = await cluster.placer()
    agent = await cluster.agent()
    await agent.activate("m")
    router = await cluster.router()
    await gathered(router.generate())
    assert placer.calls == []


async def test_waiting_streams_tell_people_why(cluster: Cluster) -> None:
    await cluster.deploy()
    placer = await cluster.placer()
    router = await cluster.router()
    body = {"model": "m", "messages": MESSAGES, "stream": True}
    url = f"{router.record.http_url}/v1/chat/completions"
    async with httpx.AsyncClient() as http, http.stream("POST", url, json=body) as answer:
        assert answer.status_code == 200
        async for line in answer.aiter_lines():
            if line.startswith(": blocked: all pages hold active models"):
                break
        else:
            pytest.fail("the reason did not come")
    assert placer.calls


@pytest.mark.parametrize("door", ["grpc", "http", "http stream"])
async def test_a_client_that_leaves_takes_its_waiting_request_along(cluster: Cluster, door: str) -> None:
    await cluster.deploy()
    router = await cluster.router(max_requests=1)

    async def ask() -> None:
        if door == "grpc":
            await gathered(router.generate())
        else:
            stream = await router.openai.chat.completions.create(
                model="m", messages=MESSAGES, stream=door == "http stream"
            )
            async for _ in stream:
                pass

    asking = asyncio.create_task(ask())

    async def queued() -> bool:
        return await cluster.queue.waiting("m") == 1

    await until(queued, "it waits")
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await until(cluster.queue_is_empty, "its queue entry is gone")
    agent = await cluster.agent()
    await agent.activate("m")

    async def free() -> bool:
        try:
            await gathered(router.generate())
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                return False
            raise
        return True

    await until(free, "its place is free again")


@pytest.mark.parametrize("door", ["grpc", "http", "http stream"])
async def test_a_client_that_leaves_stops_its_sequence(cluster: Cluster, door: str) -> None:
    await cluster.deploy()
    agent = await cluster.agent()
    agent.hold_at = 5
    await agent.activate("m")
    router = await cluster.router()

    async def ask() -> None:
        if door == "grpc":
            await gathered(router.generate())
        else:
            stream = await router.openai.completions.create(
                model="m", prompt="x", max_tokens=100, stream=door == "http stream"
            )
            async for _ in stream:
                pass

    asking = asyncio.create_task(ask())
    await until(lambda: agent.running == 1, "it runs")
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await until(lambda: set(agent.cancelled) == {agent.taken[0].request_id}, "the agent is told")
    await until(lambda: agent.running == 0, "the sequence has ended")
    await until(cluster.queue_is_empty, "its queue entry is gone")


async def test_the_deadline_ends_a_waiting_request_at_both_doors(cluster: Cluster) -> None:
    await cluster.deploy()
    router = await cluster.router(request_timeout_s=0.3)
    code, message = await status_of(router.generate())  # the router's own, as the client gives none
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert "before the first token" in message
    code, _ = await status_of(router.generate(timeout=0.2))
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    with pytest.raises(openai.InternalServerError) as caught:
        await router.openai.completions.create(
            model="m", prompt="x", extra_headers={"X-Request-Timeout": "0.1"}, timeout=20
        )
    assert caught.value.status_code == 504
    assert caught.value.code == "deadline_exceeded"
    stream = await router.openai.completions.create(model="m", prompt="x", stream=True)
    with pytest.raises(openai.APIError, match="deadline"):
        async for _ in stream:
            pass
    await until(cluster.queue_is_empty, "nothing is left in the queue")


async def test_the_deadline_ends_a_running_request(cluster: Cluster) -> None:
    await cluster.deploy()
    agent = await cluster.agent()
    agent.hold_at = 4
    await agent.activate("m")
    router = await cluster.router(request_timeout_s=1.0)
    code, message = await status_of(router.generate())
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert "after 4 tokens" in message
    assert agent.taken[0].deadline_unix_ms == agent.taken[0].arrived_unix_ms + 1000
    await until(lambda: agent.running == 0, "the sequence has ended")


async def test_a_full_router_refuses_with_retry_after(cluster: Cluster) -> None:
    await cluster.deploy("m")
    await cluster.deploy("n")
    await cluster.deploy("o")
    router = await cluster.router(max_requests_per_model=1, max_requests=2)
    await first_progress(first := router.generate("m"))
    error = await error_of(router.generate("m"))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "1 requests of model 'm'" in (error.details() or "")
    assert ("warmserve-retry-after-ms", "1000") in [tuple(item) for item in error.trailing_metadata()]
    with pytest.raises(openai.RateLimitError) as caught:
        await router.openai.completions.create(model="m", prompt="x")
    assert int(caught.value.response.headers["retry-after"]) >= 1
    assert caught.value.code == "queue_full"
    await first_progress(second := router.generate("n"))
    _, message = await status_of(router.generate("o"))
    assert "2 requests are in progress" in message
    first.cancel()
    second.cancel()


async def test_undeploying_a_model_fails_who_waits_and_spares_who_runs(cluster: Cluster) -> None:
    await cluster.deploy("m")
    await cluster.deploy("n")
    agent = await cluster.agent()
    agent.hold_at = 3
    await agent.activate("n")
    router = await cluster.router()
    running = asyncio.create_task(gathered(router.generate("n")))
    await until(lambda: agent.running == 1, "it runs")
    waiting = router.generate("m")
    await first_progress(waiting)
    await cluster.undeploy("m")
    await cluster.undeploy("n")
    code, message = await status_of(waiting)
    assert code is grpc.StatusCode.NOT_FOUND
    assert "undeployed" in message
    agent.go.set()
    text, *_ = await running
    assert text == ANSWER
    await until(cluster.queue_is_empty, "the waiting request's entry is gone")
    code, _ = await status_of(router.generate("n"))
    assert code is grpc.StatusCode.NOT_FOUND
