"""The checksum of a page: 64 bits, as fast as memory on a CPU and on a GPU.

The page is taken as int64 words in blocks of 4 KiB; the sum of block i counts 2i + 1 times, and all wraps at 2^64. An
odd weight loses no bit, so a change within one word is always found, and blocks that were swapped change the sum too;
other damage goes unseen with a chance of about 2^-64.
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


def device_sum(page: torch.Tensor) -> torch.Tensor:
    """The same of a page (uint8) on a device, as an int64 there; it is begun on the current stream."""
    blocks = page.view(torch.int64).view(-1, _WORDS).sum(1)
    return (blocks * _device_weights(len(blocks), page.device)).sum()


def prepare_sums(page_bytes: int, device: torch.device) -> None:
    """Has what `device_sum` needs there for pages of this size: weights, kernels, and memory on the current stream."""
    _device_weights(page_bytes // (8 * _WORDS), device)
    device_sum(torch.zeros(8 * _WORDS, dtype=torch.uint8, device=device))


@cache
def _weights(blocks: int) -> NDArray[np.int64]:
    return np.arange(1, 2 * blocks, 2, dtype=np.int64)


@cache
def _device_weights(blocks: int, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(_weights(blocks)).to(device)
