"""A request as the engine sees it, and what the engine says about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from services.gpu_agent.engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from services.gpu_agent.engine.grammar import Matcher
    from services.gpu_agent.engine.sampling_batch import TokenHistory


class FinishReason(StrEnum):
    """Why a sequence ended; the names are those of `warmserve.v1.FinishReason`."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    ERROR = "error"
    TOO_LARGE = "too_large"


@dataclass(frozen=True)
class TokenLogprob:
    """How likely a token was, by the model's own probabilities, and what else might have come."""

    token_id: int
    logprob: float
    """Natural logarithm of its probability."""
    top: list[tuple[int, float]]
    """The likeliest tokens, as many as sampling.logprobs, likeliest first: (token id, log probability)."""


@dataclass(eq=False)
class Sequence:
    """One request in progress. The engine's thread alone changes it once it has been submitted."""

    request_id: str
    attempt: int
    token_ids: list[int]
    """The prompt, and behind it all tokens generated so far, by earlier attempts too. A copy of what is passed."""
    sampling: SamplingParams
    num_generated: int = 0
    """How many of token_ids, at the end, were generated; so also the offset of the next token in the answer."""
    deadline: float | None = None
    """When to give up, in Unix seconds."""
    matcher: Matcher | None = None
    """Where token_ids stand in sampling.grammar; needed where that is set."""
    max_length: int = 1 << 62
    """Tokens, prompt included, at which it ends; set by the instance."""
    in_flight: int = 0
    """Tokens behind token_ids that steps under way are choosing: the device knows them, the CPU not yet."""
    computed_tokens: int = 0
    """How many tokens have, or will have after the steps under way, their keys and values in the cache."""
    slot: int = -1
    """Its place in the batch while it runs."""
    blocks: list[int] = field(default_factory=list)
    """KV blocks, in order of position; empty while it waits."""
    digests: list[bytes] = field(default_factory=list)
    """Of its full blocks (see prefix.py)."""
    remembered: int = 0
    """How many of `blocks` the KV cache knows by their digests."""
    history: TokenHistory | None = None
    """Where sampling.has_penalties; set by the instance."""

    def __post_init__(self) -> None:
        self.token_ids = list(self.token_ids)  # it grows, and the caller's must not

    @property
    def num_tokens(self) -> int:
        """Tokens that are known, or will be after the steps under way."""
        return len(self.token_ids) + self.in_flight

    @property
    def pending_tokens(self) -> int:
        """Tokens still to be computed before the next one can be chosen; 1 while decoding."""
        return self.num_tokens - self.computed_tokens

    @property
    def wants_more(self) -> bool:
        """Whether it will need a further token after the steps under way, unless one of those ends it."""
        return self.num_tokens < self.max_length


@dataclass(frozen=True)
class SequenceOutput:
    """News of one sequence from one step."""

    request_id: str
    attempt: int
    token_ids: list[int]
    """New tokens, in order."""
    offset: int
    """Index of the first of them in the answer."""
    finish_reason: FinishReason | None = None
    """Set when the sequence has ended; nothing follows."""
    error: str = ""
    """What went wrong, with FinishReason.ERROR and TOO_LARGE."""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    """One for each of token_ids, where sampling.logprobs asks for them."""
