"""What every gRPC server of ours has: health, reflection, request ids in logs, and errors as clear statuses."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc
import structlog
from google.protobuf.descriptor import ServiceDescriptor
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from services.common.settings import ServiceSettings
from services.common.telemetry import logger

_log = logger(__name__)

MAX_MESSAGE_BYTES = 16 << 20
CHANNEL_OPTIONS: Sequence[tuple[str, int]] = (
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)
_SERVER_OPTIONS: Sequence[tuple[str, int]] = (
    *CHANNEL_OPTIONS,
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.so_reuseport", 0),  # a port in use is an error, not a second listener
)
REQUEST_ID = "x-request-id"


class StatusError(Exception):
    """An error to answer a caller with. Raised anywhere under a handler, it ends the call with this status.

    `trailing` is metadata that goes with it, for programs: keys in lower case, values in ASCII.
    """

    def __init__(self, code: grpc.StatusCode, message: str, trailing: Sequence[tuple[str, str]] = ()) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.trailing = trailing


class _Errors(grpc.aio.ServerInterceptor):
    """Turns exceptions into statuses, and binds the caller's request id, or a new one, to all log lines of the call."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        method = handler_call_details.method
        metadata = dict(handler_call_details.invocation_metadata or ())
        behaviour = handler.unary_unary or handler.stream_unary or handler.unary_stream or handler.stream_stream

        def begin() -> None:
            structlog.contextvars.clear_contextvars()
            structlog.contextvars.bind_contextvars(request_id=metadata.get(REQUEST_ID) or uuid.uuid4().hex)

        async def single(request: Any, context: Any) -> Any:
            begin()
            try:
                return await behaviour(request, context)
            except Exception as error:
                await _abort(context, method, error)

        async def stream(request: Any, context: Any) -> None:
            begin()
            try:
                responses = behaviour(request, context)
                if not hasattr(responses, "__aiter__"):
                    await responses  # a handler that writes to the context itself
                    return
                # Written rather than yielded: a call that is cancelled then ends the handler's generator at once, and
                # not when it is garbage.
                async with contextlib.aclosing(responses):
                    async for response in responses:
                        await context.write(response)
            except Exception as error:
                await _abort(context, method, error)

        makers: dict[tuple[bool, bool], Callable[..., Any]] = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, True): grpc.stream_stream_rpc_method_handler,
        }
        return makers[(handler.request_streaming, handler.response_streaming)](
            stream if handler.response_streaming else single,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )


async def _abort(context: Any, method: str, error: Exception) -> None:
    if isinstance(error, StatusError):
        await context.abort(error.code, error.message, tuple(error.trailing))
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if isinstance(error, NotImplementedError):  # the generated base class's answer
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, f"{method} is not served here")
    _log.error("call failed", method=method, exc_info=error)
    request_id = structlog.contextvars.get_contextvars()["request_id"]
    await context.abort(
        grpc.StatusCode.INTERNAL, f"internal error; the service's log has it under request id {request_id}"
    )


class GrpcServer:
    """A grpc.aio server with health and reflection."""

    def __init__(self, settings: ServiceSettings) -> None:
        self._settings = settings
        self.server = grpc.aio.server(interceptors=[_Errors()], options=_SERVER_OPTIONS)
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.server)
        self._names: list[str] = []
        self.address = ""

    def add(self, register: Callable[[Any, grpc.aio.Server], None], servicer: object, of: ServiceDescriptor) -> None:
        """Adds a service: add(agent_pb2_grpc.add_AgentServiceServicer_to_server, servicer, <its descriptor>)."""
        register(servicer, self.server)
        self._names.append(of.full_name)

    async def start(self) -> str:
        """Listens. Returns host:port to tell others. Raises OSError where the port is taken."""
        reflection.enable_server_reflection([*self._names, health.SERVICE_NAME, reflection.SERVICE_NAME], self.server)
        wanted = f"{self._settings.host}:{self._settings.port}"
        try:
            port = self.server.add_insecure_port(wanted)
        except RuntimeError as error:
            raise OSError(f"cannot listen on {wanted}: is another process using it?") from error
        await self.server.start()
        self.address = f"{self._settings.reachable_host}:{port}"
        return self.address

    async def set_serving(self, serving: bool) -> None:
        """What the health service answers, for the server as a whole and for each service."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", *self._names):
            await self._health.set(name, status)

    async def stop(self, grace_s: float) -> None:
        """Refuses new calls at once and lets running ones go on for up to `grace_s` seconds."""
        await self._health.enter_graceful_shutdown()
        await self.server.stop(grace_s)


def channel(address: str) -> grpc.aio.Channel:
    """A channel to another service."""
    return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
