"""Reading and writing KV blocks in the arena's pages as tensors."""

from __future__ import annotations

from math import gcd

import torch

from services.gpu_agent.engine.kv_spec import KvSpec


class KvTensors:
    """Keys and values inside the pages.

    A block is contiguous: for each layer the keys of its tokens (block_tokens, kv_heads, head_dim), then the values.
    A page need not be a multiple of a block, nor of a token's keys. So places are counted in units: the largest size
    that divides both the page and what is moved at once. It nearly always is what is moved at once, which makes every
    access one `index_select` or `index_copy_` of whole rows, several times as fast as indexing by (page, slot).
    """

    def __init__(self, pages: torch.Tensor, page_bytes: int, slots_per_page: int, spec: KvSpec) -> None:
        """`pages`: all pages of the arena as one 1-D tensor of the spec's dtype."""
        self._spec = spec
        self._slots_per_page = slots_per_page
        self._page_elements = page_bytes // spec.dtype.itemsize
        self._block_elements = spec.block_bytes // spec.dtype.itemsize
        token_elements = spec.kv_heads * spec.head_dim
        self._half_elements = spec.block_tokens * token_elements  # keys, or values, of one block in one layer
        self._read_unit = gcd(self._page_elements, self._half_elements)
        self._write_unit = gcd(self._page_elements, token_elements)
        self._by_block = pages.view(-1, self._read_unit)
        self._by_token = pages.view(-1, self._write_unit)
        self._by_page = pages.view(-1, self._page_elements)
        self._block_units = torch.arange(self._half_elements // self._read_unit, device=pages.device)
        self._token_units = torch.arange(token_elements // self._write_unit, device=pages.device)

    def clear(self, page: int) -> None:
        """Fills a page with zeros."""
        self._by_page[page].zero_()

    def block_index(self, blocks: torch.Tensor) -> torch.Tensor:
        """Where `read` finds blocks (any shape, int64): made once per step, used for every layer."""
        start = self._start(blocks) // self._read_unit
        return start.unsqueeze(-1) + self._block_units

    def token_index(self, blocks: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Where `write` puts tokens (1-D, int64): token i is number slots[i] of block blocks[i]."""
        token_elements = self._spec.kv_heads * self._spec.head_dim
        start = (self._start(blocks) + slots * token_elements) // self._write_unit
        return (start.unsqueeze(-1) + self._token_units).flatten()

    def read(self, layer: int, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of sequences, each (sequences, blocks * block_tokens, kv_heads, head_dim), copied.

        `index` is block_index of (sequences, blocks).
        """
        shape = (index.shape[0], -1, self._spec.kv_heads, self._spec.head_dim)
        flat = index.flatten()
        keys = self._by_block.index_select(0, flat + 2 * layer * self._half_elements // self._read_unit)
        values = self._by_block.index_select(0, flat + (2 * layer + 1) * self._half_elements // self._read_unit)
        return keys.view(shape), values.view(shape)

    def write(self, layer: int, index: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Stores keys and values, each (tokens, kv_heads, head_dim), at token_index places."""
        offset = 2 * layer * self._half_elements // self._write_unit
        self._by_token.index_copy_(0, index + offset, keys.reshape(-1, self._write_unit))
        offset += self._half_elements // self._write_unit
        self._by_token.index_copy_(0, index + offset, values.reshape(-1, self._write_unit))

    def _start(self, blocks: torch.Tensor) -> torch.Tensor:
        pages = torch.div(blocks, self._slots_per_page, rounding_mode="floor")
        return pages * self._page_elements + blocks % self._slots_per_page * self._block_elements
