"""What a request must be like, whichever door it came through. Pure; every function raises RequestError."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import grpc

from services.router.errors import RequestError, TooLongError, invalid
from services.router.sampling_rules import check_sampling
from warmserve.v1 import common_pb2, inference_pb2

MAX_ANSWERS = 16
MAX_REQUEST_ID_CHARS = 128
MAX_TIMEOUT_S = 86_400.0
ROLES = ("system", "user", "assistant")

Message = dict[str, str]  # {"role": ..., "content": ...}, as chat templates want it


@dataclass(frozen=True)
class Conversation:
    """Messages for the model's chat template, oldest first."""

    messages: list[Message]


Input = str | Conversation | list[int]  # text, conversation, or token ids


@dataclass(frozen=True)
class Call:
    """A request as a door understood it."""

    model: str
    input: Input
    input_name: str  # what the door calls the input, for error messages
    sampling: inference_pb2.SamplingParams
    timeout_s: float
    request_id: str = ""  # the client's own; made up where empty
    priority: common_pb2.Priority.ValueType = common_pb2.PRIORITY_NORMAL
    n: int = 1  # answers
    grammar_name: str = "grammar"  # what the door calls sampling.grammar, for error messages


def unknown_model(name: str, deployed: Iterable[str]) -> RequestError:
    """NOT_FOUND, naming the deployed models whose names are nearest."""
    names = sorted(deployed)
    by_lower = {known.lower(): known for known in names}
    near = [by_lower[found] for found in difflib.get_close_matches(name[:256].lower(), by_lower, n=3, cutoff=0.5)]
    if near:
        hint = "did you mean " + " or ".join(repr(item) for item in near) + "?"
    elif names:
        hint = "deployed are " + ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
    else:
        hint = "no model is deployed"
    text = f"model {name[:256]!r} is not deployed; {hint}"
    return RequestError(grpc.StatusCode.NOT_FOUND, text, param="model", suggestions=near)


def check_call(call: Call, max_prompt_chars: int) -> None:
    """Everything that can be checked before the prompt is tokenised."""
    if not call.model:
        raise invalid("model", "name a deployed model")
    if len(call.request_id) > MAX_REQUEST_ID_CHARS or not call.request_id.isprintable():
        raise invalid("request_id", f"use at most {MAX_REQUEST_ID_CHARS} printable characters")
    if call.priority not in common_pb2.Priority.values():
        raise invalid("priority", f"{int(call.priority)} is no priority")
    if not 0 < call.timeout_s <= MAX_TIMEOUT_S:
        raise invalid("timeout", f"{call.timeout_s:g} s is not between 0 and {MAX_TIMEOUT_S:,.0f} s")
    if not 1 <= call.n <= MAX_ANSWERS:
        raise invalid("n", f"{call.n} is not between 1 and {MAX_ANSWERS}")
    check_sampling(call.sampling, call.grammar_name)
    _check_input(call.input, call.input_name, max_prompt_chars)


def _check_input(given: Input, name: str, max_prompt_chars: int) -> None:
    if isinstance(given, Conversation):
        if not given.messages:
            raise invalid(name, "give at least one message")
        for index, message in enumerate(given.messages):
            if message["role"] not in ROLES:
                raise invalid(f"{name}[{index}].role", f"{message['role'][:64]!r} is not one of {', '.join(ROLES)}")
        chars = sum(len(message["content"]) for message in given.messages)
    elif not given:
        raise invalid(name, "it is empty; give something to continue")
    else:
        chars = len(given) if isinstance(given, str) else 0
    if chars > max_prompt_chars:
        raise invalid(name, f"{chars:,} characters given; at most {max_prompt_chars:,} are taken")


def check_token_ids(ids: Sequence[int], vocabulary: int, name: str) -> None:
    """Token ids that the model's vocabulary has."""
    for position, token in enumerate(ids):
        if not 0 <= token < vocabulary:
            raise invalid(
                name,
                f"token id {token} at position {position} is not in the model's vocabulary (0 to {vocabulary - 1})",
            )


def allowed_tokens(prompt_tokens: int, sampling: inference_pb2.SamplingParams, context: int, name: str) -> int:
    """How many tokens the answer may have. TooLongError, with the numbers, for what does not fit the context."""
    if prompt_tokens == 0:
        raise invalid(name, "it has no tokens; give something to continue")
    room = context - prompt_tokens
    if room < 1:
        raise TooLongError(
            name,
            f"the prompt has {prompt_tokens:,} tokens; the model's context is {context:,} tokens "
            "for prompt and answer together: shorten the prompt",
        )
    if not sampling.HasField("max_tokens"):
        if sampling.min_tokens > room:
            raise TooLongError(
                "min_tokens",
                f"the prompt has {prompt_tokens:,} tokens and min_tokens is {sampling.min_tokens:,}; together they "
                f"exceed the model's context of {context:,} tokens: ask for at most {room:,}",
            )
        return room
    if sampling.max_tokens > room:
        raise TooLongError(
            "max_tokens",
            f"the prompt has {prompt_tokens:,} tokens and max_tokens is {sampling.max_tokens:,}; together they exceed "
            f"the model's context of {context:,} tokens: ask for at most {room:,}",
        )
    return sampling.max_tokens
