# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"
# (Triton's kernels are not Python to a type checker.)
"""Drawing tokens on a GPU in two Triton kernels: all blocks of all rows at once, then what is left of each row.

The first reads the logits once, and tells of each block its peak, the first token that has it, and the probability in
it. That is all that a greedy row needs; a row drawn from all tokens reads the one block that its token is in; a row
with filters reads its logits from end to end a few times more.

What is computed is what sampling.draw_on_cpu does, in float32. Sums run in an order that depends on the vocabulary's
size and the row's own settings alone, so a row gets the same token in any batch.
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


def draw(
    logits: torch.Tensor,
    settings: torch.Tensor,
    out: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
    last_tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """The chosen token of each row, and 1 where its logits are finite, else 0: (2, rows) int64, in `out` if given.

    `logits` (rows, vocabulary) is contiguous, `settings` (rows, 5) float64 as in SamplingBatch. Where every logit is
    minus infinity, or any is not finite, the token is 0. Of a row with a temperature below 0 nothing is written. Where
    `slots` (rows) is given, last_tokens[slots[row]] becomes the row's token too (both int32). Two kernels on the
    current stream; nothing is waited for, and they may be captured in a graph.
    """
    rows, vocabulary = logits.shape
    outcome = torch.empty((2, rows), dtype=torch.int64, device=logits.device) if out is None else out
    if not rows:
        return outcome
    blocks = triton.cdiv(vocabulary, BLOCK)
    peaks = torch.empty((rows, blocks), dtype=torch.float32, device=logits.device)
    masses, firsts = torch.empty_like(peaks), torch.empty_like(peaks, dtype=torch.int32)
    _survey[(rows, blocks)](logits, settings, peaks, masses, firsts, vocabulary, BLOCK=BLOCK, num_warps=WARPS)
    _choose[(rows,)](
        logits,
        settings,
        slots,
        peaks,
        masses,
        firsts,
        outcome,
        last_tokens,
        vocabulary,
        BLOCK=BLOCK,
        BLOCKS=triton.next_power_of_2(blocks),
        FILTER_BLOCK=FILTER_BLOCK,
        num_warps=WARPS,
    )
    return outcome


@triton.jit
def _survey(logits, settings, peaks, masses, firsts, VOCABULARY: tl.constexpr, BLOCK: tl.constexpr):
    """Of one block of one row: its largest logit, or NaN where the logits are not sound; the first token that has it;
    and, where the row is drawn, the sum of the probabilities relative to that token's."""
    row = tl.program_id(0)
    temperature = tl.load(settings + row * 5).to(tl.float32)
    if temperature < 0:
        return
    block = tl.program_id(1)
    token = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row.to(tl.int64) * VOCABULARY + token, mask=token < VOCABULARY, other=-float("inf"))
    x = x.to(tl.float32)
    sound = x < float("inf")  # which a NaN is not either
    x = tl.where(sound, x, -float("inf"))
    peak = tl.max(x, axis=0)
    at = row * tl.num_programs(1) + block
    tl.store(firsts + at, tl.min(tl.where(x == peak, token, 0x7FFFFFFF), axis=0))
    tl.store(peaks + at, tl.where(tl.min(sound.to(tl.int32), axis=0) == 1, peak, float("nan")))
    if temperature > 0:
        tl.store(masses + at, tl.sum(_weights(x, peak, _scale(temperature)), axis=0))


@triton.jit
def _choose(
    logits,
    settings,
    slots,
    peaks,
    masses,
    firsts,
    outcome,
    last_tokens,
    VOCABULARY: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    FILTER_BLOCK: tl.constexpr,
):
    """The token of one row, from what _survey found of its blocks."""
    row = tl.program_id(0)
    temperature = tl.load(settings + row * 5).to(tl.float32)
    if temperature < 0:
        return
    logits += row.to(tl.int64) * VOCABULARY
    settings += row * 5
    number = tl.arange(0, BLOCKS)
    present = number * BLOCK < VOCABULARY
    at = row * ((VOCABULARY + BLOCK - 1) // BLOCK) + number
    block_peaks = tl.load(peaks + at, mask=present, other=-float("inf"))
    nans = tl.max((block_peaks != block_peaks).to(tl.int32), axis=0)
    block_peaks = tl.where(block_peaks == block_peaks, block_peaks, -float("inf"))
    peak = tl.max(block_peaks, axis=0)
    sound = (nans == 0) & (peak > -float("inf"))
    first = tl.load(firsts + at, mask=present, other=0x7FFFFFFF)
    token = tl.where(sound, tl.min(tl.where(block_peaks == peak, first, 0x7FFFFFFF), axis=0), 0)
    tl.store(outcome + tl.num_programs(0) + row, sound.to(tl.int64))
    if sound & (temperature > 0):
        scale = _scale(temperature)
        lowest = tl.full((), -float("inf"), tl.float32)
        top_k = tl.load(settings + 1).to(tl.int32)
        top_p = tl.load(settings + 2).to(tl.float32)
        if (top_k > 0) | (top_p < 1):
            lowest = _filter(logits, VOCABULARY, peak, scale, top_k, top_p, FILTER_BLOCK)
        min_p = tl.load(settings + 3).to(tl.float32)
        if min_p > 0:
            lowest = tl.maximum(lowest, peak + temperature * tl.log(min_p))
        block_masses = tl.load(masses + at, mask=present, other=0.0)
        if lowest > -float("inf"):
            block_masses = _masses_left(logits, block_peaks, VOCABULARY, scale, lowest, BLOCK, BLOCKS)
        unit = tl.load(settings + 4)
        token = _invert(logits, block_peaks, block_masses, VOCABULARY, peak, scale, lowest, unit, token, BLOCK, BLOCKS)
    tl.store(outcome + row, token.to(tl.int64))
    if slots is not None:
        tl.store(last_tokens + tl.load(slots + row), token.to(tl.int32))


@triton.jit
def _scale(temperature):
    """exp((x - peak) / temperature) = exp2((x - peak) * scale)"""
    return 1.4426950408889634 / temperature


@triton.jit
def _weights(x, peak, scale):
    """How likely tokens with the logits x are, relative to one with `peak`.

    0 for those of minus infinity, also where the peak is that.
    """
    return tl.exp2((x - tl.where(peak > -float("inf"), peak, 0.0)) * scale)


@triton.jit
def _load(logits, start, VOCABULARY: tl.constexpr, BLOCK: tl.constexpr):
    """A block of logits, as float32."""
    token = start + tl.arange(0, BLOCK)
    return tl.load(logits + token, mask=token < VOCABULARY, other=-float("inf")).to(tl.float32)


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
            x = _load(logits, start, VOCABULARY, BLOCK)
            masses += tl.where(x >= lowest, _weights(x, peak, scale), 0.0)
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
            x = _load(logits, start, VOCABULARY, BLOCK)
            weight = _weights(x, peak, scale) if MASS else tl.full((BLOCK,), 1.0, tl.float32)
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
def _masses_left(logits, peaks, VOCABULARY: tl.constexpr, scale, lowest, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """Of each block, the sum of what is not below `lowest`, as _survey tells that of everything."""
    number = tl.arange(0, BLOCKS)
    masses = tl.zeros((BLOCKS,), tl.float32)
    for start in range(0, VOCABULARY, BLOCK):
        here = number == start // BLOCK
        peak = tl.max(tl.where(here, peaks, -float("inf")), axis=0)
        x = _load(logits, start, VOCABULARY, BLOCK)
        weight = tl.where(x >= lowest, _weights(x, peak, scale), 0.0)
        masses = tl.where(here, tl.sum(weight, axis=0), masses)
    return masses


@triton.jit
def _invert(
    logits,
    peaks,
    masses,
    VOCABULARY: tl.constexpr,
    peak,
    scale,
    lowest,
    unit,
    likeliest,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """The first token at which the running sum of the probabilities passes `unit` of their total.

    masses (BLOCKS): of each block, relative to its own peak.
    """
    number = tl.arange(0, BLOCKS)
    factors = _weights(peaks, peak, scale)
    sums = masses.to(tl.float64) * factors.to(tl.float64)
    running = tl.cumsum(sums, axis=0)
    target = unit * tl.max(running, axis=0)
    # A parallel scan may round so that its sums are not quite in order: nothing of probability 0 is ever taken, and
    # where rounding leaves no candidate, the last possible one is meant.
    block = tl.min(tl.where((running > target) & (sums > 0), number, BLOCKS), axis=0)
    block = tl.where(block < BLOCKS, block, tl.max(tl.where(sums > 0, number, 0), axis=0))
    target -= tl.sum(tl.where(number == block - 1, running, 0.0), axis=0)
    # From here on relative to the block's own peak.
    here = number == block
    target /= tl.sum(tl.where(here, factors, 0.0), axis=0).to(tl.float64)
    block_peak = tl.max(tl.where(here, peaks, -float("inf")), axis=0)

    x = _load(logits, block * BLOCK, VOCABULARY, BLOCK)
    weight = tl.where(x >= lowest, _weights(x, block_peak, scale), 0.0).to(tl.float64)
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
