"""The agent's side of the token relay: one long-lived stream to each router it serves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable

import grpc

from services.common.grpc_frame import channel
from services.common.tasks import begin_task, end_tasks
from services.common.telemetry import logger
from warmserve.v1 import agent_pb2, agent_pb2_grpc

_log = logger(__name__)


class Relay:
    """Streams to routers, opened when first needed.

    `on_cancel(request_ids)` is called for what a router cancels, `on_lost(address)` when its stream broke.
    """

    def __init__(
        self, agent_id: str, on_cancel: Callable[[Iterable[str]], None], on_lost: Callable[[str], None]
    ) -> None:
        self._agent_id = agent_id
        self._on_cancel = on_cancel
        self._on_lost = on_lost
        self._streams: dict[str, _Stream] = {}

    def send(self, address: str, updates: Iterable[agent_pb2.SequenceUpdate]) -> None:
        """Sends one step's news to the router at `address`, in order, without waiting."""
        stream = self._streams.get(address)
        if stream is None:
            stream = self._streams[address] = _Stream()
            stream.task = begin_task(self._run(address, stream), name=f"relay to {address}")
        stream.outgoing.put_nowait(agent_pb2.RelayRequest(step=agent_pb2.RelayStep(updates=updates)))

    async def close(self) -> None:
        """Sends what is queued and ends all streams."""
        streams = list(self._streams.values())
        for stream in streams:
            stream.outgoing.put_nowait(None)
        tasks = [stream.task for stream in streams if stream.task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=5)
        await end_tasks(tasks)

    async def _run(self, address: str, stream: _Stream) -> None:
        try:
            async with channel(address) as connection:
                stub = agent_pb2_grpc.TokenRelayServiceStub(connection)
                async for command in stub.Relay(self._outgoing(stream)):
                    self._on_cancel(command.cancel_request_ids)
        except grpc.aio.AioRpcError as error:
            _log.warning("stream to a router broke", router=address, error=error.details())
        finally:
            # However it ended: the router takes this agent for lost, and so must the agent take the router.
            del self._streams[address]
            stream.outgoing.put_nowait(None)  # grpc's task that waits for more to send would never end
            self._on_lost(address)

    async def _outgoing(self, stream: _Stream) -> AsyncIterator[agent_pb2.RelayRequest]:
        yield agent_pb2.RelayRequest(hello=agent_pb2.RelayHello(agent_id=self._agent_id))
        while (message := await stream.outgoing.get()) is not None:
            yield message


class _Stream:
    def __init__(self) -> None:
        self.outgoing: asyncio.Queue[agent_pb2.RelayRequest | None] = asyncio.Queue()
        self.task: asyncio.Task[None] | None = None
