# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
# (Triton's kernels are not Python to a type checker.)
"""Drawing tokens on a GPU: one Triton program per row, reading the row's logits from end to end a few times.

What it computes is what sampling.draw_on_cpu does, in float32. Sums run in an order that depends on the vocabulary's
size alone, so a row gets the same token in any batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Logits read at a time, and the warps that read them; a power of two.
BLOCK = 8192
# The filters keep three sums for each logit of a block in registers.
FILTER_BLOCK = 4096
WARPS = 16


def draw(logits: torch.Tensor, settings: torch.Tensor, filtered: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The chosen token of each row, (rows,) int64, and whether its logits are finite, (rows,) bool.

    `logits` (rows, vocabulary) is contiguous float32, `settings` (rows, 5) float64 as in SamplingBatch, `filtered`
    whether any drawn row has a top_k or a top_p. Where every logit is minus infinity, or any is not finite, the token
    is 0. One kernel on the current stream; nothing is waited for, and it may be captured in a graph.
    """
    rows, vocabulary = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    finite = torch.empty(rows, dtype=torch.bool, device=logits.device)
    if rows:
        _draw[(rows,)](
            logits,
            settings,
            tokens,
            finite,
            vocabulary,
            FILTERED=filtered,
            BLOCK=BLOCK,
            BLOCKS=triton.next_power_of_2(triton.cdiv(vocabulary, BLOCK)),
            FILTER_BLOCK=FILTER_BLOCK,
            num_warps=WARPS,
        )
    return tokens, finite


@triton.jit
def _draw(
    logits,
    settings,
    tokens,
    finite,
    VOCABULARY: tl.constexpr,
    FILTERED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    FILTER_BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    logits += row.to(tl.int64) * VOCABULARY
    settings += row * 5
    peak, token, sound = _peak(logits, VOCABULARY, BLOCK)
    token = tl.where(sound, token, 0)
    tl.store(finite + row, sound)
    temperature = tl.load(settings).to(tl.float32)
    if sound & (temperature > 0):
        # exp((x - peak) / temperature) = exp2((x - peak) * scale)
        scale = 1.4426950408889634 / temperature
        lowest = tl.full((), -float("inf"), tl.float32)
        if FILTERED:
            top_k = tl.load(settings + 1).to(tl.int32)
            top_p = tl.load(settings + 2).to(tl.float32)
            lowest = _filter(logits, VOCABULARY, peak, scale, top_k, top_p, FILTER_BLOCK)
        min_p = tl.load(settings + 3).to(tl.float32)
        if min_p > 0:
            lowest = tl.maximum(lowest, peak + temperature * tl.log(min_p))
        unit = tl.load(settings + 4)
        token = _invert(logits, VOCABULARY, peak, scale, lowest, unit, token, BLOCK, BLOCKS)
    tl.store(tokens + row, token.to(tl.int64))


@triton.jit
def _peak(logits, VOCABULARY: tl.constexpr, BLOCK: tl.constexpr):
    """The largest logit, the first token that has it, and whether the logits are finite."""
    best = tl.full((BLOCK,), -float("inf"), tl.float32)
    where = tl.zeros((BLOCK,), tl.int32)
    bad = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, VOCABULARY, BLOCK):
        token = start + tl.arange(0, BLOCK)
        x = tl.load(logits + token, mask=token < VOCABULARY, other=-float("inf"))
        bad |= ((x != x) | (x == float("inf"))).to(tl.int32)
        better = x > best
        best = tl.where(better, x, best)
        where = tl.where(better, token, where)
    peak = tl.max(best, axis=0)
    first = tl.min(tl.where(best == peak, where, 0x7FFFFFFF), axis=0)
    return peak, first, (tl.max(bad, axis=0) == 0) & (peak > -float("inf"))


@triton.jit
def _filter(logits, VOCABULARY: tl.constexpr, peak, scale, top_k, top_p, BLOCK: tl.constexpr):
    """The lowest logit that top_k, and top_p of what it leaves, let stay."""
    low = _key(tl.full((), -float("inf"), tl.float32))
    if (top_k > 0) & (top_k < VOCABULARY):
        low = _border(logits, VOCABULARY, low, peak, scale, top_k.to(tl.float32), False, BLOCK)
    if top_p < 1:
        lowest = _value(low)
        masses = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, VOCABULARY, BLOCK):
            x, weight = _weights(logits, start, VOCABULARY, peak, scale, True, BLOCK)
            masses += tl.where(x >= lowest, weight, 0.0)
        low = _border(logits, VOCABULARY, low, peak, scale, top_p * tl.sum(masses, axis=0), True, BLOCK)
    return _value(low)


@triton.jit
def _border(logits, VOCABULARY: tl.constexpr, low, peak, scale, wanted, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """The highest key whose logits and those above have `wanted` mass (or number); those of `low` have.

    Halves the range of keys twice in each pass over the logits, so that 16 passes find any float32. Counts are exact
    in float32 too.
    """
    high = _key(peak) + 1
    while high - low > 1:
        step = (high - low + 3) // 4
        key1, key2, key3 = low + step, tl.minimum(low + 2 * step, high), tl.minimum(low + 3 * step, high)
        value1, value2, value3 = _value(key1), _value(key2), _value(key3)
        sums1 = tl.zeros((BLOCK,), tl.float32)
        sums2 = tl.zeros((BLOCK,), tl.float32)
        sums3 = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, VOCABULARY, BLOCK):
            x, weight = _weights(logits, start, VOCABULARY, peak, scale, MASS, BLOCK)
            sums1 += tl.where(x >= value1, weight, 0.0)
            sums2 += tl.where(x >= value2, weight, 0.0)
            sums3 += tl.where(x >= value3, weight, 0.0)
        enough1 = tl.sum(sums1, axis=0) >= wanted
        enough2 = enough1 & (tl.sum(sums2, axis=0) >= wanted)
        enough3 = enough2 & (tl.sum(sums3, axis=0) >= wanted)
        # Above the highest key that has enough, up to the next one that has not.
        high = tl.where(enough3, high, tl.where(enough2, key3, tl.where(enough1, key2, key1)))
        low = tl.where(enough3, key3, tl.where(enough2, key2, tl.where(enough1, key1, low)))
    return low


@triton.jit
def _weights(logits, start, VOCABULARY: tl.constexpr, peak, scale, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """A block of logits, and what each adds: its probability relative to the likeliest one's, or 1."""
    token = start + tl.arange(0, BLOCK)
    x = tl.load(logits + token, mask=token < VOCABULARY, other=-float("inf"))
    weight = tl.exp2((x - peak) * scale) if MASS else tl.full((BLOCK,), 1.0, tl.float32)
    return x, weight


@triton.jit
def _invert(
    logits, VOCABULARY: tl.constexpr, peak, scale, lowest, unit, likeliest, BLOCK: tl.constexpr, BLOCKS: tl.constexpr
):
    """The first token at which the running sum of the probabilities passes `unit` of their total."""
    number = tl.arange(0, BLOCKS)
    sums = tl.zeros((BLOCKS,), tl.float64)
    for start in range(0, VOCABULARY, BLOCK):
        x, weight = _weights(logits, start, VOCABULARY, peak, scale, True, BLOCK)
        mass = tl.sum(tl.where(x >= lowest, weight, 0.0), axis=0)
        sums = tl.where(number == start // BLOCK, mass.to(tl.float64), sums)
    running = tl.cumsum(sums, axis=0)
    target = unit * tl.max(running, axis=0)
    # A parallel scan may round so that its sums are not quite in order: nothing of probability 0 is ever taken, and
    # where rounding leaves no candidate, the last possible one is meant.
    block = tl.min(tl.where((running > target) & (sums > 0), number, BLOCKS), axis=0)
    block = tl.where(block < BLOCKS, block, tl.max(tl.where(sums > 0, number, 0), axis=0))
    target -= tl.sum(tl.where(number == block - 1, running, 0.0), axis=0)

    x, weight = _weights(logits, block * BLOCK, VOCABULARY, peak, scale, True, BLOCK)
    weight = tl.where(x >= lowest, weight, 0.0).to(tl.float64)
    token = block * BLOCK + tl.arange(0, BLOCK)
    found = tl.min(tl.where((tl.cumsum(weight, axis=0) > target) & (weight > 0), token, 0x7FFFFFFF), axis=0)
    last = tl.max(tl.where(weight > 0, token, likeliest), axis=0)
    return tl.where(found < 0x7FFFFFFF, found, last)


@triton.jit
def _key(x):
    """An integer for a float32 that is not NaN, in the same order; int64, so that differences fit."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF).to(tl.int64)


@triton.jit
def _value(key):
    """The float32 of a key."""
    bits = key.to(tl.int32)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF).to(tl.float32, bitcast=True)
