"""The client for programs with threads, or with none."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from types import TracebackType
from typing import Any, Self, Unpack

import grpc

from warmserve import _protocol as protocol
from warmserve._answer import Answer
from warmserve.types import Announcement, Completion, Message, ModelInfo, Options, Progress, TextDelta
from warmserve.v1 import inference_pb2, inference_pb2_grpc


class CompletionStream:
    """What a request is answered with, as it is made; a context manager.

    Leaving its block before the end cancels the request.

    Iterating gives Progress while the request waits, then TextDelta.
    """

    def __init__(self, client: Client, call: protocol.Call) -> None:
        self._client = client
        self._answer = Answer(call)
        self._responses: Any = None
        self._closed = False

    def __enter__(self) -> Self:
        self._responses = self._client._start_generate(self._answer.call)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[Progress | TextDelta]:
        if self._responses is None:
            raise RuntimeError("enter the stream first: with client.stream_generate(...) as stream")
        try:
            for response in self._responses:
                event = self._answer.take(response)
                if event is not None:
                    yield event
        except grpc.RpcError as error:
            if self._closed:
                raise protocol.cancelled_error(self.request_id) from None
            raise self._client._error(error, self._answer) from None
        self._answer.result()

    def text_iter(self) -> Iterator[str]:
        """The answer's text in pieces, none empty. Raises ValueError where several answers were asked for."""
        if self._answer.several:
            raise ValueError("several answers come interleaved; iterate over the stream and look at each delta's index")
        for event in self:
            if isinstance(event, TextDelta) and event.text:
                yield event.text

    def read(self, on_progress: Callable[[Progress], object] | None = None) -> Completion:
        """Reads to the end and returns the whole answer."""
        for event in self:
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
        """Cancels the request unless it has ended. May be called from another thread."""
        self._closed = True
        if self._responses is not None:
            self._responses.cancel()


class Client:
    """Talks to a router; a context manager. Threads may share it.

        with warmserve.Client("127.0.0.1:8000") as client:
            print(client.generate("my-model", "Once upon a time", max_tokens=50).text)

    All calls raise the errors of warmserve.errors. A connection that is not there is waited for, up to
    `connect_timeout`; a request that was sent is never sent again.
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
        self._channel = grpc.insecure_channel(target, options=protocol.CHANNEL_OPTIONS)
        self._stub = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._connection = _Connection(self._channel, target, connect_timeout)
        # Also where nobody closes the client: a channel's threads outlive it otherwise.
        self._close = weakref.finalize(self, _close, self._connection, self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection and cancels what is running."""
        self._close()

    def generate(
        self,
        model: str,
        prompt: str | Sequence[int],
        *,
        on_progress: Callable[[Progress], object] | None = None,
        **options: Unpack[Options],
    ) -> Completion:
        """Continues a text, or token ids, and returns the whole answer. `on_progress` hears why the request waits."""
        with self.stream_generate(model, prompt, **options) as stream:
            return stream.read(on_progress)

    def chat(
        self,
        model: str,
        messages: Iterable[Message | Mapping[str, str]],
        *,
        on_progress: Callable[[Progress], object] | None = None,
        **options: Unpack[Options],
    ) -> Completion:
        """Answers a conversation, oldest message first, and returns the whole answer."""
        with self.stream_chat(model, messages, **options) as stream:
            return stream.read(on_progress)

    def stream_generate(self, model: str, prompt: str | Sequence[int], **options: Unpack[Options]) -> CompletionStream:
        """Continues a text, or token ids, as a stream: with client.stream_generate(...) as stream."""
        return CompletionStream(self, protocol.prompt_call(model, prompt, options, self._timeout))

    def stream_chat(
        self, model: str, messages: Iterable[Message | Mapping[str, str]], **options: Unpack[Options]
    ) -> CompletionStream:
        """Answers a conversation as a stream."""
        return CompletionStream(self, protocol.chat_call(model, messages, options, self._timeout))

    def models(self, *, timeout: float | None = 30.0) -> list[ModelInfo]:
        """The deployed models, in order of name, and how ready each is."""
        return protocol.models(self._call(self._stub.ListModels, inference_pb2.ListModelsRequest(), timeout))

    def prewarm(
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
        return protocol.announcement(self._call(self._stub.Prewarm, request, timeout))

    def _call(self, method: Any, request: Any, timeout: float | None) -> Any:
        """What a call with a single answer is answered with."""
        request_id = protocol.new_request_id()
        call = self._connection.start(
            lambda wait: method.future(
                request, timeout=timeout, metadata=protocol.metadata_of(request_id), wait_for_ready=wait
            ),
            timeout,
            request_id,
        )
        try:
            return call.result()
        except grpc.RpcError as error:
            status: Any = error
            raise protocol.error_of(status, target=self._target, request_id=request_id, timeout=timeout) from None
        except grpc.FutureCancelledError:
            raise protocol.cancelled_error(request_id) from None

    def _start_generate(self, call: protocol.Call) -> Any:
        return self._connection.start(
            lambda wait: self._stub.Generate(
                call.request, timeout=call.timeout, metadata=call.metadata, wait_for_ready=wait
            ),
            call.timeout,
            call.request_id,
        )

    def _error(self, error: Any, answer: Answer) -> Exception:
        call = answer.call
        return protocol.error_of(
            error, target=self._target, request_id=call.request_id, timeout=call.timeout, progress=answer.progress
        )


class _Connection:
    """Follows the state of a channel, and starts calls on it so that nothing is sent before it is connected."""

    def __init__(self, channel: grpc.Channel, target: str, connect_timeout: float) -> None:
        self._channel = channel
        self._target = target
        self._timeout = connect_timeout
        self._changed = threading.Condition()
        self._state: grpc.ChannelConnectivity | None = None
        self._followed = False
        self._closed = False

    def start(self, begin: Callable[[bool], protocol.C], timeout: float | None, request_id: str) -> protocol.C:
        """A call made by `begin(wait_for_ready)`. Raises UnavailableError where no connection comes about in time."""
        with self._changed:
            if self._closed:
                raise RuntimeError("this client is closed")
            if not self._followed:
                self._channel.subscribe(self._note, try_to_connect=True)
                self._followed = True
            if self._ready():
                return begin(False)
            call = begin(True)  # makes the channel connect; nothing leaves before it has
            deadline_first = timeout is not None and timeout < self._timeout
            self._changed.wait_for(
                lambda: self._closed or self._ready(),
                timeout if deadline_first else self._timeout,
            )
            if self._closed or self._ready() or deadline_first:
                return call  # its own status says what became of it
            call.cancel()
            raise protocol.connect_error(self._target, self._timeout, request_id)

    def close(self) -> None:
        """Stops following."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._followed:
            self._channel.unsubscribe(self._note)

    def _ready(self) -> bool:
        return self._state is grpc.ChannelConnectivity.READY

    def _note(self, state: grpc.ChannelConnectivity) -> None:
        with self._changed:
            self._state = state
            self._changed.notify_all()


def _close(connection: _Connection, channel: grpc.Channel) -> None:
    connection.close()
    channel.close()
