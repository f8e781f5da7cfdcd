"""The OpenAI-compatible HTTP door."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Coroutine
from typing import Any

import structlog
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from services.common.tasks import end_tasks
from services.common.telemetry import logger
from services.router.core import Core
from services.router.errors import RequestError, invalid
from services.router.openai_logprobs import Json
from services.router.openai_models import ChatBody, CompletionBody, parse
from services.router.openai_replies import Replies, error_body, error_of, model, status_of
from services.router.settings import RouterSettings
from services.router.validation import Call
from warmserve.v1 import inference_pb2

_log = logger(__name__)
_BODY_S = 60.0  # for a client to send its body
_FAREWELL_S = 5.0  # for a client to take an error at the end of a stream
_DRAIN_FACTOR = 16  # how many times the limit of an oversized body is read, so that the client sees the answer


def make_app(core: Core, settings: RouterSettings) -> Starlette:
    """The ASGI application."""

    async def models(_: Request) -> Response:
        specs = sorted(core.view.models.items.values(), key=lambda spec: spec.name)
        return JSONResponse({"object": "list", "data": [model(spec) for spec in specs]})

    async def one_model(request: Request) -> Response:
        return JSONResponse(model(core.spec(request.path_params["name"])))

    async def health(_: Request) -> Response:
        return JSONResponse({"status": "stopping"}, 503) if core.stopping else JSONResponse({"status": "ok"})

    async def refused(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestError)
        return JSONResponse(error_of(error), status_of(error))

    async def not_served(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        text = f"{request.method} {request.url.path[:256]}: {error.detail.lower()}"
        code = "not_found" if error.status_code == 404 else "method_not_allowed"
        return JSONResponse(error_body(error.status_code, text, code=code), error.status_code, headers=error.headers)

    return Starlette(
        routes=[
            Route("/health", health),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", one_model),
            Route("/v1/chat/completions", _Endpoint(core, settings, ChatBody), methods=["POST"]),
            Route("/v1/completions", _Endpoint(core, settings, CompletionBody), methods=["POST"]),
        ],
        exception_handlers={RequestError: refused, HTTPException: not_served},
    )


class _BodyTooLargeError(Exception):
    pass


class _Endpoint:
    """One generating endpoint, as an ASGI application of its own: the whole answer is sent within the core's `open`."""

    def __init__(self, core: Core, settings: RouterSettings, kind: type[ChatBody] | type[CompletionBody]) -> None:
        self._core = core
        self._settings = settings
        self._kind = kind

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        request_id = request.headers.get("x-request-id") or uuid.uuid4().hex
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request_id=request_id)
        reply = _Reply(scope, receive, send, request_id)
        try:
            async with asyncio.timeout(_BODY_S):
                data = await _read(request, self._settings.max_body_bytes)
        except ClientDisconnect:
            return
        except TimeoutError:
            await reply.json(408, error_body(408, f"the body did not come within {_BODY_S:g} s", code="timeout"))
            return
        except _BodyTooLargeError:
            text = f"the body is larger than the {self._settings.max_body_bytes:,} bytes this server takes"
            await reply.json(413, error_body(413, text, code="body_too_large"))
            return
        await _unless_disconnected(receive, self._answer(request, data, request_id, reply))

    async def _answer(self, request: Request, data: bytes, request_id: str, reply: _Reply) -> None:
        try:
            body = parse(self._kind, data)
            call = body.call(self._timeout(request), request_id)
            replies = Replies(
                self._kind is ChatBody,
                body.model,
                request_id,
                include_usage=body.include_usage,
                logprobs=call.sampling.HasField("logprobs"),
                n=call.n,
            )
            if body.stream:
                await self._stream(call, replies, reply)
            else:
                await reply.json(200, await self._whole(call, replies))
        except RequestError as error:
            await reply.error(error)
        except OSError:
            return  # the client is gone
        except Exception as error:
            _log.error("request failed", path=request.url.path, exc_info=error)
            text = "internal error; the service's log has it under this request's id"
            await reply.failure(500, error_body(500, text, code="internal_error"))

    def _timeout(self, request: Request) -> float:
        given = request.headers.get("x-request-timeout")
        if given is None:
            return self._settings.request_timeout_s
        try:
            return float(given)
        except ValueError as error:
            raise invalid("X-Request-Timeout", f"{given[:64]!r} is not a number of seconds") from error

    async def _whole(self, call: Call, replies: Replies) -> Json:
        deltas: list[list[inference_pb2.TextDelta]] = [[] for _ in range(call.n)]
        ends: dict[int, inference_pb2.Finished] = {}
        async with self._core.open(call) as requests:
            async for index, event in self._core.follow(requests):
                if isinstance(event, inference_pb2.TextDelta):
                    deltas[index].append(event)
                elif isinstance(event, inference_pb2.Finished):
                    ends[index] = event
        return replies.whole(deltas, [ends[index] for index in range(call.n)])

    async def _stream(self, call: Call, replies: Replies, reply: _Reply) -> None:
        async with self._core.open(call) as requests:
            await reply.start_stream()
            for chunk in replies.first():
                await reply.event(chunk)
            async for index, event in self._core.follow(requests):
                if isinstance(event, inference_pb2.Progress):
                    await reply.comment(_told(event))
                elif isinstance(event, inference_pb2.Finished):
                    await reply.event(replies.end(index, event))
                elif piece := replies.delta(index, event):
                    await reply.event(piece)
            if usage := replies.usage():
                await reply.event(usage)
        await reply.end_stream()


class _Reply:
    """Sends one response, whole or as server-sent events."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, request_id: str) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._headers = {"x-request-id": request_id[:128].encode("ascii", "replace").decode()}
        self._streaming = False

    async def json(self, status: int, body: Json, headers: dict[str, str] | None = None) -> None:
        """The whole response."""
        response = JSONResponse(body, status, headers={**self._headers, **(headers or {})})
        await response(self._scope, self._receive, self._send)

    async def start_stream(self) -> None:
        """Status 200 and headers."""
        self._streaming = True
        headers = {**self._headers, "content-type": "text/event-stream", "cache-control": "no-cache"}
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": 200, "headers": raw})

    async def event(self, data: Json) -> None:
        """One chunk."""
        await self._write(f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n")

    async def comment(self, text: str) -> None:
        """A line that clients skip and people see."""
        await self._write(f": {' '.join(text.split())}\n\n")

    async def end_stream(self) -> None:
        """The end that OpenAI's clients wait for."""
        await self._write("data: [DONE]\n\n", more=False)

    async def error(self, error: RequestError) -> None:
        """A RequestError, as a status where nothing has been sent yet."""
        headers = {} if error.retry_after_s is None else {"retry-after": f"{error.retry_after_s:.0f}"}
        await self.failure(status_of(error), error_of(error), headers)

    async def failure(self, status: int, body: Json, headers: dict[str, str] | None = None) -> None:
        """An error body: the response, or the last event of a stream."""
        if not self._streaming:
            await self.json(status, body, headers)
            return
        try:
            async with asyncio.timeout(_FAREWELL_S):
                await self.event(body)
                await self._write("", more=False)
        except (OSError, TimeoutError):
            return  # the client does not read

    async def _write(self, text: str, more: bool = True) -> None:
        await self._send({"type": "http.response.body", "body": text.encode(), "more_body": more})


async def _read(request: Request, limit: int) -> bytes:
    parts = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size <= limit:
            parts.append(part)
        elif size > limit * _DRAIN_FACTOR:
            break
    if size > limit:
        raise _BodyTooLargeError
    return b"".join(parts)


async def _unless_disconnected(receive: Receive, answer: Coroutine[Any, Any, None]) -> None:
    """Runs `answer`, and cancels it when the client goes away."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    answering = asyncio.create_task(answer)
    watching = asyncio.create_task(gone())
    try:
        await asyncio.wait({answering, watching}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        await end_tasks([answering, watching])


def _told(progress: inference_pb2.Progress) -> str:
    state = inference_pb2.ProgressState.Name(progress.state).removeprefix("PROGRESS_STATE_").lower()
    estimate = ""
    if progress.HasField("estimated_wait_ms"):
        estimate = f", about {progress.estimated_wait_ms / 1000:.1f} s"
    return f"{state}{estimate}: {progress.reason.text}"
