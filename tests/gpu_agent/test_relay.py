"""The agent's streams to routers: nothing is left of one that ended."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

from services.common.grpc_frame import GrpcServer
from services.common.settings import ServiceSettings
from services.gpu_agent.relay import Relay
from warmserve.v1 import agent_pb2, agent_pb2_grpc


class EndingRouter(agent_pb2_grpc.TokenRelayServiceServicer):
    """Ends each stream after the first step."""

    async def Relay(self, request_iterator, context):
        async for message in request_iterator:
            if message.WhichOneof("message") == "step":
                return
            yield agent_pb2.RelayResponse()


async def test_nothing_is_left_of_a_stream_that_the_router_ended() -> None:
    """grpc's task that reads what is to be sent would else be found by the garbage collector while it waits."""
    problems: list[str] = []

    def note(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        problems.append(context["message"])

    asyncio.get_running_loop().set_exception_handler(note)
    server = GrpcServer(ServiceSettings())
    descriptor = agent_pb2.DESCRIPTOR.services_by_name["TokenRelayService"]
    server.add(agent_pb2_grpc.add_TokenRelayServiceServicer_to_server, EndingRouter(), descriptor)
    address = await server.start()
    lost: asyncio.Queue[str] = asyncio.Queue()
    relay = Relay("g0", lambda _: None, lost.put_nowait)
    for _ in range(3):
        relay.send(address, [agent_pb2.SequenceUpdate(request_id="r0")])
        assert await asyncio.wait_for(lost.get(), 30) == address
    await relay.close()
    await server.stop(0)
    for _ in range(3):
        await asyncio.sleep(0)
        gc.collect()
    assert problems == []
