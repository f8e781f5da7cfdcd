"""Tests marked gpu run where there is a GPU; elsewhere Triton's kernels run in its CPU interpreter."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    importlib.import_module("tests.gpu_agent.interpreter")  # before anything imports Triton


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
