"""From token ids to text, piece by piece: whole characters only, and stop texts found across token boundaries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

_UNKNOWN = "\N{REPLACEMENT CHARACTER}"
_OPEN_CHARS = 3  # a UTF-8 character has at most 4 bytes, so at most 3 at the end of a text can be incomplete
_CONTEXT_TOKENS = 8  # tokens before a piece that decide how it is decoded (spaces, joined bytes)


class Decoder(Protocol):
    """What is needed of tokenizers.Tokenizer."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...


class Detokenizer:
    """Decodes a growing answer.

    A window of the newest tokens is decoded anew with each token, and what is new in its text is given out, except a
    tail that more tokens may still turn into something else. Pieces joined are the decoded answer.
    """

    def __init__(self, decoder: Decoder, prompt: Sequence[int]) -> None:
        """`prompt`: the tokens before the answer; the last few decide whether it begins with a space."""
        self._decoder = decoder
        self._window = list(prompt[-_CONTEXT_TOKENS:])
        self._emitted = len(_settled(self._text()))

    def _text(self) -> str:
        return self._decoder.decode(self._window, skip_special_tokens=True)

    def push(self, token: int) -> str:
        """The text that this token settles; may be empty."""
        self._window.append(token)
        text = self._text()
        settled = _settled(text)
        piece = settled[self._emitted :]
        self._emitted = max(self._emitted, len(settled))
        if len(self._window) > 2 * _CONTEXT_TOKENS:
            self._shorten(len(text) - self._emitted)
        return piece

    def _shorten(self, kept_back: int) -> None:
        tail = self._window[-_CONTEXT_TOKENS:]
        text = self._decoder.decode(tail, skip_special_tokens=True)
        if len(text) >= kept_back:  # special tokens have no text; then the window grows on
            self._window = tail
            self._emitted = len(text) - kept_back

    def flush(self) -> str:
        """What was kept back, at the answer's end."""
        text = self._text()
        piece = text[self._emitted :]
        self._emitted = len(text)
        return piece


def _settled(text: str) -> str:
    end = len(text)
    while end > 0 and len(text) - end < _OPEN_CHARS and text[end - 1] == _UNKNOWN:
        end -= 1
    return text[:end]


class StopScanner:
    """Finds the first stop text in a growing text, and keeps back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """The text that can be given out. Once `stopped` is set, nothing more comes."""
        if self.stopped:
            return ""
        text = self._held + piece
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was kept back, where no stop text came."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, but not all of it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


class Piece(NamedTuple):
    """Text made of tokens."""

    text: str
    tokens: int  # how many of the tokens given were used; fewer than all where a stop text came


class AnswerText:
    """An answer's text, from its tokens and stop texts."""

    def __init__(self, decoder: Decoder, prompt: Sequence[int], stops: Sequence[str], min_tokens: int = 0) -> None:
        """Stop texts count in what comes after the first `min_tokens` tokens only."""
        self._detokenizer = Detokenizer(decoder, prompt)
        self._scanner = StopScanner(stops)
        self._exempt = min_tokens

    @property
    def stopped(self) -> bool:
        """Whether a stop text has come."""
        return self._scanner.stopped

    def push(self, tokens: Sequence[int]) -> Piece:
        """Text of further tokens, up to a stop text."""
        parts = []
        for used, token in enumerate(tokens, start=1):
            piece = self._detokenizer.push(token)
            if self._exempt:
                self._exempt -= 1
                parts.append(piece)
                continue
            parts.append(self._scanner.push(piece))
            if self.stopped:
                return Piece("".join(parts), used)
        return Piece("".join(parts), len(tokens))

    def flush(self) -> str:
        """The rest, once no more tokens come. A stop text may be completed by it."""
        if self.stopped:
            return ""
        rest = self._scanner.push(self._detokenizer.flush())
        return rest if self.stopped else rest + self._scanner.flush()
