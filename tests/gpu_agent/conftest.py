"""Tests marked gpu run where there is a GPU; elsewhere Triton's kernels run in its CPU interpreter."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which this file is before

    from triton.language import tensor
    from triton.runtime import interpreter

    _patch = interpreter._patch_lang_tensor

    def _patch_lang_tensor(kind: type[tensor], scope: interpreter._LangPatchScope) -> None:
        """Triton 3.6 converts one-element arrays by int(), which NumPy 2.4 refuses."""
        _patch(kind, scope)
        scope.set_attr(kind, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = _patch_lang_tensor


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
