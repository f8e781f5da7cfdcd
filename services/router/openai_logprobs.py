"""Log probabilities as OpenAI's two endpoints show them."""

from __future__ import annotations

import codecs
from typing import Any, Protocol

from warmserve.v1 import inference_pb2

Json = dict[str, Any]

_LEAST = -9999.0  # what OpenAI shows for a token that could not come; JSON has no infinity


class LogprobsJson(Protocol):
    """Writes one answer's log probabilities."""

    def of(self, tokens: list[inference_pb2.TokenLogprob]) -> Json:
        """Those of the answer's next tokens."""
        ...


class ChatLogprobs:
    """As /v1/chat/completions shows them."""

    def of(self, tokens: list[inference_pb2.TokenLogprob]) -> Json:
        """The tokens, each with its alternatives."""
        content = [_entry(token) | {"top_logprobs": [_entry(other) for other in token.top]} for token in tokens]
        return {"content": content, "refusal": None}


class CompletionLogprobs:
    """As /v1/completions shows them; `text_offset` counts characters from the answer's beginning."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._chars = 0

    def of(self, tokens: list[inference_pb2.TokenLogprob]) -> Json:
        """Parallel lists, one entry for each token."""
        offsets = []
        for token in tokens:
            offsets.append(self._chars)
            self._chars += len(self._decoder.decode(token.token))
        return {
            "tokens": [_text(token.token) for token in tokens],
            "token_logprobs": [_number(token.logprob) for token in tokens],
            "top_logprobs": [_alternatives(token) for token in tokens],
            "text_offset": offsets,
        }


def _alternatives(token: inference_pb2.TokenLogprob) -> dict[str, float]:
    """The likeliest tokens, and the chosen one, which OpenAI adds where it is none of those."""
    likeliest = {_text(other.token): _number(other.logprob) for other in reversed(token.top)}
    return likeliest | {_text(token.token): _number(token.logprob)}


def _entry(token: inference_pb2.TokenLogprob | inference_pb2.TopLogprob) -> Json:
    return {"token": _text(token.token), "logprob": _number(token.logprob), "bytes": list(token.token)}


def _text(token: bytes) -> str:
    return token.decode("utf-8", "replace")


def _number(logprob: float) -> float:
    return max(logprob, _LEAST)
