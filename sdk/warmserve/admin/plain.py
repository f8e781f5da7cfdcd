"""Protobuf messages as plain values for JSON: numbers stay numbers, enums become words, nothing is left out."""

from __future__ import annotations

from typing import Any

from google.protobuf.message import Message

from warmserve._enums import enum_word

Plain = dict[str, Any]


def plain(message: Message) -> Plain:
    """A message as a dictionary by field name. A message field or an optional one that is not set is None."""
    return {field.name: _field(message, field) for field in message.DESCRIPTOR.fields}


def _field(message: Message, field: Any) -> Any:
    value = getattr(message, field.name)
    if field.is_repeated:
        return [_value(field, item) for item in value]
    if field.has_presence and not message.HasField(field.name):
        return None
    return _value(field, value)


def _value(field: Any, value: Any) -> Any:
    if field.message_type is not None:
        return plain(value)
    if field.enum_type is not None:
        return enum_word(field.enum_type, value)
    return value
