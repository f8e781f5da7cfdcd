"""Bodies of the OpenAI-compatible door, and how they become calls. What is not served is refused by name."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, ValidationError
from pydantic_core import from_json

from services.router.errors import RequestError, invalid
from services.router.openai_grammar import ResponseFormat, StructuredOutputs
from services.router.sampling_rules import MAX_TOP_LOGPROBS, check_number
from services.router.validation import MAX_ANSWERS, Call, Conversation, Input
from warmserve.v1 import inference_pb2

_MOST = 2**31 - 1
_MOST_TOKEN_ID = 2**32 - 1
_COMPLETION_TOKENS = 16  # what OpenAI's completions generate when max_tokens is left out

# OpenAI's parameters that this version does not serve, with the values that ask for nothing beyond what is done anyway.
_NOT_SERVED: dict[str, tuple[object, ...]] = {
    "service_tier": ("auto", "default"),
    "store": (False,),
}
_CHAT_NOT_SERVED: dict[str, tuple[object, ...]] = _NOT_SERVED | {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "moderation": (),
    "prompt_cache_retention": (),
}
_COMPLETION_NOT_SERVED: dict[str, tuple[object, ...]] = _NOT_SERVED | {
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
}


def _one_or_many(value: object) -> object:
    return [] if value is None else [value] if isinstance(value, str) else value


def _content(value: object) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("give a text, or a list of parts of type 'text'")  # noqa: TRY004, pydantic wants ValueError
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str) or set(part) != {"type", "text"}:
            raise ValueError(f"only parts {{'type': 'text', 'text': ...}} are served, not {str(kind or part)[:64]!r}")
        texts.append(part["text"])
    return "".join(texts)


def _prompt(value: object) -> str | list[int]:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]  # a batch of one
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(item, int) and not isinstance(item, bool) for item in value):
        return value
    if isinstance(value, list) and all(isinstance(item, str | list) for item in value):
        raise ValueError(f"{len(value)} prompts given; this version takes one a request")
    raise ValueError("give a text or a list of token ids")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Strict):
    """What a stream has beside the text."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # padding against traffic analysis: never sent


class ChatMessage(_Strict):
    """One message; the fields of an assistant's earlier answer may come back as long as they are empty."""

    role: str
    content: Annotated[str, PlainValidator(_content)]
    name: None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[None, BeforeValidator(lambda value: value or None)] = None
    annotations: Annotated[None, BeforeValidator(lambda value: value or None)] = None


class Body(_Strict):
    """What both endpoints take."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: Annotated[list[str], BeforeValidator(_one_or_many)] = Field(default_factory=list)
    n: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    # Beyond OpenAI's, as in our gRPC contract.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: list[int] | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    structured_outputs: StructuredOutputs | None = None
    # Taken and not used: they are for the provider's own records.
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self, max_tokens: int | None) -> inference_pb2.SamplingParams:
        """The sampling parameters. Raises RequestError where a number does not fit."""
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options", "only a request with stream=true takes it")
        sampling = inference_pb2.SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            stop=self.stop,
            ignore_eos=bool(self.ignore_eos),
        )
        if max_tokens is not None:
            sampling.max_tokens = _count("max_tokens", max_tokens, least=1)
        if self.top_k is not None:
            sampling.top_k = _count("top_k", self.top_k, least=0)
        if self.min_tokens is not None:
            sampling.min_tokens = _count("min_tokens", self.min_tokens, least=0)
        for token in self.stop_token_ids or ():
            sampling.stop_token_ids.append(_count("stop_token_ids", token, least=0, most=_MOST_TOKEN_ID))
        for name, bias in (self.logit_bias or {}).items():
            sampling.logit_bias[_token_id("logit_bias", name)] = bias
        if self.seed is not None:
            check_number("seed", self.seed, -(2**63), 2**64 - 1)
            sampling.seed = self.seed % 2**64
        if self.structured_outputs is not None:
            sampling.grammar.CopyFrom(self.structured_outputs.as_grammar())
        return sampling

    def answers(self) -> int:
        """How many answers are asked for. Raises RequestError."""
        return 1 if self.n is None else _count("n", self.n, least=1, most=MAX_ANSWERS)


class ChatBody(Body):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: ResponseFormat | None = None

    def call(self, timeout_s: float, request_id: str) -> Call:
        """The body as a call. Raises RequestError."""
        most = self.max_completion_tokens
        if most is None:
            most = self.max_tokens
        elif self.max_tokens not in (None, most):
            raise invalid("max_tokens", "it differs from max_completion_tokens; give one of them")
        sampling = self.sampling(most)
        if self.logprobs:
            sampling.logprobs = _count("top_logprobs", self.top_logprobs or 0, least=0, most=MAX_TOP_LOGPROBS)
        elif self.top_logprobs:
            raise invalid("top_logprobs", "only a request with logprobs=true takes it")
        grammar_name = "structured_outputs"
        if self.response_format is not None and (grammar := self.response_format.grammar()) is not None:
            if sampling.HasField("grammar"):
                raise invalid("structured_outputs", "give it or response_format, not both")
            grammar_name = "response_format"
            sampling.grammar.CopyFrom(grammar)
        return Call(
            self.model,
            self._conversation(),
            "messages",
            sampling,
            timeout_s,
            request_id,
            n=self.answers(),
            grammar_name=grammar_name,
        )

    def _conversation(self) -> Conversation:
        return Conversation(
            [
                # OpenAI's newer name for the same role.
                {"role": "system" if item.role == "developer" else item.role, "content": item.content}
                for item in self.messages
            ]
        )


class CompletionBody(Body):
    """POST /v1/completions."""

    prompt: Annotated[Any, PlainValidator(_prompt)]
    logprobs: int | None = None

    def call(self, timeout_s: float, request_id: str) -> Call:
        """The body as a call. Raises RequestError."""
        most = _COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens
        given: Input = self.prompt
        sampling = self.sampling(most)
        if self.logprobs is not None:
            sampling.logprobs = _count("logprobs", self.logprobs, least=0, most=MAX_TOP_LOGPROBS)
        return Call(
            self.model,
            given,
            "prompt",
            sampling,
            timeout_s,
            request_id,
            n=self.answers(),
            grammar_name="structured_outputs",
        )


B = TypeVar("B", bound=Body)


def parse(kind: type[B], data: bytes) -> B:
    """A body from JSON. Raises RequestError that names the parameter that is wrong."""
    try:
        fields = from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise invalid("body", f"it is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise invalid("body", "it must be a JSON object")
    not_served = _CHAT_NOT_SERVED if kind is ChatBody else _COMPLETION_NOT_SERVED
    for name in not_served.keys() & fields.keys():
        value = fields.pop(name)
        if value is not None and not any(_same(value, neutral) for neutral in not_served[name]):
            raise invalid(name, "this version does not serve it; leave it out")
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise _refusal(kind, error) from error


def _same(value: object, neutral: object) -> bool:
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def _count(name: str, value: int, least: int, most: int = _MOST) -> int:
    if not least <= value <= most:
        raise invalid(name, f"{str(value)[:32]} is not between {least} and {most:,}")
    return value


def _token_id(name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(_MOST_TOKEN_ID))):
        raise invalid(name, f"{text[:32]!r} is no token id")
    return _count(name, int(text), least=0, most=_MOST_TOKEN_ID)


def _refusal(kind: type[Body], error: ValidationError) -> RequestError:
    first = error.errors()[0]
    where = ""
    for part in first["loc"]:
        where += f"[{part}]" if isinstance(part, int) else f".{part}" if where else str(part)
    where = where[:256]
    match first["type"]:
        case "extra_forbidden":
            near = difflib.get_close_matches(where, kind.model_fields, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            return invalid(where, f"there is no such parameter{hint}")
        case "missing":
            return invalid(where, "it is missing")
        case "none_required":
            return invalid(where, "this version does not serve it; leave it out")
    return invalid(where, first["msg"].removeprefix("Value error, "))
