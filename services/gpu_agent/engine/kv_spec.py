"""How large a model's KV cache is."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class KvSpec:
    """The KV cache that a model needs. A block holds `block_tokens` tokens of one sequence, in all layers."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    block_tokens: int = 16

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's keys and values, all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        return self.bytes_per_token * self.block_tokens

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-tokens // self.block_tokens)

    def slots_per_page(self, page_bytes: int) -> int:
        """Blocks in one page. ValueError where not even one fits."""
        slots = page_bytes // self.block_bytes
        if slots == 0:
            raise ValueError(
                f"a KV block of {self.block_tokens} tokens takes {self.block_bytes} bytes, more than a page "
                f"({page_bytes}); use larger pages"
            )
        return slots
