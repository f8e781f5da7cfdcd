"""A request as the engine sees it, and what the engine says about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class FinishReason(StrEnum):
    """Why a sequence ended; the names are those of `warmserve.v1.FinishReason`."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    ERROR = "error"


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen. ValueError where a value is out of range."""

    max_tokens: int
    """Most tokens to generate, those of earlier attempts included."""
    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    """Smallest set of tokens whose probability reaches this."""
    top_k: int = 0
    """Only the k likeliest tokens; 0 means all."""
    seed: int = 0
    """0 to 2**64 - 1. The same seed gives the same tokens, whatever else runs."""
    ignore_eos: bool = False
    """Go on past the end-of-sequence token."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, not {self.max_tokens}")
        # Written so that NaN is refused too.
        if not 0 <= self.temperature <= 2:
            raise ValueError(f"temperature must be from 0 to 2, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (all tokens) or more, not {self.top_k}")
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"seed must be from 0 to 2**64 - 1, not {self.seed}")


@dataclass(eq=False)
class Sequence:
    """One request in progress. The engine's thread alone changes it once it has been submitted."""

    request_id: str
    attempt: int
    token_ids: list[int]
    """The prompt, and behind it all tokens generated so far, by earlier attempts too."""
    sampling: SamplingParams
    num_generated: int = 0
    """How many of token_ids, at the end, were generated; so also the offset of the next token in the answer."""
    deadline: float | None = None
    """When to give up, in Unix seconds."""
    computed_tokens: int = 0
    """How many of token_ids have their keys and values in the cache."""
    blocks: list[int] = field(default_factory=list)
    """KV blocks, in order of position."""

    @property
    def pending_tokens(self) -> int:
        """Tokens still to be computed before the next one can be chosen; 1 while decoding."""
        return len(self.token_ids) - self.computed_tokens


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
    """What went wrong, with FinishReason.ERROR."""
