"""Choosing the next token. A draw depends on nothing but the seed and the token's offset in the answer."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence as Many

import torch

from services.gpu_agent.engine.sequence import SamplingParams


class NonFiniteLogits(RuntimeError):
    """The model computed NaN or infinite logits, so its weights or its KV cache are damaged."""


def random_unit(seed: int, offset: int) -> float:
    """A number in [0, 1) that is a function of (seed, offset) alone.

    A hash instead of a generator's state: a request that is resumed elsewhere, or runs in another batch or on another
    device, draws the same numbers.
    """
    digest = hashlib.blake2b(struct.pack("<QQ", seed, offset), digest_size=8).digest()
    return float(int.from_bytes(digest, "little") >> 11) * 2.0**-53


def sample(logits: torch.Tensor, params: Many[SamplingParams], offsets: Many[int]) -> list[int]:
    """One token id per row of `logits` (rows, vocabulary). Raises NonFiniteLogits.

    A token is drawn by inverting the cumulative distribution in order of token id (not of probability), so that
    rounding differences between batches move its bounds by as much as themselves, and never swap two tokens.
    """
    # The maximum is NaN if any is, infinite if any is, and minus infinite if all are.
    finite = torch.isfinite(logits.amax(dim=-1)).tolist()
    if not all(finite):
        bad = [row for row, ok in enumerate(finite) if not ok]
        raise NonFiniteLogits(f"the model computed NaN or infinite logits for {len(bad)} of {len(finite)} sequences")
    tokens: list[int] = logits.argmax(dim=-1).tolist()
    drawn = [row for row, p in enumerate(params) if p.temperature > 0]
    if drawn:
        chosen = _draw(logits[drawn], [params[row] for row in drawn], [offsets[row] for row in drawn])
        for row, token in zip(drawn, chosen, strict=True):
            tokens[row] = token
    return tokens


def _draw(logits: torch.Tensor, params: Many[SamplingParams], offsets: Many[int]) -> list[int]:
    logits = logits.double()
    # The maximum is taken off before dividing, so that a tiny temperature gives no infinity.
    logits -= logits.amax(dim=-1, keepdim=True)
    logits /= _column(logits, [p.temperature for p in params])
    probabilities = logits.softmax(dim=-1)
    filtered = [row for row, p in enumerate(params) if p.top_k or p.top_p < 1]
    if filtered:
        probabilities[filtered] = _filter(probabilities[filtered], [params[row] for row in filtered])
    cumulative = probabilities.cumsum(dim=-1)
    total = cumulative[:, -1:]
    units = _column(logits, [random_unit(p.seed, offset) for p, offset in zip(params, offsets, strict=True)])
    # A unit is at most 1 - 2**-53, so that its product with the total, even rounded, is below the total; the token
    # found is therefore always one of positive probability.
    drawn: list[int] = torch.searchsorted(cumulative, units * total, right=True)[:, 0].tolist()
    return drawn


def _filter(probabilities: torch.Tensor, params: Many[SamplingParams]) -> torch.Tensor:
    """Sets the probability of tokens outside top_k, and then outside top_p of what is left, to 0."""
    ranked, order = probabilities.sort(dim=-1, descending=True, stable=True)
    vocabulary = ranked.shape[-1]
    ranks = torch.arange(vocabulary, device=ranked.device)
    limit = torch.tensor([[p.top_k or vocabulary] for p in params], device=ranked.device)
    ranked = ranked.masked_fill(ranks >= limit, 0.0)
    cumulative = ranked.cumsum(dim=-1)
    # A token goes where those before it suffice; nothing is before the likeliest, so that one stays.
    reached = cumulative - ranked >= _column(ranked, [p.top_p for p in params]) * cumulative[:, -1:]
    return torch.zeros_like(ranked).scatter_(-1, order, ranked.masked_fill(reached, 0.0))


def _column(like: torch.Tensor, values: Many[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).unsqueeze(1)
