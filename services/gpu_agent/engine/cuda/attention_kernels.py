# mypy: ignore-errors
# (Triton's language is not Python to a type checker.)
"""The Triton kernels of paged attention; attention.py launches them and says what their arguments mean.

All are safe inside CUDA graphs: grids depend on capacities only, and what changes from step to step is read from
device tensors. Softmax is computed online (Milakov and Gimelshein 2018, as in FlashAttention-2, Dao 2023) in powers of
two; decode splits a long context over programs (flash-decoding, Dao et al. 2023).

Arguments that several kernels share:
    pages, page_elements, block_elements, SLOTS_PER_PAGE: where block b is: page b // SLOTS_PER_PAGE, slot
        b % SLOTS_PER_PAGE of it
    key_start, value_start: where the layer's keys and values begin inside a block, in elements
    blocks: block numbers of all sequences, one after another
    scale: what makes a score of q.k; times log2(e) where there is no softcap. Above 0
    softcap, window, sinks: None where the layer has none
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# A row's peak before it has seen a key. Finite, so that a key tile of which the row sees nothing (scores of -inf)
# leaves the row as it was, where -inf would make NaN of -inf - -inf.
NOTHING_SEEN = tl.constexpr(-1.0e30)


@triton.jit
def _block_start(block, page_elements, block_elements, SLOTS_PER_PAGE: tl.constexpr):
    """Where blocks begin, in elements of the arena: beyond the range of int32."""
    page = (block // SLOTS_PER_PAGE).to(tl.int64)
    return page * page_elements + (block % SLOTS_PER_PAGE).to(tl.int64) * block_elements


@triton.jit
def _load_rows(base, rows, seen, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """(rows, BLOCK_D): HEAD_DIM elements from base + rows[i] on; zeros beyond, and where `seen` is not None and False.

    Zeros and not what lies there, for unused memory may hold NaN, and 0 * NaN is NaN.
    """
    dim = tl.arange(0, BLOCK_D)
    pointers = base + rows[:, None] + dim[None, :]
    if seen is not None:
        loaded = tl.load(pointers, mask=seen[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)
    elif HEAD_DIM == BLOCK_D:
        loaded = tl.load(pointers)
    else:
        loaded = tl.load(pointers, mask=(dim < HEAD_DIM)[None, :], other=0.0)
    return loaded


@triton.jit
def _absorb(acc, total, peak, query, key, value, visible, scale, softcap):
    """One step of the online softmax: rows of queries (M, D) meet keys and values (N, D).

    acc (M, D) and total (M,) are sums weighted by 2 ** (score - peak), peak (M,) being the largest score so far, in
    units of log(2). visible (M, N), or None: all.
    """
    score = tl.dot(query, tl.trans(key), input_precision="ieee")
    if softcap is not None:
        # tanh(x) = 1 - 2 / (exp(2x) + 1)
        score = (softcap * LOG2E) * (1 - 2 / (tl.exp2(score * (scale * 2 * LOG2E / softcap)) + 1))
        unit = 1.0
    else:
        unit = scale
    if visible is not None:
        score = tl.where(visible, score, float("-inf"))
    higher = tl.maximum(peak, tl.max(score, 1) * unit)
    weight = tl.exp2(score * unit - higher[:, None])
    fade = tl.exp2(peak - higher)
    total = total * fade + tl.sum(weight, 1)
    acc = tl.dot(weight.to(value.dtype), value, acc * fade[:, None], input_precision="ieee")
    return acc, total, higher


@triton.jit
def _finish(acc, total, peak, sinks, heads, inside):
    """The attention's output: acc / total, with each head's sink as one more logit in the total."""
    if sinks is not None:
        sink = tl.load(sinks + heads, mask=inside, other=0.0).to(tl.float32) * LOG2E
        higher = tl.maximum(peak, sink)
        fade = tl.exp2(peak - higher)
        acc = acc * fade[:, None]
        total = total * fade + tl.exp2(sink - higher)
    return acc / total[:, None]


@triton.jit
def decode_kernel(
    pages,
    query,
    out,
    pieces,
    blocks,
    sinks,
    partial_acc,
    partial_total,
    partial_peak,
    arrivals,
    query_token,
    query_head,
    key_start,
    value_start,
    page_elements,
    block_elements,
    scale,
    softcap,
    window,
    least_keys,
    SLOTS_PER_PAGE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr,
    GATHER: tl.constexpr,
):
    """Grid (KV_HEADS, pieces): the GROUP query heads of a KV head over one piece of a span's context.

    What the layer sees of a context is cut into as many equal pieces as `pieces` tells, or into fewer of `least_keys`
    keys; the last has from half to one and a half as many, for a piece costs more than its keys. The program that is
    last to finish of a span and head adds the pieces up, in their order, so that the result does not depend on which it
    was.
    """
    kv_head = tl.program_id(0)
    number = tl.program_id(1)
    piece = pieces + number * 5
    end = tl.load(piece + 1)
    if end == 0:
        return
    row = tl.load(piece).to(tl.int64)
    block_list = blocks + tl.load(piece + 2)
    split = tl.load(piece + 3)
    splits = tl.load(piece + 4)
    group = tl.arange(0, BLOCK_M)
    dim = tl.arange(0, BLOCK_D)
    heads = kv_head * GROUP + group
    inside = group < GROUP
    cells = inside[:, None] & (dim < HEAD_DIM)[None, :]
    out_cells = out + row * (KV_HEADS * GROUP * HEAD_DIM) + heads[:, None] * HEAD_DIM + dim[None, :]

    first = 0
    if window is not None:
        first = tl.maximum(end - window, 0)
    start = first // BLOCK_TOKENS * BLOCK_TOKENS
    part = tl.maximum(tl.cdiv(tl.cdiv(end - start, splits), BLOCK_N) * BLOCK_N, least_keys)
    parts = tl.maximum((end - start + part // 2) // part, 1)  # what is left over goes with the last of them
    if split >= parts:
        return
    low = start + split * part
    high = tl.where(split == parts - 1, end, low + part)

    q = tl.load(query + row * query_token + heads[:, None] * query_head + dim[None, :], mask=cells, other=0.0)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    peak = tl.full((BLOCK_M,), NOTHING_SEEN, tl.float32)
    key_base = pages + key_start + kv_head * HEAD_DIM
    value_base = pages + value_start + kv_head * HEAD_DIM
    # Key tiles begin with a block, so only the tile's first block and the block numbers change from turn to turn. The
    # numbers are read one turn ahead: keys and values can then be fetched as deep as the pipeline goes.
    offsets = tl.arange(0, BLOCK_N)
    entries = block_list + offsets // BLOCK_TOKENS
    in_block = (offsets % BLOCK_TOKENS) * (KV_HEADS * HEAD_DIM)
    block = tl.load(entries + low // BLOCK_TOKENS, mask=offsets < high - low, other=0)
    for at in range(low, high, BLOCK_N):
        position = at + offsets
        seen = (position >= first) & (position < high)
        places = _block_start(block, page_elements, block_elements, SLOTS_PER_PAGE) + in_block
        block = tl.load(entries + (at + BLOCK_N) // BLOCK_TOKENS, mask=offsets < high - at - BLOCK_N, other=0)
        key = _load_rows(key_base, places, seen, HEAD_DIM, BLOCK_D)
        value = _load_rows(value_base, places, seen, HEAD_DIM, BLOCK_D)
        acc, total, peak = _absorb(acc, total, peak, q, key, value, seen[None, :], scale, softcap)

    if parts == 1:
        result = _finish(acc, total, peak, sinks, heads, inside)
        tl.store(out_cells, result.to(out.dtype.element_ty), mask=cells)
        return

    lane = (number * KV_HEADS + kv_head) * GROUP + group
    tl.store(partial_acc + lane[:, None].to(tl.int64) * HEAD_DIM + dim[None, :], acc, mask=cells)
    tl.store(partial_total + lane, total, mask=inside)
    tl.store(partial_peak + lane, peak, mask=inside)
    tl.debug_barrier()  # all threads have stored before one of them says so
    pair = (number - split) * KV_HEADS + kv_head  # of the span's first piece
    arrived = tl.atomic_add(arrivals + pair, 1, sem="acq_rel")
    if arrived == parts - 1:
        tl.store(arrivals + pair, 0)  # for the next layer
        member = tl.arange(0, BLOCK_G)
        inside_g = member < GROUP
        heads_g = kv_head * GROUP + member
        cells_g = inside_g[:, None] & (dim < HEAD_DIM)[None, :]
        acc_g = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
        total_g = tl.zeros((BLOCK_G,), tl.float32)
        peak_g = tl.full((BLOCK_G,), NOTHING_SEEN, tl.float32)
        for done in range(0, parts, GATHER):
            part_number = done + tl.arange(0, GATHER)
            lanes = (pair + part_number * KV_HEADS)[:, None] * GROUP + member[None, :]
            there = (part_number < parts)[:, None] & inside_g[None, :]
            peaks = tl.load(partial_peak + lanes, mask=there, other=float("-inf"))
            totals = tl.load(partial_total + lanes, mask=there, other=0.0)
            accs = tl.load(
                partial_acc + lanes[:, :, None].to(tl.int64) * HEAD_DIM + dim[None, None, :],
                mask=there[:, :, None] & (dim < HEAD_DIM)[None, None, :],
                other=0.0,
            )
            higher = tl.maximum(peak_g, tl.max(peaks, 0))
            weight = tl.exp2(peaks - higher[None, :])
            fade = tl.exp2(peak_g - higher)
            acc_g = acc_g * fade[:, None] + tl.sum(accs * weight[:, :, None], 0)
            total_g = total_g * fade + tl.sum(totals * weight, 0)
            peak_g = higher
        result_g = _finish(acc_g, total_g, peak_g, sinks, heads_g, inside_g)
        out_g = out + row * (KV_HEADS * GROUP * HEAD_DIM) + heads_g[:, None] * HEAD_DIM + dim[None, :]
        tl.store(out_g, result_g.to(out.dtype.element_ty), mask=cells_g)


@triton.jit
def _sweep(
    acc,
    total,
    peak,
    q,
    q_position,
    key_base,
    value_base,
    block_list,
    low,
    high,
    first,
    end,
    page_elements,
    block_elements,
    scale,
    softcap,
    window,
    SLOTS_PER_PAGE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    TOKEN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EDGE: tl.constexpr,
):
    """A tile of queries over the key tiles of [low, high). EDGE: some query does not see some of the keys."""
    offsets = tl.arange(0, BLOCK_N)
    entries = block_list + offsets // BLOCK_TOKENS
    in_block = (offsets % BLOCK_TOKENS) * TOKEN
    block = tl.load(entries + low // BLOCK_TOKENS, mask=offsets < end - low, other=0)
    for at in range(low, high, BLOCK_N):
        position = at + offsets
        if EDGE:
            seen = (position >= first) & (position < end)
            visible = position[None, :] <= q_position[:, None]
            if window is not None:
                visible &= position[None, :] > q_position[:, None] - window
        else:
            seen = None
            visible = None
        places = _block_start(block, page_elements, block_elements, SLOTS_PER_PAGE) + in_block
        block = tl.load(entries + (at + BLOCK_N) // BLOCK_TOKENS, mask=offsets < end - at - BLOCK_N, other=0)
        key = _load_rows(key_base, places, seen, HEAD_DIM, BLOCK_D)
        value = _load_rows(value_base, places, seen, HEAD_DIM, BLOCK_D)
        acc, total, peak = _absorb(acc, total, peak, q, key, value, visible, scale, softcap)
    return acc, total, peak


@triton.jit
def prefill_kernel(
    pages,
    query,
    out,
    tiles,
    blocks,
    sinks,
    query_token,
    query_head,
    key_start,
    value_start,
    page_elements,
    block_elements,
    scale,
    softcap,
    window,
    SLOTS_PER_PAGE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (query heads, tiles * PARTS): one head of BLOCK_M queries, a tile being up to PARTS * BLOCK_M of them.

    The last tiles come first: they are usually those with most keys, and the longest work must not start last.
    """
    head = tl.program_id(0)
    number = tl.num_programs(1) - 1 - tl.program_id(1)
    tile = tiles + number // PARTS * 4
    before = number % PARTS * BLOCK_M
    count = tl.minimum(tl.load(tile + 1) - before, BLOCK_M)
    if count <= 0:
        return
    row = (tl.load(tile) + before).to(tl.int64)
    position = tl.load(tile + 2) + before
    block_list = blocks + tl.load(tile + 3)
    end = position + count

    lane = tl.arange(0, BLOCK_M)
    dim = tl.arange(0, BLOCK_D)
    cells = (lane < count)[:, None] & (dim < HEAD_DIM)[None, :]
    lines = row + lane
    q = tl.load(query + lines[:, None] * query_token + head * query_head + dim[None, :], mask=cells, other=0.0)
    q_position = position + lane
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    peak = tl.full((BLOCK_M,), NOTHING_SEEN, tl.float32)
    kv_head = head // GROUP
    key_base = pages + key_start + kv_head * HEAD_DIM
    value_base = pages + value_start + kv_head * HEAD_DIM

    first = 0
    if window is not None:
        first = tl.maximum(position - window + 1, 0)
    low = first // BLOCK_TOKENS * BLOCK_TOKENS
    # Key tiles before `causal` hold nothing later than the first query.
    causal = low + (position + 1 - low) // BLOCK_N * BLOCK_N
    if window is not None:
        # Key tiles from `left` on hold nothing that is too early for the last query.
        left = tl.minimum(low + tl.cdiv(tl.maximum(end - window - low, 0), BLOCK_N) * BLOCK_N, causal)
        acc, total, peak = _sweep(
            acc, total, peak, q, q_position, key_base, value_base, block_list, low, left, first, end,
            page_elements, block_elements, scale, softcap, window,
            SLOTS_PER_PAGE, BLOCK_TOKENS, KV_HEADS * HEAD_DIM, HEAD_DIM, BLOCK_N, BLOCK_D, True,
        )  # fmt: skip
        low = left
    acc, total, peak = _sweep(
        acc, total, peak, q, q_position, key_base, value_base, block_list, low, causal, first, end,
        page_elements, block_elements, scale, softcap, window,
        SLOTS_PER_PAGE, BLOCK_TOKENS, KV_HEADS * HEAD_DIM, HEAD_DIM, BLOCK_N, BLOCK_D, False,
    )  # fmt: skip
    acc, total, peak = _sweep(
        acc, total, peak, q, q_position, key_base, value_base, block_list, causal, end, first, end,
        page_elements, block_elements, scale, softcap, window,
        SLOTS_PER_PAGE, BLOCK_TOKENS, KV_HEADS * HEAD_DIM, HEAD_DIM, BLOCK_N, BLOCK_D, True,
    )  # fmt: skip
    result = _finish(acc, total, peak, sinks, head + tl.zeros((BLOCK_M,), tl.int32), lane < count)
    out_cells = out + lines[:, None] * (KV_HEADS * GROUP * HEAD_DIM) + head * HEAD_DIM + dim[None, :]
    tl.store(out_cells, result.to(out.dtype.element_ty), mask=cells)
