"""A request as the engine sees it, and what the engine says about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from services.gpu_agent.engine.sampling_params import SamplingParams


class FinishReason(StrEnum):
    """Why a sequence ended; the names are those of `warmserve.v1.FinishReason`."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    ERROR = "error"


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
