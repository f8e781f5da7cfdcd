"""Enums of the protocol as words."""

from __future__ import annotations

import re

from google.protobuf.descriptor import EnumDescriptor


def enum_word(enum: EnumDescriptor, value: int) -> str:
    """An enum's value as a lower-case word: REPLICA_STATE_WARM is "warm". A newer version's is its number."""
    known = enum.values_by_number.get(value)
    if known is None:
        return str(value)
    prefix = re.sub(r"(?<!^)(?=[A-Z])", "_", enum.name).upper() + "_"
    return known.name.removeprefix(prefix).lower()
