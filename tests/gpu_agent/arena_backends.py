"""The memories that an arena can lie on, for tests that must hold on each of them."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from services.gpu_agent.arena.host import HostMemory
from services.gpu_agent.arena.memory import Memory
from services.gpu_agent.arena.weight_range import WeightRange


@dataclass(frozen=True)
class Backend:
    """A kind of memory; its page is the smallest that it can have."""

    page: int  # bytes
    memory: Callable[[int], Memory]  # of so many pages
    mapped: Callable[[int], bool]  # whether an address has memory behind it, as the system sees it
    settle: Callable[[], None]  # returns when nothing computes any more, as unmapping asks for

    @property
    def per_page(self) -> int:
        """float32 numbers in a page."""
        return self.page // 4


def append(weights: WeightRange, fill: Callable[[int, torch.Tensor], None]) -> None:
    """Has `fill(index, page)` write one more page of a range, uint8; then it is resident."""
    with weights.filling() as filling:
        (page,) = filling.map(1)
        fill(filling.first, page)
        filling.done()


def _host_mapped(address: int) -> bool:
    """rw-s is shared memory that may be touched, ---p a reservation."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, permissions = line.split()[:2]
        begin, end = (int(part, 16) for part in span.split("-"))
        if begin <= address < end:
            return permissions == "rw-s"
    return False


def _cuda_mapped(address: int) -> bool:
    from cuda.bindings import driver

    code, handle = driver.cuMemRetainAllocationHandle(address)
    if code != driver.CUresult.CUDA_SUCCESS:
        return False
    assert driver.cuMemRelease(handle) == (driver.CUresult.CUDA_SUCCESS,)
    return True


def _cuda_memory(num_pages: int) -> Memory:
    from services.gpu_agent.arena.cuda import CudaMemory

    return CudaMemory(CUDA.page, num_pages, 0)


HOST = Backend(mmap.PAGESIZE, lambda num_pages: HostMemory(mmap.PAGESIZE, num_pages), _host_mapped, lambda: None)
CUDA = Backend(2 << 20, _cuda_memory, _cuda_mapped, lambda: torch.cuda.synchronize())
EACH = [pytest.param(HOST, id="host"), pytest.param(CUDA, id="cuda", marks=pytest.mark.gpu)]
