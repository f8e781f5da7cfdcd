"""Grammars that answers must follow: xgrammar compiles them for a model's tokenizer and tracks each answer."""

from __future__ import annotations

import json
import math
import re
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xgrammar
from transformers import AutoTokenizer

from services.gpu_agent.engine.sampling_params import Grammar, GrammarKind

_CACHE_BYTES = 256 << 20
_MAX_SCHEMA_DEPTH = 64  # the compiler's memory grows with the square
# JSON allows any amount between its parts, of which a model may never find out.
_MAX_WHITESPACE = 64
# The characters of a string with minLength or maxLength. xgrammar 0.2.8 lets raw control characters in, which are not
# JSON, and keeps escapes out (its issue 800). Only the first is mended: with escapes, every mask takes a tenth of a
# second, because the library then has to try most of the vocabulary.
_BOUNDED = re.compile(r"""^(\S+ ::= )\(\(\[\^\\"\\\\\\r\\n\]\)\)$""", re.MULTILINE)
_CHARACTER = r"""[^\0-\x1f\"\\]"""
# Tokens are followed in the engine's thread, where all models wait for them. Nearly every grammar takes far less than
# this for each token; one that may be read in many ways at once takes more and more as the answer grows.
_SECONDS_PER_TOKEN = 0.01
_MOST_SECONDS_BEHIND = 1.0
# Where in the library an error arose.
_ORIGIN = re.compile(r"^\[[\d:]+\] \S+\.(?:cc|h):\d+: ")


class GrammarError(ValueError):
    """A grammar that cannot be used, or an answer that is not in it."""


class GrammarCompiler:
    """Compiles grammars for one model; what it has compiled lately is kept. Its methods may be called by any thread.

    The tokenizer is loaded when the first grammar is asked for, so that a model without a usable one serves all other
    requests.
    """

    def __init__(self, folder: Path, vocabulary: int, eos_ids: Iterable[int]) -> None:
        """`folder` holds the tokenizer, `vocabulary` is the logits' width, and eos_ids end an answer."""
        self._folder = folder
        self._vocabulary = vocabulary
        self._eos_ids = sorted(eos_ids)
        self._lock = threading.Lock()
        self._compiler: xgrammar.GrammarCompiler | None = None

    def matcher(self, grammar: Grammar, answer: Iterable[int] = ()) -> Matcher:
        """A matcher that stands behind `answer`, the tokens generated so far.

        May take a second or more where the grammar is large, or is the first one: not for the engine's thread.
        GrammarError where the grammar, the tokenizer or the answer is at fault.
        """
        try:
            matcher = Matcher(self._compile(grammar), self._vocabulary)
        except (RuntimeError, UnicodeEncodeError) as error:  # what xgrammar raises for faults in a grammar
            fault = _ORIGIN.sub("", str(error)).strip()
            raise GrammarError(f"the grammar of kind {grammar.kind} cannot be used: {fault}") from error
        for token in answer:
            matcher.accept(token)
        return matcher

    def _compile(self, grammar: Grammar) -> xgrammar.CompiledGrammar:
        compiler = self._loaded()
        match grammar.kind:
            case GrammarKind.JSON_SCHEMA:
                return compiler.compile_grammar(_from_schema(grammar.text))
            case GrammarKind.JSON_OBJECT:
                return compiler.compile_json_schema({"type": "object"}, max_whitespace_cnt=_MAX_WHITESPACE)
            case GrammarKind.REGEX:
                return compiler.compile_regex(grammar.text)
            case GrammarKind.EBNF:
                return compiler.compile_grammar(grammar.text)
            case GrammarKind.CHOICE:
                return compiler.compile_grammar(_alternatives(grammar.text))

    def _loaded(self) -> xgrammar.GrammarCompiler:
        with self._lock:
            if self._compiler is None:
                self._compiler = xgrammar.GrammarCompiler(self._tokenizer(), cache_limit_bytes=_CACHE_BYTES)
            return self._compiler

    def _tokenizer(self) -> xgrammar.TokenizerInfo:
        if not self._eos_ids:
            raise GrammarError("grammars need a model with an end-of-sequence token; its checkpoint names none")
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(self._folder, local_files_only=True, trust_remote_code=False)
            return xgrammar.TokenizerInfo.from_huggingface(
                tokenizer, vocab_size=self._vocabulary, stop_token_ids=self._eos_ids
            )
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            raise GrammarError(f"grammars need the model's tokenizer, which cannot be loaded: {error}") from error


class Matcher:
    """Where one answer stands in its grammar. Used by one thread at a time."""

    def __init__(self, compiled: xgrammar.CompiledGrammar, vocabulary: int) -> None:
        """At the grammar's beginning. GrammarError where no answer can begin."""
        self._matcher = xgrammar.GrammarMatcher(compiled)
        self._vocabulary = vocabulary
        self._mask = xgrammar.allocate_token_bitmask(1, vocabulary)
        self._behind = 0.0  # seconds of this thread that it has taken beyond _SECONDS_PER_TOKEN
        self._fill()

    @property
    def mask(self) -> npt.NDArray[np.int32]:
        """Which tokens may come next: bit t % 32 of word t // 32 for token t; at least one, until is_terminated.

        The end-of-sequence token may come where the grammar may end. The next `accept` changes the array.
        """
        mask: npt.NDArray[np.int32] = self._mask.numpy()[0]
        return mask

    @property
    def is_terminated(self) -> bool:
        """Whether the answer has ended with an end-of-sequence token; nothing may follow."""
        return self._matcher.is_terminated()

    def accept(self, token: int) -> None:
        """Goes on behind the next token.

        GrammarError where it may not come, where nothing may follow it, or where following the answer costs too much.
        """
        began = time.thread_time()
        if not self._matcher.accept_token(token):
            raise GrammarError(f"token {token} does not fit the grammar here")
        if not self._matcher.is_terminated():
            self._fill()
        self._behind = max(0.0, self._behind + time.thread_time() - began - _SECONDS_PER_TOKEN)
        if self._behind > _MOST_SECONDS_BEHIND:
            raise GrammarError("the grammar takes too long to follow, for it can be read in too many ways; simplify it")

    def _fill(self) -> None:
        self._mask.fill_(-1)
        self._matcher.fill_next_token_bitmask(self._mask)
        if self._vocabulary % 32:
            self._mask[0, -1] &= (1 << self._vocabulary % 32) - 1
        if not self._mask.any():
            raise GrammarError("the grammar can neither go on here nor end with any of the model's tokens")


def _from_schema(schema: str) -> xgrammar.Grammar:
    _check_depth(schema)
    grammar = xgrammar.Grammar.from_json_schema(schema, max_whitespace_cnt=_MAX_WHITESPACE)
    rules, bounded = _BOUNDED.subn(lambda rule: rule[1] + _CHARACTER, str(grammar))
    return xgrammar.Grammar.from_ebnf(rules) if bounded else grammar


def _check_depth(schema: str) -> None:
    try:
        level: list[Any] = [json.loads(schema, parse_float=_finite, parse_constant=_finite)]
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"the JSON schema is not JSON: {error}") from error
    for _ in range(_MAX_SCHEMA_DEPTH + 1):
        level = [part for value in level if isinstance(value, dict | list) for part in _parts(value)]
    if level:
        raise GrammarError(f"the JSON schema is nested more than {_MAX_SCHEMA_DEPTH} deep; use $defs and $ref")


def _finite(number: str) -> float:
    """A number of a schema; ValueError for one at which the compiler would stop without a reason."""
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number} is out of range")
    return value


def _parts(value: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def _alternatives(text: str) -> str:
    """The EBNF of a JSON list of strings."""
    try:
        choices = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"the choices are not JSON: {error}") from error
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, str) for choice in choices):
        raise GrammarError("the choices must be a JSON list of one or more strings")
    # A JSON string is an EBNF literal, as long as no character is written as a pair of surrogates.
    return "root ::= " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)
