"""Tests marked gpu run where there is a GPU; elsewhere Triton's kernels run in its CPU interpreter."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

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


@pytest.fixture
def own_memory() -> Iterator[None]:
    """What tests before have left is gone, and the bound that an agent sets to its process ends with the test."""
    gc.collect()
    if torch.cuda.is_available():
        torch._C._cuda_clearCublasWorkspaces()  # one for each stream that ever multiplied
        torch.cuda.empty_cache()
    yield
    if torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(1.0)
