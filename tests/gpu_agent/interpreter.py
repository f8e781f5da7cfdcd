"""Triton's interpreter, mended for NumPy 2.4 and with less work per call: kernels are tested in half the time."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from triton.language import tensor
from triton.runtime import interpreter

_patch_tensor = interpreter._patch_lang_tensor
_patch_language = interpreter._patch_lang
_dtype_of = cache(interpreter._get_np_dtype)
_ADDRESS = np.dtype(np.uint64)
_patched: set[int] = set()  # the globals of the functions for which the language is patched now


def _patch_lang_tensor(kind: type[tensor], scope: interpreter._LangPatchScope) -> None:
    """Triton 3.6 converts one-element arrays by int(), which NumPy 2.4 refuses."""
    _patch_tensor(kind, scope)
    scope.set_attr(kind, "__index__", lambda self: self.handle.data.item())


class _Scope(interpreter._LangPatchScope):
    """Of the kernel itself: with it ends what it called."""

    def restore(self) -> None:
        _patched.clear()
        super().restore()


def _patch_lang(function: Callable[..., Any]) -> interpreter._LangPatchScope:
    """Triton patches the language anew whenever one of its functions calls another."""
    scope = _Scope()
    if id(function.__globals__) not in _patched:
        _patched.add(id(function.__globals__))
        scope._changes = _patch_language(function)._changes
    return scope


def _get_np_dtype(dtype: Any) -> np.dtype[Any]:
    """Triton makes a table of all of them each time."""
    kind = dtype.scalar
    return _ADDRESS if kind.is_ptr() else _dtype_of(kind)


interpreter._patch_lang_tensor = _patch_lang_tensor
interpreter._patch_lang = _patch_lang
interpreter._get_np_dtype = _get_np_dtype
