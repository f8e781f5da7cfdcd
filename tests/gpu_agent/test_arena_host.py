"""The arena on a memfd: nothing is left behind, and no more is taken than there is."""

from __future__ import annotations

import gc
import mmap
import os
from pathlib import Path

import pytest
import torch

from services.gpu_agent.arena.arena import Arena
from services.gpu_agent.arena.host import HostMemory

torch.set_num_threads(1)

PAGE = mmap.PAGESIZE
TOTAL = 10


def mappings() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:warmserve-arena")


def descriptors() -> int:
    links = (
        os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if os.path.lexists(f"/proc/self/fd/{fd}")
    )
    return sum("memfd:warmserve-arena" in link for link in links)


def test_closing_leaves_no_mapping_and_no_descriptor() -> None:
    gc.collect()
    before = mappings(), descriptors()
    for _ in range(3):
        arena = Arena(HostMemory(PAGE, TOTAL))
        weights = arena.add_weights("m", 4 * PAGE)
        tensor = weights.tensor(torch.float32, (PAGE // 4,), 0)
        kv = arena.kv_view(torch.float32)
        weights.grow(2)
        arena.take_kv("i", 3)
        assert mappings() > before[0]
        arena.close()
        arena.close()
        assert descriptors() == before[1]
        del arena, weights, tensor, kv
        gc.collect()
        assert (mappings(), descriptors()) == before


@pytest.mark.parametrize(
    ("page_bytes", "num_pages", "message"),
    [(PAGE + 1, 1, "multiple of"), (0, 1, "multiple of"), (PAGE, 0, "at least one page")],
)
def test_sizes_that_make_no_arena_are_refused(page_bytes: int, num_pages: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HostMemory(page_bytes, num_pages)


def test_more_memory_than_the_machine_has_is_refused_before_it_is_taken() -> None:
    before = descriptors()
    with pytest.raises(MemoryError, match="configure a smaller arena"):
        HostMemory(1 << 30, 1 << 20)
    assert descriptors() == before
