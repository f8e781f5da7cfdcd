"""JSON of the OpenAI-compatible door: answers, chunks and errors."""

from __future__ import annotations

import time
from typing import Any

import grpc

from services.router.errors import RequestError
from warmserve.v1 import cluster_pb2, inference_pb2

Json = dict[str, Any]

_STATUSES = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.INTERNAL: 500,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}
_TYPES = {429: "rate_limit_error", 500: "server_error", 503: "server_error", 504: "timeout_error"}
_CODES = {
    400: "invalid_parameter",
    404: "model_not_found",
    429: "queue_full",
    500: "internal_error",
    503: "unavailable",
    504: "deadline_exceeded",
}
_FINISH = {inference_pb2.FINISH_REASON_STOP: "stop", inference_pb2.FINISH_REASON_LENGTH: "length"}


def status_of(error: RequestError) -> int:
    """The HTTP status of an error."""
    return _STATUSES[error.code]


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> Json:
    """An error as OpenAI's clients read it."""
    kind = _TYPES.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_of(error: RequestError) -> Json:
    """A RequestError as a body."""
    status = status_of(error)
    return error_body(status, error.message, error.param, _CODES[status])


def model(spec: cluster_pb2.ModelSpec) -> Json:
    """A deployed model as /v1/models shows it."""
    return {
        "id": spec.name,
        "object": "model",
        "created": spec.deployed_unix_ms // 1000,
        "owned_by": "warmserve",
    }


class Replies:
    """What one request is answered with, whole or in chunks."""

    def __init__(self, chat: bool, model: str, request_id: str, include_usage: bool) -> None:
        self._chat = chat
        self._include_usage = include_usage
        self._head: Json = {
            "id": ("chatcmpl-" if chat else "cmpl-") + request_id,
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, text: str, finished: inference_pb2.Finished) -> Json:
        """The answer in one piece."""
        choice: Json = {"index": 0, "logprobs": None, "finish_reason": _FINISH[finished.reason]}
        if self._chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
        kind = "chat.completion" if self._chat else "text_completion"
        return {**self._head, "object": kind, "choices": [choice], "usage": _usage(finished)}

    def first(self) -> Json | None:
        """The chunk before any text, where there is one."""
        return self._chunk({"role": "assistant", "content": ""}, None) if self._chat else None

    def delta(self, text: str) -> Json:
        """A chunk of text."""
        return self._chunk({"content": text} if self._chat else text, None)

    def last(self, finished: inference_pb2.Finished) -> list[Json]:
        """The chunks after the text."""
        chunks = [self._chunk({} if self._chat else "", _FINISH[finished.reason])]
        if self._include_usage:
            chunks.append({**self._head, "object": self._kind, "choices": [], "usage": _usage(finished)})
        return chunks

    @property
    def _kind(self) -> str:
        return "chat.completion.chunk" if self._chat else "text_completion"

    def _chunk(self, content: Json | str, finish: str | None) -> Json:
        choice: Json = {"index": 0, "logprobs": None, "finish_reason": finish}
        choice["delta" if self._chat else "text"] = content
        chunk: Json = {**self._head, "object": self._kind, "choices": [choice]}
        if self._include_usage:
            chunk["usage"] = None
        return chunk


def _usage(finished: inference_pb2.Finished) -> Json:
    usage = finished.usage
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
