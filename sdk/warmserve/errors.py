"""What clients raise. Every failure of a call is a WarmServeError; grpc's own errors never come through."""

from __future__ import annotations


class WarmServeError(Exception):
    """A call failed. `request_id` is the id that the router's and the agents' logs carry; "" where none was made."""

    def __init__(self, message: str, *, request_id: str = "") -> None:
        super().__init__(message)
        self.request_id = request_id


class ModelNotFoundError(WarmServeError):
    """No such model is deployed. `suggestions`: names of deployed models that are nearest, best first."""

    def __init__(self, message: str, *, request_id: str = "", suggestions: tuple[str, ...] = ()) -> None:
        super().__init__(message, request_id=request_id)
        self.suggestions = suggestions


class InvalidRequestError(WarmServeError):
    """The request cannot be served as it is; the message says which field and what to do. Do not repeat it as it is."""


class QueueFullError(WarmServeError):
    """Too many requests wait. `retry_after_s`: when to try again, in seconds; None where the router did not say."""

    def __init__(self, message: str, *, request_id: str = "", retry_after_s: float | None = None) -> None:
        super().__init__(message, request_id=request_id)
        self.retry_after_s = retry_after_s


class DeadlineExceededError(WarmServeError):
    """The answer was not complete within the call's timeout; the cluster has dropped the request."""


class UnavailableError(WarmServeError):
    """The router could not be reached, is stopping, or was lost on the way. Another router may serve the request."""


class RequestCancelledError(WarmServeError):
    """The request was cancelled: its stream was closed, or its client."""
