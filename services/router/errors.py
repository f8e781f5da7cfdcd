"""The one error that either door answers a request with."""

from __future__ import annotations

from collections.abc import Sequence

import grpc

from services.common.grpc_frame import StatusError


class RequestError(StatusError):
    """A request refused or failed. gRPC answers `code` and `message`; the HTTP door has a table from one to the other.

    `param` names the parameter that is wrong; `retry_after_s` says when trying again makes sense; `suggestions` are
    names that may have been meant. The last two go to gRPC callers as trailing metadata (see inference.proto).
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: float | None = None,
        suggestions: Sequence[str] = (),
    ) -> None:
        trailing = [("warmserve-suggestion", name) for name in suggestions]
        if retry_after_s is not None:
            trailing.append(("warmserve-retry-after-ms", str(round(retry_after_s * 1000))))
        super().__init__(code, message, trailing)
        self.param = param
        self.retry_after_s = retry_after_s


class TooLargeError(RequestError):
    """The request needs more memory than any instance of its model could give it, so that repeating it cannot help."""

    def __init__(self, message: str) -> None:
        super().__init__(grpc.StatusCode.RESOURCE_EXHAUSTED, message)
        self.trailing = (("warmserve-too-large", "1"),)


class TooLongError(RequestError):
    """Prompt and answer do not fit the model's context: less of them may."""

    def __init__(self, param: str, problem: str) -> None:
        super().__init__(grpc.StatusCode.INVALID_ARGUMENT, f"{param}: {problem}", param=param)


def invalid(param: str, problem: str) -> RequestError:
    """The caller's mistake in one parameter."""
    return RequestError(grpc.StatusCode.INVALID_ARGUMENT, f"{param}: {problem}", param=param)


def unavailable(message: str, retry_after_s: float) -> RequestError:
    """This router cannot go on with the request; another one, or a later try, may."""
    return RequestError(grpc.StatusCode.UNAVAILABLE, message, retry_after_s=retry_after_s)
