"""OpenAI's response_format, and the wider structured_outputs beside it, as a Grammar."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from services.router.errors import invalid
from warmserve.v1 import inference_pb2


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class JsonSchema(_Strict):
    """What response_format holds beside its type. The schema always binds, as with `strict`."""

    name: str | None = None
    description: str | None = None
    json_schema: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(_Strict):
    """OpenAI's way to ask for JSON."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def grammar(self) -> inference_pb2.Grammar | None:
        """What it asks for; None where that is nothing. Raises RequestError."""
        if self.json_schema is not None and self.type != "json_schema":
            raise invalid("response_format.json_schema", f"type {self.type!r} does not take it")
        match self.type:
            case "json_object":
                return inference_pb2.Grammar(json_object=True)
            case "json_schema":
                if self.json_schema is None or self.json_schema.json_schema is None:
                    raise invalid("response_format.json_schema.schema", "it is missing")
                return inference_pb2.Grammar(json_schema=_text(self.json_schema.json_schema))
        return None


class StructuredOutputs(_Strict):
    """Constraints that OpenAI has no words for. Exactly one is given."""

    json_schema: dict[str, Any] | str | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    grammar: str | None = None
    choice: list[str] | None = None

    def as_grammar(self) -> inference_pb2.Grammar:
        """What it asks for. Raises RequestError."""
        given = [name for name, value in self if value is not None]
        if len(given) != 1:
            raise invalid("structured_outputs", "give exactly one of json, json_object, regex, grammar and choice")
        match given[0]:
            case "json_schema":
                return inference_pb2.Grammar(json_schema=_text(self.json_schema))
            case "json_object":
                return inference_pb2.Grammar(json_object=bool(self.json_object))
            case "regex":
                return inference_pb2.Grammar(regex=self.regex or "")
            case "grammar":
                return inference_pb2.Grammar(ebnf=self.grammar or "")
        return inference_pb2.Grammar(choice=inference_pb2.Choices(texts=self.choice))


def _text(schema: object) -> str:
    return schema if isinstance(schema, str) else json.dumps(schema, ensure_ascii=False, separators=(",", ":"))
