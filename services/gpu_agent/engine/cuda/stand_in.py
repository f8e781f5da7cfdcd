"""Copies of modules to be judged by what they compute (see rewrite.py)."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn


def stand_in(part: nn.Module) -> Any:
    """A copy of a module whose children, parameters and buffers can be replaced without touching the module."""
    twin = copy.copy(part)
    for own in ("_modules", "_parameters", "_buffers"):
        twin.__dict__[own] = dict(part.__dict__[own])
    twin.__dict__["_non_persistent_buffers_set"] = set(part._non_persistent_buffers_set)
    return twin
