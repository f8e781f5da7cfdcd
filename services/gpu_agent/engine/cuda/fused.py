"""Small Triton kernels that stand for chains of elementwise operations, each one launch instead of several."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from services.gpu_agent.engine.kv_spec import KvSpec

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
    _rms_norm[(tokens, heads)](
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


@triton.jit
def _rms_norm(
    x,  # type: ignore[no-untyped-def]
    residual,
    weight,
    out,
    token_stride,
    head_stride,
    heads,
    eps,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUNDS: tl.constexpr,
    ADDS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    columns = tl.arange(0, BLOCK)
    inside = columns < SIZE
    dtype = out.dtype.element_ty
    values = tl.load(x + token * token_stride + head * head_stride + columns, mask=inside, other=0.0).to(tl.float32)
    row = (token * heads + head) * SIZE
    if ADDS:
        values += tl.load(residual + row + columns, mask=inside, other=0.0).to(tl.float32)
        values = values.to(dtype).to(tl.float32)
        tl.store(residual + row + columns, values.to(dtype), mask=inside)
    scale = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    if OFFSET:
        scale += 1.0
    normed = values * tl.rsqrt(tl.sum(values * values, 0) / SIZE + eps)
    if ROUNDS:
        normed = normed.to(dtype).to(tl.float32)
    tl.store(out + row + columns, (normed * scale).to(dtype), mask=inside)


def gate(fused: torch.Tensor, activation: str) -> torch.Tensor:
    """act(first half) * second half of the last dimension. activation: "silu", or "gelu_tanh"."""
    size = fused.shape[-1] // 2
    out = torch.empty((*fused.shape[:-1], size), dtype=fused.dtype, device=fused.device)
    tokens = out.numel() // size
    block = 1024
    _gate[(tokens, triton.cdiv(size, block))](fused, out, SIZE=size, BLOCK=block, GELU=activation == "gelu_tanh")
    return out


@triton.jit
def _gate(fused, out, SIZE: tl.constexpr, BLOCK: tl.constexpr, GELU: tl.constexpr):  # type: ignore[no-untyped-def]
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < SIZE
    dtype = out.dtype.element_ty
    g = tl.load(fused + token * 2 * SIZE + columns, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(fused + token * 2 * SIZE + SIZE + columns, mask=inside, other=0.0).to(tl.float32)
    # tanh(z) = 2 * sigmoid(2 z) - 1
    a = g * tl.sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g) if GELU else g)
    # Rounded as the separate activation would be.
    tl.store(out + token * SIZE + columns, (a.to(dtype).to(tl.float32) * u).to(dtype), mask=inside)


def rotate_and_store(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rope: tuple[torch.Tensor, torch.Tensor] | None,
    slots: torch.Tensor,
    pages: torch.Tensor,
    layer: int,
    spec: KvSpec,
    page_elements: int,
    slots_per_page: int,
) -> None:
    """Rotates queries in place, and stores rotated keys, and values, in their KV blocks.

    query (tokens, heads, size), key and value (tokens, kv_heads, size), tokens' stride free, heads contiguous; rope is
    (cos, sin), each (tokens, at least size / 2), the first half of transformers' "half-split" rotation; None where the
    queries and keys are rotated already. slots (tokens): block * block_tokens + row; -1 stores nothing.
    """
    tokens, heads, size = query.shape
    kv_heads = key.shape[1]
    cos, sin = rope if rope is not None else (query, query)
    block = triton.next_power_of_2(size // 2)
    sections = (triton.cdiv(heads, _HEADS) if rope is not None else 0) + 2 * triton.cdiv(kv_heads, _HEADS)
    _rotate_and_store[(tokens, sections)](
        query,
        key,
        value,
        cos,
        sin,
        slots,
        pages,
        query.stride(0),
        key.stride(0),
        value.stride(0),
        cos.stride(0),
        layer * 2 * spec.block_tokens * kv_heads * size,
        HEADS=heads,
        KV_HEADS=kv_heads,
        SIZE=size,
        HALF=block,
        ROPE=rope is not None,
        GROUP=_HEADS,
        BLOCK_TOKENS=spec.block_tokens,
        BLOCK_ELEMENTS=spec.block_bytes // spec.dtype.itemsize,
        PAGE_ELEMENTS=page_elements,
        SLOTS_PER_PAGE=slots_per_page,
        num_warps=1 if block <= 64 else 2,
    )


@triton.jit
def _rotate_and_store(
    query,  # type: ignore[no-untyped-def]
    key,
    value,
    cos,
    sin,
    slots,
    pages,
    query_stride,
    key_stride,
    value_stride,
    rope_stride,
    layer_offset,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    HALF: tl.constexpr,
    ROPE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ELEMENTS: tl.constexpr,
    PAGE_ELEMENTS: tl.constexpr,
    SLOTS_PER_PAGE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    section = tl.program_id(1)
    query_sections: tl.constexpr = (HEADS + GROUP - 1) // GROUP if ROPE else 0
    kv_sections: tl.constexpr = (KV_HEADS + GROUP - 1) // GROUP
    columns = tl.arange(0, HALF)[None, :]
    inside = columns < SIZE // 2
    slot = tl.load(slots + token)
    if section < query_sections:
        heads = section * GROUP + tl.arange(0, GROUP)[:, None]
        mask = inside & (heads < HEADS)
        base = query + token * query_stride + heads * SIZE + columns
        c = tl.load(cos + token * rope_stride + columns, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(sin + token * rope_stride + columns, mask=inside, other=0.0).to(tl.float32)
        low = tl.load(base, mask=mask, other=0.0).to(tl.float32)
        high = tl.load(base + SIZE // 2, mask=mask, other=0.0).to(tl.float32)
        tl.store(base, (low * c - high * s).to(query.dtype.element_ty), mask=mask)
        tl.store(base + SIZE // 2, (high * c + low * s).to(query.dtype.element_ty), mask=mask)
    elif slot >= 0:
        kv_section = section - query_sections
        is_value = kv_section >= kv_sections
        heads = (kv_section % kv_sections) * GROUP + tl.arange(0, GROUP)[:, None]
        mask = inside & (heads < KV_HEADS)
        block = (slot // BLOCK_TOKENS).to(tl.int64)
        target = block // SLOTS_PER_PAGE * PAGE_ELEMENTS + block % SLOTS_PER_PAGE * BLOCK_ELEMENTS
        target += layer_offset + slot % BLOCK_TOKENS * (KV_HEADS * SIZE)
        at = heads * SIZE + columns
        source = key + token * key_stride
        if is_value:
            source = value + token * value_stride
        low = tl.load(source + at, mask=mask, other=0.0).to(tl.float32)
        high = tl.load(source + at + SIZE // 2, mask=mask, other=0.0).to(tl.float32)
        if is_value:
            target += BLOCK_TOKENS * KV_HEADS * SIZE
        elif ROPE:
            c = tl.load(cos + token * rope_stride + columns, mask=inside, other=0.0).to(tl.float32)
            s = tl.load(sin + token * rope_stride + columns, mask=inside, other=0.0).to(tl.float32)
            turned = low * c - high * s
            high = high * c + low * s
            low = turned
        tl.store(pages + target + at, low.to(pages.dtype.element_ty), mask=mask)
        tl.store(pages + target + at + SIZE // 2, high.to(pages.dtype.element_ty), mask=mask)


def resolve_ids(ids: torch.Tensor, last_tokens: torch.Tensor) -> torch.Tensor:
    """Token ids in which -1 - slot stands for the token that the slot's sequence chose in its last step (int32)."""
    out = torch.empty_like(ids)
    block = 1024
    _resolve_ids[(triton.cdiv(ids.numel(), block),)](ids, last_tokens, out, ids.numel(), BLOCK=block)
    return out


@triton.jit
def _resolve_ids(ids, last_tokens, out, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    token = tl.load(ids + at, mask=inside, other=0)
    chosen = tl.load(last_tokens + (-1 - token), mask=inside & (token < 0), other=0)
    tl.store(out + at, tl.where(token < 0, chosen, token), mask=inside)


def store_tokens(tokens: torch.Tensor, slots: torch.Tensor, last_tokens: torch.Tensor) -> None:
    """last_tokens[slots[i]] = tokens[i], for each of `tokens` (rows)."""
    _store_tokens[(len(tokens),)](tokens, slots, last_tokens)


@triton.jit
def _store_tokens(tokens, slots, last_tokens):  # type: ignore[no-untyped-def]
    row = tl.program_id(0)
    tl.store(last_tokens + tl.load(slots + row), tl.load(tokens + row).to(tl.int32))
