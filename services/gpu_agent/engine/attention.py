"""Attention over the paged KV cache, as one of transformers' attention functions. The CPU's implementation.

transformers calls `paged_attention` in each layer; what the step's tokens belong to is told by the context that
`attending` sets around the model's forward pass. No mask function is registered under the same name, so transformers
builds no mask: for a name it does not know it passes None.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Many
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from services.gpu_agent.engine.kv_tensors import KvTensors

ATTENTION = "warmserve_paged"

# (module, query, key, value, scaling, sliding_window, other keyword arguments) -> output. query is
# (1, heads, tokens, head_dim), key and value (1, kv_heads, tokens, head_dim), output (1, tokens, heads, head_dim).
Attend = Callable[
    [torch.nn.Module, torch.Tensor, torch.Tensor, torch.Tensor, float | None, int | None, dict[str, Any]], torch.Tensor
]

_attend: ContextVar[Attend] = ContextVar("warmserve_attend")


@contextmanager
def attending(attend: Attend) -> Iterator[None]:
    """Within it, the attention of models built with ATTENTION is done by `attend`, in this thread."""
    token = _attend.set(attend)
    try:
        yield
    finally:
        _attend.reset(token)


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **extra: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls. The mask is None, and dropout 0, in a model that is served.

    ValueError where there is a mask: then the model makes one of its own, beside the one that transformers would make.
    """
    if attention_mask is not None:
        raise ValueError("the model makes an attention mask of its own, which the engine does not have")
    return _attend.get()(module, query, key, value, scaling, sliding_window, extra), None


AttentionInterface.register(ATTENTION, paged_attention)


@dataclass(frozen=True)
class LayerAttention:
    """What one layer's attention is, beside its numbers: enough to choose and to capture kernels for it.

    A token at position p sees positions (p - window, p], with no window all up to p. Scores are scaling * q.k, then
    with a softcap c they are c * tanh(score / c). With sinks, one learned score per head (`s_aux` in Attend's keyword
    arguments, (heads,)) takes part in the softmax and has no value.
    """

    layer: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int | None
    softcap: float | None
    sinks: bool
    scaling: float


@dataclass(frozen=True)
class Span:
    """The tokens of one sequence in a step: positions [start, start + length), its KV in `blocks`."""

    blocks: Many[int]
    start: int
    length: int


@dataclass(frozen=True)
class _Group:
    """Sequences with one token each, padded to the longest."""

    rows: torch.Tensor  # their rows in the batch
    index: torch.Tensor  # block index, (sequences, blocks)
    mask: torch.Tensor  # (sequences, 1, 1, keys)


@dataclass(frozen=True)
class _Run:
    """Several tokens of one sequence."""

    begin: int  # rows in the batch
    end: int
    index: torch.Tensor  # block index, (1, blocks)
    keys: int
    mask: torch.Tensor | None  # (tokens, keys); None: causal, from position 0 on


class PagedStep:
    """The attention of one step over a flattened batch: all tokens of the first span, then of the second, and so on."""

    def __init__(self, kv: KvTensors, block_tokens: int, spans: Many[Span]) -> None:
        self._kv = kv
        self._block_tokens = block_tokens
        self._spans = spans
        self._plans: dict[int | None, tuple[list[_Group], list[_Run]]] = {}
        positions = [position for span in spans for position in range(span.start, span.start + span.length)]
        self.positions = torch.tensor(positions)
        """The position of each token in its sequence; 1-D."""
        blocks = [
            span.blocks[position // block_tokens]
            for span in spans
            for position in range(span.start, span.start + span.length)
        ]
        self._places = kv.token_index(torch.tensor(blocks), self.positions % block_tokens)

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float | None,
        sliding_window: int | None,
        extra: dict[str, Any],
    ) -> torch.Tensor:
        """Stores the new tokens' keys and values, then attends to all that each token may see (see Attend)."""
        layer: int = module.layer_idx  # type: ignore[assignment]  # modules' attributes are untyped
        self._kv.write(layer, self._places, key[0].transpose(0, 1), value[0].transpose(0, 1))
        if sliding_window not in self._plans:
            self._plans[sliding_window] = self._plan(sliding_window)
        groups, runs = self._plans[sliding_window]
        _, heads, tokens, head_dim = query.shape
        kv_heads = key.shape[1]
        softcap: float | None = extra.get("softcap")
        sinks: torch.Tensor | None = extra.get("s_aux")
        by_token = query[0].transpose(0, 1)
        output = query.new_empty(tokens, heads, head_dim)
        for group in groups:
            keys, values = self._kv.read(layer, group.index)
            # The query heads that share a KV head are rows of one small matrix, so keys need not be repeated.
            grouped = by_token[group.rows].reshape(len(group.rows), kv_heads, heads // kv_heads, head_dim)
            attended = _attention(
                grouped,
                keys.transpose(1, 2),
                values.transpose(1, 2),
                group.mask,
                scaling,
                softcap,
                None if sinks is None else sinks.view(1, kv_heads, heads // kv_heads, 1),
            )
            output[group.rows] = attended.reshape(len(group.rows), heads, head_dim)
        for run in runs:
            keys, values = self._kv.read(layer, run.index)
            attended = _attention(
                query[:, :, run.begin : run.end],
                keys[:, : run.keys].transpose(1, 2),
                values[:, : run.keys].transpose(1, 2),
                run.mask,
                scaling,
                softcap,
                None if sinks is None else sinks.view(1, heads, 1, 1),
            )
            output[run.begin : run.end] = attended[0].transpose(0, 1)
        return output.unsqueeze(0)

    def _plan(self, window: int | None) -> tuple[list[_Group], list[_Run]]:
        """What to read for layers with this window: a token at position p sees positions (p - window, p]."""
        singles: dict[int, list[tuple[int, Span]]] = {}
        runs = []
        row = 0
        for span in self._spans:
            if span.length == 1:
                # Padding at most doubles the work: a group's sequences need 2**i to 2**(i+1) - 1 blocks.
                count = len(self._visible(span, window)[1])
                singles.setdefault(count.bit_length(), []).append((row, span))
            else:
                runs.append(self._run(span, row, window))
            row += span.length
        return [self._group(members, window) for members in singles.values()], runs

    def _visible(self, span: Span, window: int | None) -> tuple[int, Many[int]]:
        """The first position of, and the blocks that hold, what the span's tokens may see."""
        first = 0 if window is None else max(0, span.start - window + 1) // self._block_tokens
        last = (span.start + span.length - 1) // self._block_tokens
        return first * self._block_tokens, span.blocks[first : last + 1]

    def _group(self, members: list[tuple[int, Span]], window: int | None) -> _Group:
        visible = [self._visible(span, window) for _, span in members]
        longest = max(len(blocks) for _, blocks in visible)
        # Padded with a block of the sequence's own, whose content is finite; the mask hides it.
        tables = [[*blocks, *[blocks[-1]] * (longest - len(blocks))] for _, blocks in visible]
        firsts = torch.tensor([[first] for first, _ in visible])
        positions = firsts + torch.arange(longest * self._block_tokens)
        queries = torch.tensor([[span.start] for _, span in members])
        return _Group(
            rows=torch.tensor([row for row, _ in members]),
            index=self._kv.block_index(torch.tensor(tables)),
            mask=_sees(queries, positions, window)[:, None, None, :],
        )

    def _run(self, span: Span, row: int, window: int | None) -> _Run:
        first, blocks = self._visible(span, window)
        end = span.start + span.length
        mask = None
        if span.start > 0 or (window is not None and window < span.length):
            mask = _sees(torch.arange(span.start, end)[:, None], torch.arange(first, end)[None, :], window)
        return _Run(row, row + span.length, self._kv.block_index(torch.tensor([blocks])), end - first, mask)


def _attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """query (sequences, heads, rows, head_dim); keys, values (sequences, kv_heads, keys, head_dim); sinks as scores.

    Without a mask it is causal, with as many keys as rows. torch has no kernel with soft-capping or sinks on the CPU.
    """
    groups = query.shape[1] // keys.shape[1]
    if softcap is None and sinks is None:
        return scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=groups > 1
        )
    keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
    scores = (query @ keys.transpose(2, 3)).float() * (query.shape[3] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    visible = torch.ones(scores.shape[2:], dtype=torch.bool).tril() if mask is None else mask
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.float().expand(*scores.shape[:3], 1)], dim=3)
    shares = scores.softmax(dim=3)[..., : keys.shape[2]]
    return shares.to(values.dtype) @ values


def _sees(queries: torch.Tensor, keys: torch.Tensor, window: int | None) -> torch.Tensor:
    """Which key positions each query position sees."""
    sees = keys <= queries
    if window is not None:
        sees &= keys > queries - window
    return sees
