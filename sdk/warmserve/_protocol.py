"""What both clients do to messages: requests built, answers put together, statuses turned into errors. No I/O here."""

from __future__ import annotations

import math
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol, TypeVar

import grpc

from warmserve._enums import enum_word
from warmserve._options import check_names, set_field, set_options
from warmserve.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    ModelNotFoundError,
    QueueFullError,
    RequestCancelledError,
    UnavailableError,
    WarmServeError,
)
from warmserve.types import Announcement, Message, ModelInfo, Options, Progress
from warmserve.v1 import common_pb2, inference_pb2

DEFAULT_TIMEOUT_S = 600.0
CONNECT_TIMEOUT_S = 5.0
MAX_MESSAGE_BYTES = 16 << 20  # what routers accept
CHANNEL_OPTIONS: Sequence[tuple[str, int]] = (
    ("grpc.keepalive_time_ms", 10_000),  # notices within seconds that a router is gone without a word
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", -1),  # checked here, with a message that says what to do
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.enable_retries", 1),  # "transparent" ones: only of calls that never left this machine
)
REQUEST_ID = "x-request-id"
SUGGESTION = "warmserve-suggestion"  # trailing metadata, once per name
RETRY_AFTER_MS = "warmserve-retry-after-ms"  # trailing metadata
TOO_LARGE = "warmserve-too-large"  # trailing metadata

Metadata = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Call:
    """One Generate call, ready to send."""

    request: inference_pb2.GenerateRequest
    metadata: Metadata
    timeout: float | None

    @property
    def request_id(self) -> str:
        """The id in the request, the metadata and every error."""
        return self.request.request_id


class Cancellable(Protocol):
    """A running call of either of grpc's kinds."""

    def cancel(self) -> Any: ...


C = TypeVar("C", bound=Cancellable)


class Status(Protocol):
    """What grpc's sync and async errors have in common."""

    def code(self) -> Any: ...

    def details(self) -> Any: ...

    def trailing_metadata(self) -> Any: ...


def check_target(target: str) -> None:
    """Raises ValueError where `target` is a URL instead of host:port."""
    if re.match(r"https?://", target):
        raise ValueError(f"{target!r} is a URL: give the router's gRPC address as host:port")


def prompt_call(model: str, prompt: str | Sequence[int], options: Options, timeout: float | None) -> Call:
    """A call that continues text, or token ids. `timeout` holds where the options have none.

    Raises InvalidRequestError for what the wire cannot carry; the router judges the rest.
    """
    request = inference_pb2.GenerateRequest()
    if isinstance(prompt, str):
        set_field(request, "prompt", prompt, "a text that UTF-8 can carry")
    else:
        try:
            request.token_ids.ids.extend(prompt)
        except (TypeError, ValueError) as error:
            raise InvalidRequestError(f"prompt must be a text or a sequence of token ids: {error}") from error
        request.token_ids.SetInParent()
    return _finish(request, model, options, timeout)


def chat_call(
    model: str, messages: Iterable[Message | Mapping[str, str]], options: Options, timeout: float | None
) -> Call:
    """A call that answers a conversation. Raises like prompt_call."""
    request = inference_pb2.GenerateRequest()
    request.conversation.SetInParent()
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            raise InvalidRequestError(f"messages[{index}] must be a mapping with exactly role and content: {message!r}")
        try:
            request.conversation.messages.add(role=message["role"], content=message["content"])
        except (TypeError, ValueError) as error:
            raise InvalidRequestError(f"messages[{index}]: role and content must be texts: {error}") from error
    return _finish(request, model, options, timeout)


def prewarm_request(
    model: str, load: float, at: datetime | None, duration: timedelta | float | None, note: str
) -> inference_pb2.PrewarmRequest:
    """An announcement of traffic. Raises InvalidRequestError for what the wire cannot carry."""
    request = inference_pb2.PrewarmRequest()
    set_field(request, "model", model, "a text that UTF-8 can carry")
    set_field(request, "load", load, "a number of requests in progress, above 0")
    set_field(request, "note", note, "a text that UTF-8 can carry")
    if at is not None:
        if not isinstance(at, datetime) or at.timestamp() < 1:
            raise InvalidRequestError(f"at must be a datetime after 1970, not {at!r}")
        request.start_unix_s = math.floor(at.timestamp())
    if duration is not None:
        seconds = duration.total_seconds() if isinstance(duration, timedelta) else duration
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < 1e9:
            raise InvalidRequestError(f"duration must be a timedelta or a number of seconds, above 0, not {duration!r}")
        request.duration_s = math.ceil(seconds)
    return request


def metadata_of(request_id: str) -> Metadata:
    """What goes with every call."""
    return ((REQUEST_ID, request_id),)


def new_request_id() -> str:
    """An id that no other request has."""
    return uuid.uuid4().hex


def _finish(
    request: inference_pb2.GenerateRequest, model: str, options: Options, default_timeout: float | None
) -> Call:
    request_id = options.get("request_id") or new_request_id()
    try:
        check_names(options)
        if not re.fullmatch(r"[ -~]{1,128}", request_id):
            raise InvalidRequestError(f"request_id must be 1 to 128 printable ASCII characters, not {request_id!r}")
        timeout = options.get("timeout", default_timeout)
        if timeout is not None and not (isinstance(timeout, int | float) and timeout > 0):
            raise InvalidRequestError(f"timeout must be a number of seconds above 0, or None, not {timeout!r}")
        request.request_id = request_id
        set_field(request, "model", model, "a text")
        set_options(request, options)
        size = request.ByteSize()
        if size > MAX_MESSAGE_BYTES:
            raise InvalidRequestError(
                f"the request has {size} bytes, above the {MAX_MESSAGE_BYTES} that routers accept: shorten the prompt"
            )
    except InvalidRequestError as error:
        error.request_id = request_id
        raise
    return Call(request, metadata_of(request_id), timeout)


def models(response: inference_pb2.ListModelsResponse) -> list[ModelInfo]:
    """The deployed models, in order of name."""
    return [_model(model) for model in response.models]


def announcement(response: inference_pb2.PrewarmResponse) -> Announcement:
    """What became of an announcement."""
    return Announcement(id=response.id, model=_model(response.model))


def _model(model: inference_pb2.ModelStatus) -> ModelInfo:
    return ModelInfo(
        name=model.name,
        state=enum_word(common_pb2.ReplicaState.DESCRIPTOR, model.state),
        context_tokens=model.context_tokens,
        deployed_at=datetime.fromtimestamp(model.deployed_unix_ms / 1000, UTC),
    )


def error_of(
    status: Status, *, target: str, request_id: str, timeout: float | None, progress: Progress | None = None
) -> WarmServeError:
    """The error to raise for the status a call ended with. `progress`: where the request stood last."""
    code = status.code()
    details = str(status.details() or "")
    metadata = [(str(key), value) for key, value in status.trailing_metadata() or ()]
    if code is grpc.StatusCode.NOT_FOUND:
        suggestions = tuple(_text(value) for key, value in metadata if key == SUGGESTION)
        return ModelNotFoundError(details, request_id=request_id, suggestions=suggestions)
    if code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.OUT_OF_RANGE):
        return InvalidRequestError(details, request_id=request_id)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        if any(key == TOO_LARGE for key, _ in metadata):
            return InvalidRequestError(details, request_id=request_id)
        waits = [_text(value) for key, value in metadata if key == RETRY_AFTER_MS]
        retry_after_s = float(waits[0]) / 1000 if waits and waits[0].isdigit() else None
        return QueueFullError(details, request_id=request_id, retry_after_s=retry_after_s)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return deadline_error(request_id, timeout, progress, details)
    if code is grpc.StatusCode.CANCELLED:
        return RequestCancelledError(f"the request was cancelled: {details}", request_id=request_id)
    if code is grpc.StatusCode.UNAVAILABLE:
        return UnavailableError(f"router {target}: {details}", request_id=request_id)
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return WarmServeError(f"{target} does not speak WarmServe's protocol: {details}", request_id=request_id)
    return WarmServeError(f"{getattr(code, 'name', code)} from {target}: {details}", request_id=request_id)


def deadline_error(
    request_id: str, timeout: float | None, progress: Progress | None, details: str = ""
) -> DeadlineExceededError:
    """Says how long was waited and, where it is known, for what."""
    message = "the answer was not complete in time" if timeout is None else f"no complete answer within {timeout:g} s"
    if details and details.lower() != "deadline exceeded":  # grpc's own words add nothing
        message += f": {details}"
    if progress is not None:
        message += f" (last reported {progress.state}" + (f": {progress.reason})" if progress.reason else ")")
    return DeadlineExceededError(message, request_id=request_id)


def connect_error(target: str, waited_s: float, request_id: str) -> UnavailableError:
    """No connection came about; nothing was sent."""
    return UnavailableError(
        f"no connection to {target} within {waited_s:g} s: is a router listening there?", request_id=request_id
    )


def cancelled_error(request_id: str) -> RequestCancelledError:
    """The stream was closed on this side."""
    return RequestCancelledError("the stream was closed before the answer was complete", request_id=request_id)


def _text(value: str | bytes) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
