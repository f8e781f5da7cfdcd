"""What clients take and give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, TypedDict


class Message(TypedDict):
    """One message of a conversation."""

    role: str
    """system, user or assistant."""
    content: str


class Options(TypedDict, total=False):
    """How to choose tokens, and how long to wait. None, like leaving an option out, takes the default.

    At most one of json_schema, json_object, regex, ebnf and choice may be given.
    """

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
    n: int | None
    """How many answers to generate, 1 to 16; answer i draws with seed + i."""
    min_p: float | None
    """Only tokens at least this likely relative to the likeliest one; 0, the default, to 1."""
    repetition_penalty: float | None
    """Above 1 makes tokens of prompt and answer less likely to come again; above 0, at most 10; default 1."""
    presence_penalty: float | None
    """Taken off the logit of each token that the answer has already; -2 to 2; default 0."""
    frequency_penalty: float | None
    """Taken off the logit of each token as often as the answer has it; -2 to 2; default 0."""
    logit_bias: Mapping[int, float] | None
    """Added to the logits of these token ids, -100 to 100; at most 1024 of them."""
    logprobs: int | None
    """Report log probabilities, with this many alternatives for each token, 0 to 20; by default none."""
    stop_token_ids: Sequence[int] | None
    """Further tokens that end the output, and are part of it; at most 128."""
    min_tokens: int | None
    """Tokens to generate before anything but max_tokens may end the output; default 0."""
    json_schema: Mapping[str, Any] | str | None
    """The output is JSON that this schema describes; a mapping, or its JSON."""
    json_object: bool | None
    """True: the output is a JSON object."""
    regex: str | None
    """The whole output matches this regular expression."""
    ebnf: str | None
    """The output follows this grammar in GBNF (llama.cpp's notation of EBNF), whose start rule is `root`."""
    choice: Sequence[str] | None
    """The output is one of these texts; at most 1024."""
    ignore_eos: bool | None
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
class TopLogprob:
    """One of the likeliest tokens at a place."""

    token_id: int
    logprob: float
    """Natural logarithm of its probability, before penalties, bias, temperature and filters."""
    token: bytes
    """The bytes of its text, which may be part of a character."""


@dataclass(frozen=True)
class TokenLogprob:
    """How likely a token of the answer was, and what else might have come."""

    token_id: int
    logprob: float
    """Natural logarithm of its probability, before penalties, bias, temperature and filters."""
    token: bytes
    """The bytes of its text, which may be part of a character."""
    top: tuple[TopLogprob, ...]
    """The likeliest tokens, as many as were asked for, likeliest first."""


@dataclass(frozen=True)
class TextDelta:
    """A piece of an answer."""

    text: str
    """May be empty, where a token ends in the middle of a character."""
    token_ids: tuple[int, ...]
    """The tokens it was made of."""
    offset: int
    """Index of the first of token_ids in the answer."""
    index: int = 0
    """Which answer it belongs to; those of several come interleaved."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """One for each of token_ids, where they were asked for."""


@dataclass(frozen=True)
class Usage:
    """Token counts."""

    prompt_tokens: int
    """Tokens of the prompt, counted once however many answers there are."""
    completion_tokens: int
    """Tokens generated, in all answers."""

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
class Choice:
    """One finished answer."""

    index: int
    """Which it is, from 0."""
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    """stop (end of sequence, a stop text or token, the grammar's end) or length (max_tokens, or the context's end)."""
    logprobs: tuple[TokenLogprob, ...]
    """One for each of token_ids; empty where they were not asked for."""
    timing: Timing


@dataclass(frozen=True)
class Completion:
    """What a request was answered with. The properties are those of the first answer, mostly the only one."""

    request_id: str
    model: str
    choices: tuple[Choice, ...]
    """The answers, in order of index; as many as `n` asked for."""
    usage: Usage

    @property
    def text(self) -> str:
        """The first answer's text."""
        return self.choices[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The first answer's tokens."""
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> str:
        """Why the first answer ended: stop or length."""
        return self.choices[0].finish_reason

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...]:
        """Log probabilities of the first answer's tokens; empty where they were not asked for."""
        return self.choices[0].logprobs

    @property
    def timing(self) -> Timing:
        """Where the first answer's time went."""
        return self.choices[0].timing


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


@dataclass(frozen=True)
class Announcement:
    """Traffic that was announced."""

    id: str
    """Its id in the cluster's calendar: `warmctl calendar list` shows it."""
    model: ModelInfo
    """The model as it was when the announcement was taken."""
