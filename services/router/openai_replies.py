"""JSON of the OpenAI-compatible door: answers, chunks and errors."""

from __future__ import annotations

import time

import grpc

from services.router.errors import RequestError, TooLargeError, TooLongError
from services.router.openai_logprobs import ChatLogprobs, CompletionLogprobs, Json, LogprobsJson
from warmserve.v1 import cluster_pb2, inference_pb2

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
_TOO_LARGE = "context_length_exceeded"  # upon which clients shorten what they send
_FINISH = {inference_pb2.FINISH_REASON_STOP: "stop", inference_pb2.FINISH_REASON_LENGTH: "length"}


def status_of(error: RequestError) -> int:
    """The HTTP status of an error."""
    if isinstance(error, TooLargeError):
        return 400  # for OpenAI's clients repeat what was answered 429
    return _STATUSES[error.code]


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> Json:
    """An error as OpenAI's clients read it."""
    kind = _TYPES.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_of(error: RequestError) -> Json:
    """A RequestError as a body."""
    status = status_of(error)
    code = _TOO_LARGE if isinstance(error, TooLargeError | TooLongError) else _CODES[status]
    return error_body(status, error.message, error.param, code)


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

    def __init__(self, chat: bool, model: str, request_id: str, include_usage: bool, logprobs: bool, n: int) -> None:
        self._chat = chat
        self._include_usage = include_usage
        self._logprobs: list[LogprobsJson | None] = [
            (ChatLogprobs() if chat else CompletionLogprobs()) if logprobs else None for _ in range(n)
        ]
        self._finished: dict[int, inference_pb2.Finished] = {}
        self._head: Json = {
            "id": ("chatcmpl-" if chat else "cmpl-") + request_id,
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, deltas: list[list[inference_pb2.TextDelta]], finished: list[inference_pb2.Finished]) -> Json:
        """All answers in one piece, from their pieces and ends in order of index."""
        choices = []
        for index, (pieces, end) in enumerate(zip(deltas, finished, strict=True)):
            text = "".join(piece.text for piece in pieces)
            logprobs = self._logprobs_of(index, [item for piece in pieces for item in piece.logprobs])
            choice: Json = {"index": index, "logprobs": logprobs, "finish_reason": _FINISH[end.reason]}
            if self._chat:
                choice["message"] = {"role": "assistant", "content": text, "refusal": None}
            else:
                choice["text"] = text
            choices.append(choice)
        kind = "chat.completion" if self._chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices, "usage": _usage(finished)}

    def first(self) -> list[Json]:
        """The chunks before any text, where there are some."""
        if not self._chat:
            return []
        return [self._chunk(index, {"role": "assistant", "content": ""}) for index in range(len(self._logprobs))]

    def delta(self, index: int, delta: inference_pb2.TextDelta) -> Json | None:
        """A chunk of one answer; None where it would say nothing."""
        if not delta.text and not delta.logprobs:
            return None
        content = {"content": delta.text} if self._chat else delta.text
        return self._chunk(index, content, self._logprobs_of(index, list(delta.logprobs)))

    def end(self, index: int, finished: inference_pb2.Finished) -> Json:
        """The chunk after the text of one answer."""
        self._finished[index] = finished
        return self._chunk(index, {} if self._chat else "", finish=_FINISH[finished.reason])

    def usage(self) -> Json | None:
        """The chunk after all answers, where it was asked for."""
        if not self._include_usage:
            return None
        return {**self._head, "object": self._kind, "choices": [], "usage": _usage(list(self._finished.values()))}

    @property
    def _kind(self) -> str:
        return "chat.completion.chunk" if self._chat else "text_completion"

    def _logprobs_of(self, index: int, tokens: list[inference_pb2.TokenLogprob]) -> Json | None:
        writer = self._logprobs[index]
        return writer.of(tokens) if writer is not None else None

    def _chunk(self, index: int, content: Json | str, logprobs: Json | None = None, finish: str | None = None) -> Json:
        choice: Json = {"index": index, "logprobs": logprobs, "finish_reason": finish}
        choice["delta" if self._chat else "text"] = content
        chunk: Json = {**self._head, "object": self._kind, "choices": [choice]}
        if self._include_usage:
            chunk["usage"] = None
        return chunk


def _usage(finished: list[inference_pb2.Finished]) -> Json:
    prompt = finished[0].usage.prompt_tokens
    completion = sum(end.usage.completion_tokens for end in finished)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
