"""Token streams from agents: one open stream per agent, on which the router answers with cancellations."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Protocol

import grpc

from services.common.grpc_frame import StatusError
from services.common.telemetry import logger
from warmserve.v1 import agent_pb2, agent_pb2_grpc

_log = logger(__name__)
_HELLO_S = 10.0


class RelayStream:
    """The stream of one agent, for as long as it holds."""

    def __init__(self, agent_id: str) -> None:
        self.agent_id = agent_id
        self.closed = asyncio.Event()
        self._cancelled: set[str] = set()
        self._news = asyncio.Event()

    def cancel(self, request_id: str) -> None:
        """Has the agent drop a request."""
        self._cancelled.add(request_id)
        self._news.set()

    async def cancellations(self) -> AsyncIterator[list[str]]:
        """Requests to drop, as they come; ends when the stream is closed."""
        while not self.closed.is_set():
            if self._cancelled:
                batch, self._cancelled = sorted(self._cancelled), set()
                yield batch
            else:
                await self._news.wait()
                self._news.clear()

    def close(self) -> None:
        """Ends the stream from this side."""
        self.closed.set()
        self._news.set()


class Receiver(Protocol):
    """Who the updates are for."""

    def stream_opened(self, stream: RelayStream) -> None:
        """An agent has opened its stream; an older one of the same agent has been given up by it."""

    def stream_lost(self, stream: RelayStream) -> None:
        """The stream is over; the agent has cancelled what it had from this router."""

    def apply(self, stream: RelayStream, update: agent_pb2.SequenceUpdate) -> None:
        """News of one sequence."""


class RelayService(agent_pb2_grpc.TokenRelayServiceServicer):
    """Serves TokenRelayService."""

    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver

    async def Relay(  # type: ignore[override]  # it writes to the context
        self, request_iterator: AsyncIterator[agent_pb2.RelayRequest], context: Any
    ) -> None:
        """One agent's stream, until it breaks or this router closes it."""
        messages = aiter(request_iterator)
        try:
            async with asyncio.timeout(_HELLO_S):
                first = await anext(messages, None)
        except TimeoutError as error:
            raise StatusError(grpc.StatusCode.DEADLINE_EXCEEDED, f"no `hello` came within {_HELLO_S:g} s") from error
        if first is None:
            return
        if first.WhichOneof("message") != "hello" or not first.hello.agent_id:
            raise StatusError(grpc.StatusCode.INVALID_ARGUMENT, "the first message must be `hello` with an agent_id")
        stream = RelayStream(first.hello.agent_id)
        self._receiver.stream_opened(stream)
        reading = asyncio.create_task(self._read(messages, stream))
        reading.add_done_callback(lambda _: stream.close())
        try:
            async for request_ids in stream.cancellations():
                await context.write(agent_pb2.RelayResponse(cancel_request_ids=request_ids))
            if reading.done():
                reading.result()  # an error of ours or of the agent's ends the call with its status
        finally:
            reading.cancel()
            self._receiver.stream_lost(stream)

    async def _read(self, messages: AsyncIterator[agent_pb2.RelayRequest], stream: RelayStream) -> None:
        try:
            async for message in messages:
                if message.WhichOneof("message") != "step":
                    raise StatusError(grpc.StatusCode.INVALID_ARGUMENT, "only `step` may follow `hello`")
                for update in message.step.updates:
                    self._receiver.apply(stream, update)
        except grpc.RpcError as error:
            _log.info("relay stream broke", agent=stream.agent_id, error=str(error))
