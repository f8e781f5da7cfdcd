"""The client for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from types import TracebackType
from typing import Any, Self, Unpack

import grpc

from warmserve import _protocol as protocol
from warmserve._answer import Answer
from warmserve.types import Announcement, Completion, Message, ModelInfo, Options, Progress, TextDelta
from warmserve.v1 import inference_pb2, inference_pb2_grpc


class AsyncCompletionStream:
    """What a request is answered with, as it is made; an async context manager.

    Leaving its block before the end cancels the request.

    Iterating gives Progress while the request waits, then TextDelta.
    """

    def __init__(self, client: AsyncClient, call: protocol.Call) -> None:
        self._client = client
        self._answer = Answer(call)
        self._responses: Any = None
        self._closed = False

    async def __aenter__(self) -> Self:
        self._responses = await self._client._start_generate(self._answer.call)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __aiter__(self) -> AsyncIterator[Progress | TextDelta]:
        if self._responses is None:
            raise RuntimeError("enter the stream first: async with client.stream_generate(...) as stream")
        try:
            async for response in self._responses:
                event = self._answer.take(response)
                if event is not None:
                    yield event
        except grpc.RpcError as error:
            raise self._client._error(error, self._answer) from None
        except asyncio.CancelledError:
            # grpc.aio raises this also where the call, and not the task that awaits it, was cancelled.
            if _being_cancelled() or not (self._closed or self._client.closed):
                raise
            raise protocol.cancelled_error(self.request_id) from None
        self._answer.result()

    async def text_iter(self) -> AsyncIterator[str]:
        """The answer's text in pieces, none empty. Raises ValueError where several answers were asked for."""
        if self._answer.several:
            raise ValueError("several answers come interleaved; iterate over the stream and look at each delta's index")
        async for event in self:
            if isinstance(event, TextDelta) and event.text:
                yield event.text

    async def read(self, on_progress: Callable[[Progress], object] | None = None) -> Completion:
        """Reads to the end and returns the whole answer."""
        async for event in self:
            if on_progress is not None and isinstance(event, Progress):
                on_progress(event)
        return self.completion

    @property
    def completion(self) -> Completion:
        """The whole answer, once iterating has ended. Raises WarmServeError before."""
        return self._answer.result()

    @property
    def text(self) -> str:
        """The first answer's text so far."""
        return self._answer.text

    @property
    def request_id(self) -> str:
        """The id that the router's and the agents' logs carry."""
        return self._answer.call.request_id

    def close(self) -> None:
        """Cancels the request unless it has ended."""
        self._closed = True
        if self._responses is not None:
            self._responses.cancel()


class AsyncClient:
    """Talks to a router from asyncio; an async context manager. The tasks of one event loop may share it.

        async with warmserve.AsyncClient("127.0.0.1:8000") as client:
            print((await client.generate("my-model", "Once upon a time", max_tokens=50)).text)

    All calls raise the errors of warmserve.errors. A connection that is not there is waited for, up to
    `connect_timeout`; a request that was sent is never sent again. Cancelling a task cancels its request.
    """

    def __init__(
        self,
        target: str,
        *,
        timeout: float | None = protocol.DEFAULT_TIMEOUT_S,
        connect_timeout: float = protocol.CONNECT_TIMEOUT_S,
    ) -> None:
        """`target`: host:port of a router's gRPC server. `timeout`: seconds a call may take unless it says otherwise;
        None means no bound. `connect_timeout`: seconds. Nothing is contacted yet; raises ValueError for a URL."""
        protocol.check_target(target)
        self._target = target
        self._timeout = timeout
        self._connect_timeout = connect_timeout
        self._channel: grpc.aio.Channel | None = None
        self.closed = False
        """Whether close was called."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the connection and cancels what is running."""
        self.closed = True
        if self._channel is not None:
            await self._channel.close()

    async def generate(
        self,
        model: str,
        prompt: str | Sequence[int],
        *,
        on_progress: Callable[[Progress], object] | None = None,
        **options: Unpack[Options],
    ) -> Completion:
        """Continues a text, or token ids, and returns the whole answer. `on_progress` hears why the request waits."""
        async with self.stream_generate(model, prompt, **options) as stream:
            return await stream.read(on_progress)

    async def chat(
        self,
        model: str,
        messages: Iterable[Message | Mapping[str, str]],
        *,
        on_progress: Callable[[Progress], object] | None = None,
        **options: Unpack[Options],
    ) -> Completion:
        """Answers a conversation, oldest message first, and returns the whole answer."""
        async with self.stream_chat(model, messages, **options) as stream:
            return await stream.read(on_progress)

    def stream_generate(
        self, model: str, prompt: str | Sequence[int], **options: Unpack[Options]
    ) -> AsyncCompletionStream:
        """Continues a text, or token ids, as a stream: async with client.stream_generate(...) as stream."""
        return AsyncCompletionStream(self, protocol.prompt_call(model, prompt, options, self._timeout))

    def stream_chat(
        self, model: str, messages: Iterable[Message | Mapping[str, str]], **options: Unpack[Options]
    ) -> AsyncCompletionStream:
        """Answers a conversation as a stream."""
        return AsyncCompletionStream(self, protocol.chat_call(model, messages, options, self._timeout))

    async def models(self, *, timeout: float | None = 30.0) -> list[ModelInfo]:
        """The deployed models, in order of name, and how ready each is."""
        request = inference_pb2.ListModelsRequest()
        return protocol.models(await self._call(self._stub().ListModels, request, timeout))

    async def prewarm(
        self,
        model: str,
        load: float,
        *,
        at: datetime | None = None,
        duration: timedelta | float | None = None,
        note: str = "",
        timeout: float | None = 30.0,
    ) -> Announcement:
        """Announces traffic, so that the model is warm when it comes; it is forecast higher for that time.

        `load`: requests in progress to expect. `at`: when it begins, now where it is None, at most a week ahead; a
        datetime without a zone is local time. `duration`: how long it lasts, at most a day, in seconds where it is a
        number; ten minutes where it is None. `note`: what it is for; operators see it. Raises QueueFullError where too
        many announcements of the model are open.
        """
        request = protocol.prewarm_request(model, load, at, duration, note)
        return protocol.announcement(await self._call(self._stub().Prewarm, request, timeout))

    async def _call(self, method: Any, request: Any, timeout: float | None) -> Any:
        """What a call with a single answer is answered with."""
        request_id = protocol.new_request_id()
        call = await self._start(
            lambda: method(request, timeout=timeout, metadata=protocol.metadata_of(request_id), wait_for_ready=True),
            timeout,
            request_id,
        )
        try:
            return await call
        except grpc.RpcError as error:
            status: Any = error
            raise protocol.error_of(status, target=self._target, request_id=request_id, timeout=timeout) from None
        except asyncio.CancelledError:
            if _being_cancelled() or not self.closed:
                raise
            raise protocol.cancelled_error(request_id) from None

    def _stub(self) -> Any:
        if self.closed:
            raise RuntimeError("this client is closed")
        if self._channel is None:  # made here and not before: it belongs to the running event loop
            self._channel = grpc.aio.insecure_channel(self._target, options=protocol.CHANNEL_OPTIONS)
        return inference_pb2_grpc.InferenceServiceStub(self._channel)

    async def _start_generate(self, call: protocol.Call) -> Any:
        stub = self._stub()
        return await self._start(
            lambda: stub.Generate(call.request, timeout=call.timeout, metadata=call.metadata, wait_for_ready=True),
            call.timeout,
            call.request_id,
        )

    async def _start(self, begin: Callable[[], protocol.C], timeout: float | None, request_id: str) -> protocol.C:
        """A call made by `begin`, connected. Raises UnavailableError where no connection comes about in time."""
        channel = self._channel
        assert channel is not None
        call = begin()  # makes the channel connect; nothing leaves before it has
        deadline_first = timeout is not None and timeout < self._connect_timeout
        try:
            async with asyncio.timeout(timeout if deadline_first else self._connect_timeout):
                while (state := channel.get_state(try_to_connect=True)) is not grpc.ChannelConnectivity.READY:
                    await channel.wait_for_state_change(state)
        except TimeoutError:
            if not deadline_first:
                call.cancel()
                raise protocol.connect_error(self._target, self._connect_timeout, request_id) from None
        except asyncio.CancelledError:
            call.cancel()
            raise
        return call  # its own status says what became of it

    def _error(self, error: Any, answer: Answer) -> Exception:
        call = answer.call
        return protocol.error_of(
            error, target=self._target, request_id=call.request_id, timeout=call.timeout, progress=answer.progress
        )


def _being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
