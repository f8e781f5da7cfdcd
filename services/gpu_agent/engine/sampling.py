"""Choosing the next token. A draw depends on nothing but the logits, the seed and the token's offset in the answer.

The order: log probabilities from the model's own logits; repetition, presence and frequency penalties; biases; bans;
the grammar's mask; temperature; top_k; top_p of what that left; min_p; the draw. The three filters are thresholds on
the logit: tokens exactly at the border all stay, so top_k leaves more than k where the k-th has equals.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from services.gpu_agent.engine.logits import edit_logits
from services.gpu_agent.engine.sampling_batch import SamplingBatch


class NonFiniteLogits(RuntimeError):
    """The model computed NaN or infinite logits, so its weights or its KV cache are damaged."""


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural logarithms of probabilities under the model's own logits, at temperature 1."""

    token: float
    """The chosen token's."""
    top: list[tuple[int, float]]
    """The likeliest tokens with theirs, likeliest first, as many as asked for."""


@dataclass(frozen=True)
class Choice:
    """The outcome of one row."""

    token: int
    logprobs: TokenLogprobs | None
    """Where the row asked for them."""


@dataclass(frozen=True)
class LogprobReport:
    """Log probabilities of the rows that asked for them, in SamplingBatch.logprobs' order."""

    chosen: torch.Tensor
    """(l,) float32: of the chosen tokens."""
    top_tokens: torch.Tensor
    """(l, most alternatives asked for) int64: the likeliest tokens, likeliest first."""
    top: torch.Tensor
    """Of those, float32."""


@dataclass(frozen=True)
class Sampled:
    """The outcome of a step, all tensors on one device."""

    outcome: torch.Tensor
    """(2, rows) int64, one tensor so that it is one copy to the CPU: the tokens, 0, which is safe to go on with, where
    the logits are not finite; and 1 where the model's logits were sound, else 0."""
    report: LogprobReport | None
    """Where any row asked for log probabilities."""
    asked: dict[int, int]
    """SamplingBatch.logprobs."""

    @property
    def tokens(self) -> torch.Tensor:
        """(rows,) int64: the chosen ones."""
        return self.outcome[0]

    def to_host(self) -> Sampled:
        """The same in pinned memory of the CPU: valid once the current stream has come to this point."""
        return Sampled(
            outcome=_to_host(self.outcome),
            report=self.report
            and LogprobReport(*map(_to_host, (self.report.chosen, self.report.top_tokens, self.report.top))),
            asked=self.asked,
        )

    def choices(self) -> list[Choice]:
        """One per row. Waits for the device, unless the tensors are on the CPU. Raises NonFiniteLogits."""
        chosen_tokens, finite = self.outcome.tolist()
        if not all(finite):
            bad = len(finite) - sum(finite)
            raise NonFiniteLogits(f"the model computed NaN or infinite logits for {bad} of {len(finite)} sequences")
        reports: dict[int, TokenLogprobs] = {}
        if self.report is not None:
            chosen, tokens, values = (t.tolist() for t in (self.report.chosen, self.report.top_tokens, self.report.top))
            for line, (row, count) in enumerate(self.asked.items()):
                top = list(zip(tokens[line][:count], values[line][:count], strict=True))
                reports[row] = TokenLogprobs(chosen[line], top)
        return [Choice(token, reports.get(row)) for row, token in enumerate(chosen_tokens)]


def sample(logits: torch.Tensor, batch: SamplingBatch) -> Sampled:
    """Chooses a token for each row of `logits` (rows, vocabulary), contiguous float32, which it may overwrite.

    Queues work on the current stream and waits for nothing; `batch` comes from `prepare` for the same rows,
    vocabulary and device.

    A token is drawn by inverting the cumulative distribution in order of token id (not of probability), so that
    rounding differences between batches move its bounds by as much as themselves, and never swap two tokens.
    """
    if logits.dtype != torch.float32 or not logits.is_contiguous() or len(logits) != len(batch.settings):
        raise ValueError(
            f"logits must be contiguous float32 with {len(batch.settings)} rows, not {logits.dtype} of shape "
            f"{tuple(logits.shape)} with strides {logits.stride()}"
        )
    own = logits if batch.logprob_rows is None else logits[batch.logprob_rows]
    sound = None
    if batch.edits:
        # The maximum is NaN if any is, infinite if any is, and minus infinite if all are. Asked before masks hide it.
        sound = torch.isfinite(logits.amax(dim=-1))
        edit_logits(logits, batch)
    if logits.is_cuda:
        from services.gpu_agent.engine.cuda.draw import draw  # Triton is there only with a GPU

        outcome = draw(logits, batch.settings)
    else:
        outcome = draw_on_cpu(logits, batch.settings, batch.filtered)
    if sound is not None:
        outcome[1] = sound
    report = None if batch.logprob_rows is None else _report(own, outcome[0, batch.logprob_rows], batch.logprobs)
    return Sampled(outcome, report, batch.logprobs)


def _report(logits: torch.Tensor, chosen: torch.Tensor, asked: dict[int, int]) -> LogprobReport:
    normaliser = logits.logsumexp(dim=-1, keepdim=True)
    top = logits.topk(min(max(asked.values()), logits.shape[1]), dim=-1)
    own = logits.gather(1, chosen.unsqueeze(1)) - normaliser
    return LogprobReport(own.squeeze(1), top.indices, top.values - normaliser)


def draw_on_cpu(logits: torch.Tensor, settings: torch.Tensor, filtered: bool) -> torch.Tensor:
    """The chosen token of each row, and 1 where its logits are finite, else 0: (2, rows) int64.

    `settings` and `filtered` are SamplingBatch's.

    Where every logit is minus infinity (bans left nothing), or any is not finite, the token is 0.
    """
    peak = logits.amax(dim=-1) if len(logits) else logits.new_empty(0)
    finite = torch.isfinite(peak)
    tokens = torch.where(finite, logits.argmax(dim=-1), 0) if len(logits) else torch.empty(0, dtype=torch.long)
    drawn = ((settings[:, 0] > 0) & finite).nonzero().squeeze(1)
    if len(drawn):
        tokens[drawn] = _draw_rows(logits[drawn].double(), settings[drawn], filtered)
    return torch.stack((tokens, finite.long()))


def _draw_rows(logits: torch.Tensor, settings: torch.Tensor, filtered: bool) -> torch.Tensor:
    temperature, top_k, top_p, min_p, unit = settings.unsqueeze(2).unbind(dim=1)  # each (rows, 1)
    # The maximum is taken off before dividing, so that a tiny temperature gives no infinity.
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    threshold = min_p.log()
    if filtered:
        threshold = torch.maximum(threshold, _threshold(scaled, top_k, top_p))
    weights = scaled.exp().masked_fill_(scaled < threshold, 0.0)
    cumulative = weights.cumsum(dim=-1)
    # A unit is at most 1 - 2**-53, so that its product with the total, even rounded, is below the total; the token
    # found is therefore always one of positive probability.
    return torch.searchsorted(cumulative, unit * cumulative[:, -1:], right=True).squeeze(1)


def _threshold(scaled: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """The lowest value that top_k, and top_p of what it leaves, let stay; (rows, 1)."""
    ranked = scaled.sort(dim=-1, descending=True).values
    last = ranked.shape[1] - 1
    places = torch.where(top_k > 0, top_k - 1, last).clamp(max=last)
    lowest = ranked.gather(1, places.long())
    cumulative = ranked.exp().masked_fill_(ranked < lowest, 0.0).cumsum(dim=-1)
    reached = torch.searchsorted(cumulative, top_p * cumulative[:, -1:]).clamp_(max=last)
    return torch.where(top_p < 1, torch.maximum(lowest, ranked.gather(1, reached)), lowest)


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_cuda:
        return tensor
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
