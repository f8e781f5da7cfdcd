"""What a trace is made of: requests, or windows in which somebody counted them."""

from __future__ import annotations

from dataclasses import dataclass


class TraceError(ValueError):
    """A trace cannot be read; names the file, the line where there is one, and what was expected."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request of a trace."""

    time_s: float
    """When it arrived: in Unix seconds where the trace has dates (those without a zone are taken as UTC), else in
    seconds since the trace's own zero."""
    model: str
    """The model it was for; "" where the trace names none."""
    prompt_tokens: int
    """At least 0."""
    output_tokens: int
    """At least 0."""


@dataclass(frozen=True, slots=True)
class Window:
    """What was counted of one model in one stretch of time. None is what the trace does not tell."""

    start_s: float
    """Its begin, as Request.time_s."""
    window_s: float
    """Its length, above 0."""
    model: str
    """The model; "" where the trace names none."""
    request_rate: float | None = None
    """Arrivals per second."""
    mean_load: float | None = None
    """Mean of requests in progress."""
    peak_load: float | None = None
    """Most requests in progress at any moment."""
    prompt_tokens_per_s: float | None = None
    output_tokens_per_s: float | None = None
