"""Ranges of the sampling parameters. Pure; every function raises RequestError."""

from __future__ import annotations

import json
import math

from services.router.errors import invalid
from warmserve.v1 import inference_pb2

MAX_TOP_K = 2**31 - 1
MAX_STOPS = 16
MAX_STOP_CHARS = 1000
MAX_STOP_TOKENS = 128
MAX_BIASES = 1024
MAX_TOP_LOGPROBS = 20
MAX_REPETITION_PENALTY = 10.0
MAX_GRAMMAR_CHARS = 65_536
MAX_CHOICES = 1024


def check_sampling(sampling: inference_pb2.SamplingParams, grammar_name: str = "grammar") -> None:
    """All that does not depend on the model. `grammar_name`: what the caller knows the grammar as."""
    _check_numbers(sampling)
    _check_ends(sampling)
    if len(sampling.logit_bias) > MAX_BIASES:
        raise invalid("logit_bias", f"{len(sampling.logit_bias)} tokens given; at most {MAX_BIASES} are taken")
    for token, bias in sampling.logit_bias.items():
        check_number(f"logit_bias[{token}]", bias, -100.0, 100.0)
    if sampling.HasField("logprobs") and sampling.logprobs > MAX_TOP_LOGPROBS:
        raise invalid("logprobs", f"{sampling.logprobs} is not between 0 and {MAX_TOP_LOGPROBS}")
    if sampling.HasField("grammar"):
        _check_grammar(sampling.grammar, grammar_name)
        # Where the grammar has ended, only the end of the output can come.
        for name in ("min_tokens", "ignore_eos"):
            if getattr(sampling, name):
                raise invalid(name, f"{grammar_name} says when the output ends; leave one of the two out")


def check_token_parameters(sampling: inference_pb2.SamplingParams, vocabulary: int) -> None:
    """That logit_bias and stop_token_ids name tokens of the model's vocabulary."""
    for name, tokens in (("logit_bias", sampling.logit_bias), ("stop_token_ids", sampling.stop_token_ids)):
        for token in tokens:
            if token >= vocabulary:
                raise invalid(name, f"token id {token} is not in the model's vocabulary (0 to {vocabulary - 1})")


def check_number(name: str, value: float, low: float, high: float) -> None:
    """A number within bounds; NaN is within none."""
    if not low <= value <= high or not math.isfinite(value):
        raise invalid(name, f"{value:g} is not between {low:g} and {high:g}")


def _check_numbers(sampling: inference_pb2.SamplingParams) -> None:
    if sampling.HasField("temperature"):
        check_number("temperature", sampling.temperature, 0.0, 2.0)
    if sampling.HasField("top_p"):
        check_number("top_p", sampling.top_p, 0.0, 1.0)
        if sampling.top_p == 0.0:
            raise invalid("top_p", "0 leaves no token; use a value above 0, or temperature 0 for the likeliest token")
    if sampling.top_k > MAX_TOP_K:
        raise invalid("top_k", f"{sampling.top_k:,} is not between 0 (all tokens) and {MAX_TOP_K:,}")
    if sampling.HasField("min_p"):
        check_number("min_p", sampling.min_p, 0.0, 1.0)
    if sampling.HasField("repetition_penalty"):
        check_number("repetition_penalty", sampling.repetition_penalty, 0.0, MAX_REPETITION_PENALTY)
        if sampling.repetition_penalty == 0.0:
            raise invalid("repetition_penalty", "logits are divided by it: use a value above 0; 1 changes nothing")
    if sampling.HasField("presence_penalty"):
        check_number("presence_penalty", sampling.presence_penalty, -2.0, 2.0)
    if sampling.HasField("frequency_penalty"):
        check_number("frequency_penalty", sampling.frequency_penalty, -2.0, 2.0)


def _check_ends(sampling: inference_pb2.SamplingParams) -> None:
    if sampling.HasField("max_tokens"):
        if sampling.max_tokens < 1:
            raise invalid("max_tokens", "0 asks for nothing; ask for at least 1")
        if sampling.min_tokens > sampling.max_tokens:
            raise invalid(
                "min_tokens", f"{sampling.min_tokens:,} is more than max_tokens, which is {sampling.max_tokens:,}"
            )
    if len(sampling.stop_token_ids) > MAX_STOP_TOKENS:
        count = len(sampling.stop_token_ids)
        raise invalid("stop_token_ids", f"{count} tokens given; at most {MAX_STOP_TOKENS} are taken")
    if len(sampling.stop) > MAX_STOPS:
        raise invalid("stop", f"{len(sampling.stop)} texts given; at most {MAX_STOPS} are taken")
    for text in sampling.stop:
        if not text:
            raise invalid("stop", "an empty text would end every answer at once")
        if len(text) > MAX_STOP_CHARS:
            raise invalid("stop", f"a text of {len(text)} characters given; at most {MAX_STOP_CHARS} are taken")


def _check_grammar(grammar: inference_pb2.Grammar, name: str) -> None:
    kind = grammar.WhichOneof("kind")
    texts = [grammar.json_schema, grammar.regex, grammar.ebnf, *grammar.choice.texts]
    chars = sum(map(len, texts))
    if chars > MAX_GRAMMAR_CHARS:
        raise invalid(name, f"{chars:,} characters given; at most {MAX_GRAMMAR_CHARS:,} are taken")
    match kind:
        case "json_schema":
            _check_json_schema(grammar.json_schema, name)
        case "json_object":
            if not grammar.json_object:
                raise invalid(name, "json_object can only be true; leave it out instead")
        case "regex" | "ebnf":
            if not getattr(grammar, kind).strip():
                raise invalid(name, f"the {kind} is empty")
        case "choice":
            _check_choices(list(grammar.choice.texts), name)
        case _:
            raise invalid(name, "set one of json_schema, json_object, regex, ebnf and choice")


def _check_json_schema(text: str, name: str) -> None:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise invalid(name, f"the JSON schema is not JSON: {error}") from error
    if not isinstance(schema, dict | bool):
        raise invalid(name, "a JSON schema is an object")


def _check_choices(texts: list[str], name: str) -> None:
    if not 1 <= len(texts) <= MAX_CHOICES:
        raise invalid(name, f"{len(texts)} choices given; give 1 to {MAX_CHOICES}")
    if "" in texts:
        raise invalid(name, "an empty choice would end the answer at once")
    if len(set(texts)) < len(texts):
        raise invalid(name, "a choice is given twice")
