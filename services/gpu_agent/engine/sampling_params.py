"""What a request asks for when tokens are chosen: plain data, checked when it is made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

MAX_LOGPROBS = 20
MAX_BIASED_TOKENS = 1024
MAX_STOP_TOKENS = 128


class GrammarKind(StrEnum):
    """The languages in which a grammar may be written."""

    JSON_SCHEMA = "json_schema"
    """The text is a JSON schema; the answer is a JSON value that it allows."""
    JSON_OBJECT = "json_object"
    """Any JSON object; the text is empty."""
    REGEX = "regex"
    """The text is a regular expression that the whole answer matches."""
    EBNF = "ebnf"
    """The text is a grammar in GBNF, llama.cpp's notation, whose first rule is called root."""
    CHOICE = "choice"
    """The text is a JSON list of strings; the answer is one of them."""


@dataclass(frozen=True)
class Grammar:
    """The language that an answer must belong to. Whether the text is sound is found when it is compiled."""

    kind: GrammarKind
    text: str = ""

    def __post_init__(self) -> None:
        if (self.kind is GrammarKind.JSON_OBJECT) == bool(self.text):
            needs = "no text" if self.kind is GrammarKind.JSON_OBJECT else "a text"
            raise ValueError(f"a grammar of kind {self.kind} needs {needs}")


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen, and when to stop. ValueError where a value is out of range."""

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
    min_p: float = 0.0
    """Only tokens at least this many times as likely as the likeliest."""
    repetition_penalty: float = 1.0
    """Divides positive logits, and multiplies negative ones, of tokens that prompt or answer hold; 1 does nothing."""
    presence_penalty: float = 0.0
    """Taken off the logits of tokens that the answer holds."""
    frequency_penalty: float = 0.0
    """Taken off the logits of tokens once for each time that the answer holds them."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these tokens."""
    logprobs: int | None = None
    """Report the log probability of each token, and of so many likeliest ones; None reports nothing."""
    stop_token_ids: frozenset[int] = frozenset()
    """Tokens that end the answer, as the end-of-sequence token does."""
    min_tokens: int = 0
    """Tokens that end the answer are not chosen before it has this length."""
    grammar: Grammar | None = None
    """The answer belongs to this language."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, not {self.max_tokens}")
        # Written so that NaN is refused too.
        if not 0 <= self.temperature <= 2:
            raise ValueError(f"temperature must be from 0 to 2, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if not 0 <= self.top_k < 1 << 31:
            raise ValueError(f"top_k must be 0 (all tokens) or more, not {self.top_k}")
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"seed must be from 0 to 2**64 - 1, not {self.seed}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be from 0 (off) to 1, not {self.min_p}")
        if not 0 < self.repetition_penalty <= 10:
            raise ValueError(
                f"repetition_penalty must be above 0 and at most 10 (1 is off), not {self.repetition_penalty}"
            )
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise ValueError(f"{name} must be from -2 to 2 (0 is off), not {getattr(self, name)}")
        self._check_bias()
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise ValueError(f"logprobs must be from 0 to {MAX_LOGPROBS}, or left out, not {self.logprobs}")
        _check_ids("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKENS)
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise ValueError(f"min_tokens must be from 0 to max_tokens ({self.max_tokens}), not {self.min_tokens}")
        if self.grammar and self.ignore_eos:
            raise ValueError("ignore_eos cannot go with a grammar, which says itself where the answer ends; drop one")

    @property
    def has_penalties(self) -> bool:
        """Whether the choice depends on which tokens went before."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def needs_last_token(self) -> bool:
        """Whether the last token must be known on the CPU before the next is prepared; else the device's is enough."""
        return self.grammar is not None

    def check_vocabulary(self, size: int) -> None:
        """ValueError where a token id named here is not below `size`; on a GPU it would be a stray write."""
        for name, ids in (("logit_bias", self.logit_bias), ("stop_token_ids", self.stop_token_ids)):
            if (highest := max(ids, default=0)) >= size:
                raise ValueError(f"{name} names token {highest}; token ids must be below {size}")

    def _check_bias(self) -> None:
        _check_ids("logit_bias", self.logit_bias, MAX_BIASED_TOKENS)
        for token, bias in self.logit_bias.items():
            if not -100 <= bias <= 100:
                raise ValueError(f"logit_bias must be from -100 to 100, not {bias} for token {token}")


def _check_ids(name: str, ids: Iterable[int], limit: int) -> None:
    listed = list(ids)
    if len(listed) > limit:
        raise ValueError(f"{name} must name at most {limit} tokens, not {len(listed)}")
    if listed and min(listed) < 0:
        raise ValueError(f"{name} must name token ids of 0 or more, not {min(listed)}")
