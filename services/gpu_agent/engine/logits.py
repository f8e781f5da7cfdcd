"""Changes to a step's logits before tokens are drawn. All work is queued on the device; nothing is waited for."""

from __future__ import annotations

import torch
from xgrammar import apply_token_bitmask_inplace

from services.gpu_agent.engine.sampling_batch import Additions, Masks, Penalties, SamplingBatch


def edit_logits(logits: torch.Tensor, batch: SamplingBatch) -> None:
    """Penalises, biases, bans and masks in place; `logits` (rows, vocabulary) is contiguous float32."""
    if batch.penalties is not None:
        _penalise(logits, batch.penalties)
    if batch.additions is not None:
        _add(logits.view(-1), batch.additions)
    if batch.masks is not None:
        _mask(logits, batch.masks)


def _penalise(logits: torch.Tensor, penalties: Penalties) -> None:
    flat = logits.view(-1)
    # The total is known, so that the device need not be asked for it.
    owner = torch.repeat_interleave(penalties.lengths, output_size=len(penalties.tokens))
    tokens, counts = penalties.tokens, penalties.counts
    if penalties.pending is not None:
        owner, tokens, counts = _with_pending(owner, penalties, penalties.pending)
    index = penalties.rows[owner] * logits.shape[1] + tokens
    repetition, presence, frequency = penalties.rates[owner].unbind(dim=1)
    values = flat[index]
    values = torch.where(values > 0, values / repetition, values * repetition)
    # A token that comes twice has the same count both times, so it does not matter which of the two is written.
    flat[index] = values - presence * (counts > 0) - frequency * counts


def _with_pending(
    owner: torch.Tensor, penalties: Penalties, pending: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, tokens and counts with each row's pending token; a row without one has its first token twice instead."""
    first = penalties.lengths.cumsum(0) - penalties.lengths
    added = torch.where(pending < 0, penalties.tokens[first], pending)
    again = penalties.tokens == added[owner]
    counts = penalties.counts + (again & (pending >= 0)[owner])
    # Those of a row that hold the added token: one, or none.
    holders = torch.zeros_like(penalties.lengths).index_add_(0, owner, again.long())
    held = torch.zeros_like(penalties.lengths).index_add_(0, owner, again * counts.long())
    rows = torch.arange(len(pending), device=owner.device)
    return (
        torch.cat([owner, rows]),
        torch.cat([penalties.tokens, added]),
        torch.cat([counts, torch.where(holders > 0, held, 1).int()]),
    )


def _add(flat: torch.Tensor, additions: Additions) -> None:
    # An index that comes twice is a bias and a ban, whose sum does not depend on their order.
    flat.index_add_(0, additions.index, additions.value)


def _mask(logits: torch.Tensor, masks: Masks) -> None:
    # Rows as a tensor, which its kernels take although the signature says list: a list would be uploaded again.
    apply_token_bitmask_inplace(logits, masks.words, indices=masks.rows)  # type: ignore[arg-type]
