"""Both clients against a small router over a real socket: the same behaviour, so mostly the same tests."""

from __future__ import annotations

import asyncio
import gc
import inspect
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest

import warmserve
from services.common.grpc_frame import GrpcServer, StatusError
from services.common.settings import ServiceSettings
from tests.sdk.inference_server import PIECES, InferenceServer, unused_address
from warmserve import AsyncClient, Client, Completion, Progress, TextDelta
from warmserve.v1 import common_pb2, inference_pb2, inference_pb2_grpc

TEXT = "".join(PIECES)
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]

Call = Callable[..., Any]


@pytest.fixture
def server() -> Iterator[InferenceServer]:
    server = InferenceServer()
    yield server
    server.stop()


def _sync(target: str, method: str, *args: Any, client: dict[str, Any], **options: Any) -> Any:
    with Client(target, **client) as opened:
        return getattr(opened, method)(*args, **options)


def _async(target: str, method: str, *args: Any, client: dict[str, Any], **options: Any) -> Any:
    async def main() -> Any:
        async with AsyncClient(target, **client) as opened:
            return await getattr(opened, method)(*args, **options)

    return asyncio.run(main())


@pytest.fixture(params=[_sync, _async], ids=["Client", "AsyncClient"])
def call(request: pytest.FixtureRequest) -> Call:
    """call(target, method, *args, client={...}, **options) in a client of either kind."""

    def run(target: str, method: str, *args: Any, client: dict[str, Any] | None = None, **options: Any) -> Any:
        return request.param(target, method, *args, client=client or {}, **options)

    return run


def test_generate_gives_the_whole_answer(server: InferenceServer, call: Call) -> None:
    completion = call(server.address, "generate", "llama-a", "Hi", max_tokens=5, temperature=0, stop="\n")
    assert isinstance(completion, Completion)
    assert completion.text == TEXT
    assert completion.token_ids == (100, 101, 102, 103, 104)
    assert completion.finish_reason == "length"
    assert (completion.usage.prompt_tokens, completion.usage.total_tokens) == (3, 8)
    assert (completion.timing.found_state, completion.timing.ttft_ms) == ("warm", 15)
    [request] = server.requests
    assert (request.model, request.prompt, list(request.sampling.stop)) == ("llama-a", "Hi", ["\n"])
    assert request.sampling.HasField("temperature")
    assert request.sampling.temperature == 0
    assert not request.sampling.HasField("top_p")


def test_chat_sends_the_conversation_and_every_option(server: InferenceServer, call: Call) -> None:
    call(
        server.address,
        "chat",
        "llama-a",
        MESSAGES,
        top_p=0.5,
        top_k=3,
        seed=2**63,
        ignore_eos=True,
        priority="low",
        request_id="mine",
        timeout=20,
    )
    [request] = server.requests
    assert [(message.role, message.content) for message in request.conversation.messages] == [
        ("system", "Be brief."),
        ("user", "Hello"),
    ]
    sampling = request.sampling
    assert (sampling.top_p, sampling.top_k, sampling.seed, sampling.ignore_eos) == (0.5, 3, 2**63, True)
    assert request.priority == common_pb2.PRIORITY_LOW
    assert request.request_id == "mine"
    assert server.metadata[0]["x-request-id"] == "mine"
    assert 10 < (server.remaining_s[0] or 0) < 25  # grpc sends timeouts rounded


def test_all_sampling_options_are_sent(server: InferenceServer, call: Call) -> None:
    call(
        server.address,
        "generate",
        "llama-a",
        "Hi",
        min_p=0.1,
        repetition_penalty=1.5,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias={5: -100, 7: 2.5},
        logprobs=0,
        stop_token_ids=(3, 4),
        min_tokens=2,
        n=2,
    )
    [request] = server.requests
    assert request.n == 2
    assert request.sampling == inference_pb2.SamplingParams(
        min_p=0.1,
        repetition_penalty=1.5,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias={5: -100, 7: 2.5},
        logprobs=0,
        stop_token_ids=[3, 4],
        min_tokens=2,
    )


@pytest.mark.parametrize(
    ("options", "grammar"),
    [
        ({"json_schema": {"type": "object"}}, {"json_schema": '{"type": "object"}'}),
        ({"json_schema": '{"type":"array"}'}, {"json_schema": '{"type":"array"}'}),
        ({"json_object": True, "regex": None}, {"json_object": True}),
        ({"regex": "a+", "json_object": False}, {"regex": "a+"}),
        ({"ebnf": 'root ::= "a"'}, {"ebnf": 'root ::= "a"'}),
        ({"choice": ["yes", "no"]}, {"choice": inference_pb2.Choices(texts=["yes", "no"])}),
        ({"json_object": False}, None),
    ],
)
def test_constraints_are_sent(
    server: InferenceServer, call: Call, options: dict[str, Any], grammar: dict[str, Any] | None
) -> None:
    call(server.address, "generate", "llama-a", "Hi", **options)
    sampling = server.requests[0].sampling
    assert sampling.HasField("grammar") == (grammar is not None)
    assert sampling.grammar == inference_pb2.Grammar(**(grammar or {}))


def test_several_answers_are_put_together(server: InferenceServer, call: Call) -> None:
    completion = call(server.address, "generate", "llama-a", "Hi", n=3)
    assert [(choice.index, choice.text) for choice in completion.choices] == [
        (0, TEXT),
        (1, TEXT.upper()),
        (2, TEXT.upper()),
    ]
    assert [choice.finish_reason for choice in completion.choices] == ["length", "stop", "stop"]
    assert completion.text == TEXT
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (3, 15)
    with pytest.raises(warmserve.WarmServeError, match="before the answer was complete"):
        call(server.address, "generate", "fewer", "Hi", n=2)


def test_logprobs_are_given_with_tokens_bytes(server: InferenceServer, call: Call) -> None:
    completion = call(server.address, "generate", "llama-a", "Hi", logprobs=2)
    assert [item.token_id for item in completion.logprobs] == list(completion.token_ids)
    assert b"".join(item.token for item in completion.logprobs).decode() == TEXT
    top = (warmserve.TopLogprob(100, -0.5, b"\xe6"), warmserve.TopLogprob(101, -1.5, b"\xe6"))
    assert completion.logprobs[0] == warmserve.TokenLogprob(100, -0.5, b"Once ", top)
    assert call(server.address, "generate", "llama-a", "Hi").logprobs == ()


def test_a_stream_of_several_answers_names_each_deltas_answer(server: InferenceServer) -> None:
    with Client(server.address) as client, client.stream_generate("llama-a", "Hi", n=2) as stream:
        with pytest.raises(ValueError, match="interleaved"):
            next(stream.text_iter())
        deltas = [event for event in stream if isinstance(event, TextDelta)]
        assert [delta.index for delta in deltas] == [0, 1] * len(PIECES)
        assert "".join(delta.text for delta in deltas if delta.index == 1) == TEXT.upper()
        assert stream.text == TEXT


async def test_an_async_stream_of_several_answers_has_no_single_text(server: InferenceServer) -> None:
    async with AsyncClient(server.address) as client, client.stream_generate("llama-a", "Hi", n=2) as stream:
        with pytest.raises(ValueError, match="interleaved"):
            await anext(stream.text_iter())
        assert len((await stream.read()).choices) == 2


def test_token_ids_are_a_prompt(server: InferenceServer, call: Call) -> None:
    call(server.address, "generate", "llama-a", [1, 2, 3])
    assert list(server.requests[0].token_ids.ids) == [1, 2, 3]


def test_on_progress_hears_why_a_request_waits(server: InferenceServer, call: Call) -> None:
    heard: list[Progress] = []
    call(server.address, "generate", "llama-a", "Hi", on_progress=heard.append)
    assert heard == [Progress("waking", "waiting_requests", "1 request waits", 250.0, 1)]


def test_prewarm_announces_traffic(server: InferenceServer, call: Call) -> None:
    at = datetime(2030, 1, 1, 14, 0, 0, 500_000, UTC)
    announced = call(server.address, "prewarm", "llama-a", load=20, at=at, duration=timedelta(hours=1), note="launch")
    assert (announced.id, announced.model.name, announced.model.state) == ("a1", "llama-a", "warm")
    call(server.address, "prewarm", "llama-a", 0.5, duration=0.25)
    call(server.address, "prewarm", "llama-a", 1, at=datetime(2030, 1, 1, 14))
    assert server.announced == [
        inference_pb2.PrewarmRequest(model="llama-a", load=20, start_unix_s=1893506400, duration_s=3600, note="launch"),
        inference_pb2.PrewarmRequest(model="llama-a", load=0.5, duration_s=1),
        inference_pb2.PrewarmRequest(
            model="llama-a", load=1, start_unix_s=int(datetime(2030, 1, 1, 14).astimezone().timestamp())
        ),
    ]


@pytest.mark.parametrize(
    "options",
    [
        {"load": "many"},
        {"at": "14:00"},
        {"at": datetime(1960, 1, 1, tzinfo=UTC)},
        {"duration": 0},
        {"duration": "1h"},
        {"duration": float("nan")},
        {"note": 5},
        {"duration": timedelta(seconds=-1)},
    ],
)
def test_prewarm_refuses_what_the_wire_cannot_carry(
    server: InferenceServer, call: Call, options: dict[str, Any]
) -> None:
    with pytest.raises(warmserve.InvalidRequestError, match=next(iter(options))):
        call(server.address, "prewarm", "llama-a", **{"load": 1, **options})
    assert server.announced == []


def test_prewarms_errors_are_those_of_every_call(server: InferenceServer, call: Call) -> None:
    with pytest.raises(warmserve.ModelNotFoundError) as missing:
        call(server.address, "prewarm", "unknown", 1)
    assert missing.value.suggestions == ("llama-a", "llama-b")
    with pytest.raises(warmserve.QueueFullError) as full:
        call(server.address, "prewarm", "full", 1)
    assert full.value.retry_after_s == 1.5
    with pytest.raises(warmserve.UnavailableError, match="is a router listening"):
        call(unused_address(), "prewarm", "llama-a", 1, client={"connect_timeout": 0.2})


def test_models(server: InferenceServer, call: Call) -> None:
    [model] = call(server.address, "models")
    assert (model.name, model.state, model.context_tokens) == ("llama-a", "cold", 2048)
    assert model.deployed_at.isoformat() == "2023-11-14T22:13:20+00:00"


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        ("unknown", warmserve.ModelNotFoundError),
        ("invalid", warmserve.InvalidRequestError),
        ("full", warmserve.QueueFullError),
        ("stopping", warmserve.UnavailableError),
        ("late", warmserve.DeadlineExceededError),
        ("broken", warmserve.WarmServeError),
        ("breaks", warmserve.UnavailableError),
        ("gap", warmserve.WarmServeError),
        ("unfinished", warmserve.WarmServeError),
        ("surplus", warmserve.WarmServeError),
    ],
)
def test_failures_are_typed_and_name_the_request(
    server: InferenceServer, call: Call, model: str, kind: type[Exception]
) -> None:
    with pytest.raises(warmserve.WarmServeError) as caught:
        call(server.address, "generate", model, "Hi")
    assert type(caught.value) is kind
    assert caught.value.request_id == server.requests[0].request_id != ""
    assert caught.value.__cause__ is None
    if isinstance(caught.value, warmserve.ModelNotFoundError):
        assert caught.value.suggestions == ("llama-a", "llama-b")
    if isinstance(caught.value, warmserve.QueueFullError):
        assert caught.value.retry_after_s == 1.5


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_tokens": -1}, "max_tokens must be an integer of at least 1, not -1"),
        ({"max_tokens": 2**32}, "max_tokens must be"),
        ({"max_tokens": "many"}, "max_tokens must be"),
        ({"temperature": "hot"}, "temperature must be a number"),
        ({"seed": -1}, "seed must be"),
        ({"stop": [1]}, "stop must be"),
        ({"n": 0}, "n must be an integer from 1 to 16"),
        ({"n": "two"}, "n must be an integer from 1 to 16"),
        ({"min_p": "x"}, "min_p must be a number from 0 to 1"),
        ({"logprobs": -1}, "logprobs must be an integer from 0 to 20"),
        ({"logprobs": True, "frequency_penalty": "x"}, "frequency_penalty must be a number from -2 to 2"),
        ({"stop_token_ids": [-1]}, "stop_token_ids must be a sequence of token ids"),
        ({"logit_bias": {"x": 1}}, "logit_bias must be a mapping from token ids to numbers"),
        ({"logit_bias": [5]}, "logit_bias must be a mapping from token ids to numbers"),
        ({"regex": "a", "choice": ["b"]}, "regex and choice were given; give one of them"),
        ({"regex": 5}, "regex must be a text"),
        ({"choice": "yes"}, "choice must be a sequence of texts"),
        ({"json_schema": {"x": b""}}, "json_schema must be JSON"),
        ({"priority": "urgent"}, "priority must be high, normal or low"),
        ({"timeout": 0}, "timeout must be"),
        ({"request_id": "two\nlines"}, "request_id must be"),
        ({"prompt": 5}, "prompt must be"),
        ({"prompt": [1, -1]}, "prompt must be"),
        ({"prompt": "x" * (17 << 20)}, "shorten the prompt"),
    ],
)
def test_what_the_wire_cannot_carry_is_refused_before_sending(
    server: InferenceServer, call: Call, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(warmserve.InvalidRequestError, match=says):
        call(server.address, "generate", "llama-a", **{"prompt": "Hi", **options})
    assert server.requests == []


@pytest.mark.parametrize("message", [{"role": "user"}, {"role": "user", "content": 1}, "Hello"])
def test_malformed_messages_are_refused_by_their_place(call: Call, message: Any) -> None:
    with pytest.raises(warmserve.InvalidRequestError, match=r"messages\[1\]"):
        call(unused_address(), "chat", "llama-a", [*MESSAGES[:1], message])


def test_a_misspelt_option_is_named(call: Call) -> None:
    with pytest.raises(TypeError, match="did you mean max_tokens"):
        call(unused_address(), "generate", "llama-a", "Hi", max_token=5)


def test_the_deadline_ends_the_request_here_and_there(server: InferenceServer, call: Call) -> None:
    with pytest.raises(warmserve.DeadlineExceededError, match=r"within 0\.3 s.*waking: 1 request waits"):
        call(server.address, "generate", "never", "Hi", timeout=0.3)
    assert server.cancelled.wait(10)


def test_nobody_listens(call: Call) -> None:
    target = unused_address()
    for method, args in (("generate", ("llama-a", "Hi")), ("models", ())):
        with pytest.raises(warmserve.UnavailableError, match=f"no connection to {target} within 0.2 s"):
            call(target, method, *args, client={"connect_timeout": 0.2})
    with pytest.raises(warmserve.DeadlineExceededError):
        call(target, "generate", "llama-a", "Hi", timeout=0.2)


def test_a_url_is_no_target(call: Call) -> None:
    with pytest.raises(ValueError, match="host:port"):
        call("http://127.0.0.1:1", "models")


def test_a_router_that_is_lost_amid_an_answer(server: InferenceServer) -> None:
    with Client(server.address) as client, client.stream_generate("stuck", "Hi") as stream:
        events = iter(stream)
        assert isinstance(next(events), Progress)
        assert isinstance(next(events), TextDelta)
        server.stop()
        with pytest.raises(warmserve.UnavailableError, match=server.address):
            list(events)


def test_a_call_waits_for_a_router_that_comes_up(call: Call) -> None:
    port = int(unused_address().rpartition(":")[2])
    started: list[InferenceServer] = []
    timer = threading.Timer(0.3, lambda: started.append(InferenceServer(port)))
    timer.start()
    try:
        assert call(f"127.0.0.1:{port}", "generate", "llama-a", "Hi", client={"connect_timeout": 30}).text == TEXT
    finally:
        timer.join()
        started[0].stop()


async def test_clients_reconnect_to_a_restarted_router_and_send_once() -> None:
    first = InferenceServer()
    port = int(first.address.rpartition(":")[2])
    with Client(first.address) as client:
        async with AsyncClient(first.address) as aclient:
            assert client.generate("llama-a", "Hi").text == (await aclient.generate("llama-a", "Hi")).text == TEXT
            await asyncio.to_thread(first.stop)
            second = InferenceServer(port)
            assert (await asyncio.to_thread(client.generate, "llama-a", "Hi")).text == TEXT
            assert (await aclient.generate("llama-a", "Hi")).text == TEXT
            assert len(first.requests) == len(second.requests) == 2
    second.stop()


def test_streams_give_typed_events_then_the_completion(server: InferenceServer) -> None:
    with Client(server.address) as client:
        with client.stream_chat("llama-a", MESSAGES) as stream:
            events = list(stream)
            assert stream.completion.text == stream.text == TEXT
        assert isinstance(events[0], Progress)
        assert events[1:] == [TextDelta(text, (100 + i,), i) for i, text in enumerate(PIECES)]
        with client.stream_generate("llama-a", "Hi") as stream:
            with pytest.raises(warmserve.WarmServeError, match="before the answer was complete"):
                _ = stream.completion
            assert list(stream.text_iter()) == [piece for piece in PIECES if piece]


async def test_async_streams_give_typed_events_then_the_completion(server: InferenceServer) -> None:
    async with AsyncClient(server.address) as client:
        async with client.stream_chat("llama-a", MESSAGES) as stream:
            events = [event async for event in stream]
            assert stream.completion.text == stream.text == TEXT
        assert isinstance(events[0], Progress)
        assert events[1:] == [TextDelta(text, (100 + i,), i) for i, text in enumerate(PIECES)]
        async with client.stream_generate("llama-a", "Hi") as stream:
            assert [text async for text in stream.text_iter()] == [piece for piece in PIECES if piece]


def test_leaving_the_block_cancels_the_request(server: InferenceServer) -> None:
    with Client(server.address) as client:
        with client.stream_generate("stuck", "Hi") as stream:
            for event in stream:
                if isinstance(event, TextDelta):
                    break
        assert server.cancelled.wait(10)
        with pytest.raises(warmserve.RequestCancelledError) as caught:
            list(stream)
        assert caught.value.request_id == stream.request_id


def test_another_thread_may_close_a_stream(server: InferenceServer) -> None:
    with Client(server.address) as client, client.stream_generate("never", "Hi") as stream:
        events = iter(stream)
        assert isinstance(next(events), Progress)
        threading.Thread(target=stream.close).start()
        with pytest.raises(warmserve.RequestCancelledError):
            next(events)
    assert server.cancelled.wait(10)


def test_closing_the_client_cancels_what_runs(server: InferenceServer) -> None:
    client = Client(server.address)
    with client.stream_generate("never", "Hi") as stream:
        events = iter(stream)
        assert isinstance(next(events), Progress)
        client.close()
        with pytest.raises(warmserve.RequestCancelledError):
            next(events)
    with pytest.raises(RuntimeError, match="closed"):
        client.generate("llama-a", "Hi")


async def test_leaving_the_async_block_cancels_the_request(server: InferenceServer) -> None:
    async with AsyncClient(server.address) as client:
        async with client.stream_generate("stuck", "Hi") as stream:
            async for event in stream:
                if isinstance(event, TextDelta):
                    break
        assert await asyncio.to_thread(server.cancelled.wait, 10)


async def test_closing_an_async_stream_cancels_the_request_alone(server: InferenceServer) -> None:
    async with AsyncClient(server.address) as client, client.stream_generate("never", "Hi") as stream:
        task = asyncio.create_task(stream.read(lambda _: stream.close()))
        with pytest.raises(warmserve.RequestCancelledError):
            await task
        assert await asyncio.to_thread(server.cancelled.wait, 10)
        assert (await client.generate("llama-a", "Hi")).text == TEXT


async def test_cancelling_a_task_cancels_its_request(server: InferenceServer) -> None:
    async with AsyncClient(server.address) as client:
        waiting = asyncio.Event()
        task = asyncio.create_task(client.generate("never", "Hi", on_progress=lambda _: waiting.set()))
        await waiting.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(server.cancelled.wait, 10)


async def test_closing_the_async_client_cancels_what_runs(server: InferenceServer) -> None:
    client = AsyncClient(server.address)
    waiting = asyncio.Event()
    task = asyncio.create_task(client.generate("never", "Hi", on_progress=lambda _: waiting.set()))
    await waiting.wait()
    await client.close()
    with pytest.raises(warmserve.RequestCancelledError):
        await task
    with pytest.raises(RuntimeError, match="closed"):
        await client.generate("llama-a", "Hi")


def test_an_async_client_may_be_made_before_the_loop(server: InferenceServer) -> None:
    client = AsyncClient(server.address)

    async def main() -> str:
        async with client:
            return (await client.generate("llama-a", "Hi")).text

    assert asyncio.run(main()) == TEXT


def test_an_async_client_leaves_no_connection_when_the_wait_for_it_is_cancelled() -> None:
    async def main() -> None:
        async with AsyncClient(unused_address(), connect_timeout=60) as client:
            async with asyncio.timeout(0.2):
                await client.generate("llama-a", "Hi")

    with pytest.raises(TimeoutError):
        asyncio.run(main())


def test_a_forgotten_client_closes_itself(server: InferenceServer) -> None:
    client = Client(server.address)
    stream = client.stream_generate("never", "Hi")
    stream.__enter__()
    next(iter(stream))
    del client, stream
    gc.collect()
    assert server.cancelled.wait(10)


def test_both_clients_offer_the_same() -> None:
    def public(kind: type) -> dict[str, list[str]]:
        return {
            name: list(inspect.signature(value).parameters)
            for name, value in inspect.getmembers(kind, inspect.isfunction)
            if not name.startswith("_")
        }

    assert public(Client) == public(AsyncClient)
    assert public(warmserve.CompletionStream) == public(warmserve.AsyncCompletionStream)


async def test_what_a_service_of_ours_sends_with_an_error_reaches_the_client() -> None:
    class Refusing(inference_pb2_grpc.InferenceServiceServicer):
        async def Generate(self, request: Any, context: Any) -> None:
            if request.model == "llama":
                near = [("warmserve-suggestion", "llama-a"), ("warmserve-suggestion", "llama-b")]
                raise StatusError(grpc.StatusCode.NOT_FOUND, "no such model", near)
            raise StatusError(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", [("warmserve-retry-after-ms", "2000")])

    server = GrpcServer(ServiceSettings())
    service = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"]
    server.add(inference_pb2_grpc.add_InferenceServiceServicer_to_server, Refusing(), service)
    async with AsyncClient(await server.start()) as client:
        with pytest.raises(warmserve.ModelNotFoundError, match="no such model") as unknown:
            await client.generate("llama", "Hi")
        with pytest.raises(warmserve.QueueFullError) as full:
            await client.generate("other", "Hi")
    await server.stop(0)
    assert unknown.value.suggestions == ("llama-a", "llama-b")
    assert full.value.retry_after_s == 2


def test_importing_the_client_needs_only_grpcio_and_protobuf() -> None:
    allowed = {"warmserve", "grpc", "google", "typing_extensions"}
    script = f"""
import sys
from importlib.abc import MetaPathFinder
class Guard(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        top = name.partition('.')[0]
        if top not in {allowed!r} and top not in sys.stdlib_module_names:
            raise ImportError(f'{{name}} is not among what the client may import')
sys.meta_path.insert(0, Guard())
import warmserve
warmserve.Client('127.0.0.1:1').close()
try:
    import aetcd
except ImportError as error:
    print(error)
"""
    root = Path(warmserve.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout == "aetcd is not among what the client may import\n"
