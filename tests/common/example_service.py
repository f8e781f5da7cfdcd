"""A service that does nothing but what its callers ask it to suffer: the process and the gRPC frame without a product.

python -m tests.common.example_service --port 7000 ...
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc

from services.common.grpc_frame import StatusError
from services.common.process import Node, run
from services.common.settings import ServiceSettings
from services.common.telemetry import logger
from warmserve.v1 import common_pb2, inference_pb2, inference_pb2_grpc, placement_pb2, placement_pb2_grpc

_log = logger(__name__)
SECRET = "what only the log may show"


class ExampleSettings(ServiceSettings):
    """An example."""


def suffer(wish: str) -> None:
    """Raises what `wish` asks for."""
    _log.info("asked", wish=wish)
    if wish == "refuse":
        raise StatusError(grpc.StatusCode.NOT_FOUND, "there is no such model; did you mean 'a'?")
    if wish == "crash":
        raise RuntimeError(SECRET)


class Placement(placement_pb2_grpc.PlacementServiceServicer):
    """A unary call."""

    async def WakeModel(self, request: placement_pb2.WakeModelRequest, context: Any) -> placement_pb2.WakeModelResponse:
        suffer(request.model)
        return placement_pb2.WakeModelResponse(state=common_pb2.REPLICA_STATE_WARM)


class Inference(inference_pb2_grpc.InferenceServiceServicer):
    """A streaming call, which answers once before it suffers, and goes on until `stop` where that is what was asked."""

    def __init__(self, node: Node) -> None:
        self._node = node

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: Any
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        yield inference_pb2.GenerateResponse(delta=inference_pb2.TextDelta(text="first"))
        suffer(request.model)
        if request.model == "until stop":
            await self._node.stop.wait()
        yield inference_pb2.GenerateResponse(delta=inference_pb2.TextDelta(text="last"))


async def serve(settings: ExampleSettings, node: Node) -> None:
    """Serves until node.stop is set."""
    node.server.add(
        placement_pb2_grpc.add_PlacementServiceServicer_to_server,
        Placement(),
        placement_pb2.DESCRIPTOR.services_by_name["PlacementService"],
    )
    node.server.add(
        inference_pb2_grpc.add_InferenceServiceServicer_to_server,
        Inference(node),
        inference_pb2.DESCRIPTOR.services_by_name["InferenceService"],
    )
    address = await node.server.start()
    await node.server.set_serving(True)
    _log.info("serving", address=address)
    await node.stop.wait()
    await node.server.stop(settings.grace_s)


if __name__ == "__main__":
    run("example", ExampleSettings, serve)
