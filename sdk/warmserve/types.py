"""What clients take and give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, TypedDict


class Message(TypedDict):
    """One message of a conversation."""

    role: str
    """system, user or assistant."""
    content: str


class Options(TypedDict, total=False):
    """How to choose tokens, and how long to wait. None, like leaving an option out, takes the default."""

    max_tokens: int | None
    """Most tokens to generate, at least 1; by default as many as the context allows."""
    temperature: float | None
    """0 takes the likeliest token; default 1; at most 2."""
    top_p: float | None
    """Smallest set of tokens whose probability reaches this; above 0, at most 1; default 1."""
    top_k: int | None
    """Only the k likeliest tokens; 0, the default, means all."""
    seed: int | None
    """Makes sampling reproducible; by default it is random."""
    stop: str | Sequence[str] | None
    """Texts that end the output, not included in it; at most 16."""
    ignore_eos: bool
    """Go on past the model's end-of-sequence token; for load tests."""
    priority: Literal["high", "normal", "low"] | None
    """Urgency among the model's requests; default normal."""
    request_id: str | None
    """An id of your own for logs, at most 128 printable ASCII characters; by default one is made up."""
    timeout: float | None
    """Seconds the whole call may take; None means no bound; left out, the client's own timeout holds."""


@dataclass(frozen=True)
class Progress:
    """The request still waits."""

    state: str
    """queued (an instance is active), waking (one is being woken), blocked (none can be at the moment; tried again) or
    resuming (its instance was lost; the request goes on where it stopped)."""
    cause: str
    """The kind of reason, for programs: waiting_requests, no_capacity, agent_lost, ... or unspecified."""
    reason: str
    """Why it waits, in a sentence."""
    estimated_wait_ms: float | None
    """Estimated time from now to the first token; None where nothing is known yet."""
    requests_in_progress: int
    """Requests of this model in progress at the router, this one included."""


@dataclass(frozen=True)
class TextDelta:
    """A piece of the answer."""

    text: str
    """May be empty, where a token ends in the middle of a character."""
    token_ids: tuple[int, ...]
    """The tokens it was made of."""
    offset: int
    """Index of the first of token_ids in the answer."""


@dataclass(frozen=True)
class Usage:
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int

    @property
    def total_tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class Timing:
    """Where a request's time went, as the router measured it, in milliseconds."""

    found_state: str
    """The best state of any of the model's replicas when the request arrived: cold, warming, warm or active."""
    queue_ms: float
    """From arrival to an instance taking it, waking included."""
    prefill_ms: float
    """From there to the first token."""
    ttft_ms: float
    """From arrival to the first token."""
    total_ms: float
    """From arrival to the end."""
    resumed: int
    """How many times the request moved to another instance."""


@dataclass(frozen=True)
class Completion:
    """A finished answer."""

    request_id: str
    model: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    """stop (end of sequence, or a stop text) or length (max_tokens, or the context's end)."""
    usage: Usage
    timing: Timing


@dataclass(frozen=True)
class ModelInfo:
    """A deployed model."""

    name: str
    state: str
    """The best state of any of its replicas: cold, warming, warm, active or draining."""
    context_tokens: int
    """Most tokens of prompt plus output."""
    deployed_at: datetime
    """In UTC."""
