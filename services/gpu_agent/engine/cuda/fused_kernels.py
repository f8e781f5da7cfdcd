# mypy: ignore-errors
# (Triton's language is not Python to a type checker.)
"""The Triton kernels of fused.py, which launches them and says what their arguments mean."""

import triton
import triton.language as tl


@triton.jit
def rms_norm_kernel(
    x,
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


@triton.jit
def gate_kernel(fused, out, SIZE: tl.constexpr, BLOCK: tl.constexpr, GELU: tl.constexpr):
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


@triton.jit
def cosines_and_sines_kernel(
    positions, frequencies, cos, sin, scaling, SIZE: tl.constexpr, COPIES: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < SIZE
    frequency = tl.load(frequencies + columns, mask=inside, other=0.0).to(tl.float32)
    angle = tl.load(positions + token).to(tl.float32) * frequency
    c = (tl.cos(angle) * scaling).to(cos.dtype.element_ty)
    s = (tl.sin(angle) * scaling).to(sin.dtype.element_ty)
    for copy in tl.static_range(COPIES):
        at = token * (COPIES * SIZE) + copy * SIZE + columns
        tl.store(cos + at, c, mask=inside)
        tl.store(sin + at, s, mask=inside)


@triton.jit
def rotate_and_store_kernel(
    query,
    key,
    value,
    cos,
    sin,
    slots,
    pages,
    query_stride,
    query_head_stride,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    rope_stride,
    rope_column_stride,
    layer_offset,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    HALF: tl.constexpr,
    ROPE: tl.constexpr,
    KEYS_TOO: tl.constexpr,
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
        base = query + token * query_stride + heads * query_head_stride + columns
        c = tl.load(cos + token * rope_stride + columns * rope_column_stride, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(sin + token * rope_stride + columns * rope_column_stride, mask=inside, other=0.0).to(tl.float32)
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
        source = key + token * key_stride + heads * key_head_stride + columns
        if is_value:
            source = value + token * value_stride + heads * value_head_stride + columns
        low = tl.load(source, mask=mask, other=0.0).to(tl.float32)
        high = tl.load(source + SIZE // 2, mask=mask, other=0.0).to(tl.float32)
        if is_value:
            target += BLOCK_TOKENS * KV_HEADS * SIZE
        elif ROPE:
            c = tl.load(cos + token * rope_stride + columns * rope_column_stride, mask=inside, other=0.0).to(tl.float32)
            s = tl.load(sin + token * rope_stride + columns * rope_column_stride, mask=inside, other=0.0).to(tl.float32)
            turned = low * c - high * s
            high = high * c + low * s
            low = turned
            if KEYS_TOO:
                tl.store(source, low.to(key.dtype.element_ty), mask=mask)
                tl.store(source + SIZE // 2, high.to(key.dtype.element_ty), mask=mask)
        tl.store(pages + target + at, low.to(pages.dtype.element_ty), mask=mask)
        tl.store(pages + target + at + SIZE // 2, high.to(pages.dtype.element_ty), mask=mask)


@triton.jit
def resolve_ids_kernel(ids, last_tokens, out, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    token = tl.load(ids + at, mask=inside, other=0)
    chosen = tl.load(last_tokens + (-1 - token), mask=inside & (token < 0), other=0)
    tl.store(out + at, tl.where(token < 0, chosen, token), mask=inside)


@triton.jit
def store_tokens_kernel(tokens, slots, last_tokens):
    row = tl.program_id(0)
    tl.store(last_tokens + tl.load(slots + row), tl.load(tokens + row).to(tl.int32))
