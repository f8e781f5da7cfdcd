"""The checksum of pages: what it finds, and that all devices agree on it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.gpu_agent.weights.sums import device_sums, host_sum

BLOCK = 4096
BLOCKS = 5
BITS = BLOCKS * BLOCK * 8

pages = st.integers(0, 2**32).map(
    lambda seed: torch.randint(
        0, 256, (BLOCKS * BLOCK,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
)


def total(page: torch.Tensor) -> int:
    return host_sum(page.numpy().data)


@settings(max_examples=200, deadline=None)
@given(pages, st.integers(0, BITS - 1))
def test_any_flipped_bit_is_found(page: torch.Tensor, bit: int) -> None:
    before = total(page)
    page[bit // 8] ^= 1 << bit % 8
    assert total(page) != before


@settings(max_examples=100, deadline=None)
@given(pages, st.integers(0, BLOCKS * BLOCK - 1), st.integers(2, 2 * BLOCK), st.integers(0, 2**32))
def test_so_is_other_content(page: torch.Tensor, first: int, nbytes: int, seed: int) -> None:
    before, there = total(page), page[first : first + nbytes]
    there += torch.randint(1, 256, there.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    assert total(page) != before


@settings(max_examples=50, deadline=None)
@given(pages, st.sets(st.integers(0, BLOCKS - 1), min_size=2, max_size=2))
def test_blocks_in_each_others_place_are_found(page: torch.Tensor, both: set[int]) -> None:
    before = total(page)
    blocks = page.view(BLOCKS, BLOCK)
    one, other = both
    blocks[[one, other]] = blocks[[other, one]]
    assert total(page) != before


@pytest.mark.parametrize("size", [2 * BLOCK, BLOCK])
def test_what_was_never_written_is_found(size: int) -> None:
    page = torch.full((2 * BLOCK,), 7, dtype=torch.uint8)
    before = total(page)
    page[:size] = 0
    assert total(page) != before


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_devices_agree(device: str) -> None:
    generator = torch.Generator().manual_seed(1)
    pages = torch.randint(0, 256, (3, BLOCKS * BLOCK), dtype=torch.uint8, generator=generator)
    assert device_sums(pages.to(device)).tolist() == [total(page) for page in pages]
    assert host_sum(memoryview(bytes(2 * BLOCK))) == 0
