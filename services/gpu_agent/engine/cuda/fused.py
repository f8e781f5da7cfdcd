"""Small Triton kernels that stand for chains of elementwise operations, each one launch instead of several."""

from __future__ import annotations

import torch
import triton

from services.gpu_agent.engine.cuda.attention import PagedKv
from services.gpu_agent.engine.cuda.fused_kernels import (
    cosines_and_sines_kernel,
    gate_kernel,
    resolve_ids_kernel,
    rms_norm_kernel,
    rotate_and_store_kernel,
    store_tokens_kernel,
)

_HEADS = 8  # that one program of the rotary kernel moves


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    offset: bool,
    rounds: bool,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Root mean square normalisation over the last dimension of x, which may be (1, tokens, heads, size) with strides.

    offset: scale by 1 + weight instead of weight. rounds: round to x's dtype before scaling. With `residual` (2-D or
    3-D, contiguous like x), x + residual is normalised, and residual becomes that sum.
    """
    size = x.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    heads = x.shape[-2] if x.dim() == 4 else 1
    tokens = x.numel() // size // heads
    strides = (x.stride(-3), x.stride(-2)) if x.dim() == 4 else (x.stride(-2), 0)
    block = triton.next_power_of_2(size)
    rms_norm_kernel[(tokens, heads)](
        x,
        residual if residual is not None else x,
        weight,
        out,
        strides[0],
        strides[1],
        heads,
        eps,
        SIZE=size,
        BLOCK=block,
        OFFSET=offset,
        ROUNDS=rounds,
        ADDS=residual is not None,
        num_warps=max(1, min(16, block // 512)),
    )
    return out


def gate(fused: torch.Tensor, activation: str) -> torch.Tensor:
    """act(first half) * second half of the last dimension. activation: "silu", or "gelu_tanh"."""
    size = fused.shape[-1] // 2
    out = torch.empty((*fused.shape[:-1], size), dtype=fused.dtype, device=fused.device)
    tokens = out.numel() // size
    block = 1024
    gate_kernel[(tokens, triton.cdiv(size, block))](fused, out, SIZE=size, BLOCK=block, GELU=activation == "gelu_tanh")
    return out


def cosines_and_sines(
    positions: torch.Tensor, frequencies: torch.Tensor, scaling: float, copies: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each position (batch, tokens, integers) times each of the frequencies (n, float32), times `scaling`.

    Each (batch, tokens, copies * n) of `dtype`: the n numbers so many times, one copy behind the other. They are
    computed in float32 like transformers' own, to within 1e-6.
    """
    size = len(frequencies)
    shape = (*positions.shape, copies * size)
    cos, sin = (torch.empty(shape, dtype=dtype, device=frequencies.device) for _ in range(2))
    cosines_and_sines_kernel[(positions.numel(),)](
        positions.contiguous(),
        frequencies,
        cos,
        sin,
        scaling,
        SIZE=size,
        COPIES=copies,
        BLOCK=triton.next_power_of_2(size),
        num_warps=1,
    )
    return cos, sin


def rotate_and_store(
    kv: PagedKv,
    layer: int,
    slots: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rope: tuple[torch.Tensor, torch.Tensor] | None,
    *,
    keys_too: bool = False,
) -> None:
    """Rotates queries in place, with keys_too keys as well, and stores rotated keys, and values, in their KV blocks.

    query (tokens, heads, size), key and value (tokens, kv_heads, size), none the same memory, each head contiguous, the
    other strides free (some models' lie head by head); rope is (cos, sin), each (tokens, at least size / 2) with the
    same strides, the first half of transformers' "half-split" rotation; None where the queries and keys are rotated
    already. slots (tokens): block * block_tokens + row; -1 stores nothing. ValueError where the strides of rope differ.
    """
    tokens, heads, size = query.shape
    kv_heads = key.shape[1]
    cos, sin = rope if rope is not None else (query, query)
    if cos.stride() != sin.stride():
        raise ValueError(f"cosines and sines lie differently: their strides are {cos.stride()} and {sin.stride()}")
    block = triton.next_power_of_2(size // 2)
    sections = (triton.cdiv(heads, _HEADS) if rope is not None else 0) + 2 * triton.cdiv(kv_heads, _HEADS)
    rotate_and_store_kernel[(tokens, sections)](
        query,
        key,
        value,
        cos,
        sin,
        slots,
        kv.pages,
        query.stride(0),
        query.stride(1),
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        cos.stride(0),
        cos.stride(1),
        kv.starts(layer)[0],
        HEADS=heads,
        KV_HEADS=kv_heads,
        SIZE=size,
        HALF=block,
        ROPE=rope is not None,
        KEYS_TOO=keys_too,
        GROUP=_HEADS,
        BLOCK_TOKENS=kv.spec.block_tokens,
        BLOCK_ELEMENTS=kv.block_elements,
        PAGE_ELEMENTS=kv.page_elements,
        SLOTS_PER_PAGE=kv.slots_per_page,
        num_warps=1 if block <= 64 else 2,
    )


def resolve_ids(ids: torch.Tensor, last_tokens: torch.Tensor) -> torch.Tensor:
    """Token ids in which -1 - slot stands for the token that the slot's sequence chose in its last step (int32)."""
    out = torch.empty_like(ids)
    block = 1024
    resolve_ids_kernel[(triton.cdiv(ids.numel(), block),)](ids, last_tokens, out, ids.numel(), BLOCK=block)
    return out


def store_tokens(tokens: torch.Tensor, slots: torch.Tensor, last_tokens: torch.Tensor) -> None:
    """last_tokens[slots[i]] = tokens[i], for each of `tokens` (rows)."""
    store_tokens_kernel[(len(tokens),)](tokens, slots, last_tokens)
