"""The checksum of a page: 64 bits, as fast as memory on a CPU and on a GPU.

The page is taken as int64 words in blocks of 4 KiB; the sum of block i counts 2i + 1 times, and all wraps at 2^64. An
odd weight loses no bit, so a change within one word is always found, and blocks that were swapped change the sum too;
random content goes unseen with a chance of about 2^-64. Two opposite flips of the same bit in one block cancel out.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

_WORDS = 512  # of a block


def host_sum(page: memoryview) -> int:
    """The sum of a page in host memory, whole blocks of 4 KiB. One thread, without the interpreter lock."""
    blocks = np.frombuffer(page, np.int64).reshape(-1, _WORDS).sum(1)
    return int(np.dot(blocks, _weights(len(blocks))))


def device_sums(pages: torch.Tensor) -> torch.Tensor:
    """The same of pages (n, page_bytes), uint8, on a device: (n,) int64 there. They are begun on the current stream."""
    blocks = pages.view(torch.int64).view(len(pages), -1, _WORDS).sum(2)
    return (blocks * _device_weights(blocks.shape[1], pages.device)).sum(1)


def prepare_sums(page_bytes: int, most: int, device: torch.device) -> None:
    """Has what `device_sums` needs there for so many pages of this size: weights, kernels, memory on this stream."""
    _device_weights(page_bytes // (8 * _WORDS), device)
    blocks = torch.zeros(most, page_bytes // (8 * _WORDS), dtype=torch.int64, device=device)
    (blocks * _device_weights(blocks.shape[1], device)).sum(1)
    device_sums(torch.zeros(1, 8 * _WORDS, dtype=torch.uint8, device=device))


@cache
def _weights(blocks: int) -> NDArray[np.int64]:
    return np.arange(1, 2 * blocks, 2, dtype=np.int64)


@cache
def _device_weights(blocks: int, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(_weights(blocks)).to(device)
