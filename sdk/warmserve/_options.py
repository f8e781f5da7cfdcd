"""Options of a call put into its message. What the wire cannot carry is refused here; the router judges the rest."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from warmserve.errors import InvalidRequestError
from warmserve.types import Options
from warmserve.v1 import common_pb2, inference_pb2

_SAMPLING = {
    "max_tokens": "an integer of at least 1",
    "temperature": "a number from 0 to 2",
    "top_p": "a number above 0 and at most 1",
    "top_k": "an integer of at least 0",
    "min_p": "a number from 0 to 1",
    "repetition_penalty": "a number above 0 and at most 10",
    "presence_penalty": "a number from -2 to 2",
    "frequency_penalty": "a number from -2 to 2",
    "logprobs": "an integer from 0 to 20",
    "min_tokens": "an integer of at least 0",
    "seed": "an integer from 0 to 2**64 - 1",
    "ignore_eos": "true or false",
}
_GRAMMARS = ("json_schema", "json_object", "regex", "ebnf", "choice")
_PRIORITIES = {
    "high": common_pb2.PRIORITY_HIGH,
    "normal": common_pb2.PRIORITY_NORMAL,
    "low": common_pb2.PRIORITY_LOW,
}


def check_names(options: Options) -> None:
    """Raises TypeError for an option that there is not."""
    for name in options:
        if name not in Options.__annotations__:
            near = difflib.get_close_matches(name, Options.__annotations__, 1)
            hint = f"; did you mean {near[0]}?" if near else f": there are {', '.join(Options.__annotations__)}"
            raise TypeError(f"unknown option {name!r}{hint}")


def set_options(request: inference_pb2.GenerateRequest, options: Options) -> None:
    """All options but the id and the timeout. Raises InvalidRequestError."""
    priority = options.get("priority")
    if priority is not None:
        if priority not in _PRIORITIES:
            raise InvalidRequestError(f"priority must be high, normal or low, not {priority!r}")
        request.priority = _PRIORITIES[priority]
    n = options.get("n")
    if n is not None:
        if n == 0:  # which the wire takes for left out
            raise InvalidRequestError("n must be an integer from 1 to 16, not 0")
        set_field(request, "n", n, "an integer from 1 to 16")
    sampling = request.sampling
    for name, meaning in _SAMPLING.items():
        value = options.get(name)
        if value is not None:
            set_field(sampling, name, value, meaning)
    stop = options.get("stop") or ()
    _extend(sampling.stop, [stop] if isinstance(stop, str) else stop, "stop", "a text or a sequence of texts")
    _extend(sampling.stop_token_ids, options.get("stop_token_ids") or (), "stop_token_ids", "a sequence of token ids")
    bias = options.get("logit_bias") or {}
    try:
        sampling.logit_bias.update(bias)
    except (TypeError, ValueError, AttributeError) as error:
        raise InvalidRequestError(f"logit_bias must be a mapping from token ids to numbers, not {bias!r}") from error
    _set_grammar(sampling, options)


def set_field(message: Any, field: str, value: object, meaning: str) -> None:
    """One field, which must be `meaning`. Raises InvalidRequestError."""
    try:
        setattr(message, field, value)
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(f"{field} must be {meaning}, not {value!r}") from error


def _extend(field: Any, values: Iterable[object], name: str, meaning: str) -> None:
    try:
        field.extend(values)
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(f"{name} must be {meaning}, not {values!r}") from error


def _set_grammar(sampling: inference_pb2.SamplingParams, options: Options) -> None:
    given = {name: value for name in _GRAMMARS if (value := options.get(name)) not in (None, False)}
    if not given:
        return
    if len(given) > 1:
        raise InvalidRequestError(f"{' and '.join(given)} were given; give one of them")
    [(name, value)] = given.items()
    if name == "choice":
        if isinstance(value, str):
            raise InvalidRequestError(f"choice must be a sequence of texts, not {value!r}")
        sampling.grammar.choice.SetInParent()
        _extend(sampling.grammar.choice.texts, value, "choice", "a sequence of texts")  # type: ignore[arg-type]
        return
    if name == "json_schema" and isinstance(value, Mapping):
        try:
            value = json.dumps(value, ensure_ascii=False)
        except (TypeError, ValueError) as error:
            raise InvalidRequestError(f"json_schema must be JSON: {error}") from error
    meaning = {"json_object": "true or false", "json_schema": "a mapping, or its JSON"}.get(name, "a text")
    set_field(sampling.grammar, name, value, meaning)
