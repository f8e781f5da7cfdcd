"""Paged attention against plain attention over each sequence."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch

from services.gpu_agent.engine.attention import PagedStep, Span
from services.gpu_agent.engine.kv import KvCache
from services.gpu_agent.engine.kv_spec import KvSpec
from tests.gpu_agent.serving import arena, kv_tensors

LAYERS, KV_HEADS = 2, 2


def plain(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    start: int,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """query (tokens, heads, dim); keys and values (all tokens, kv_heads, dim); sinks (heads,). In float64."""
    query, keys, values = query.double(), keys.double(), values.double()
    groups = query.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
    rows = []
    for i, q in enumerate(query):
        position = start + i
        first = 0 if window is None else max(0, position - window + 1)
        k, v = keys[first : position + 1], values[first : position + 1]
        scores = torch.einsum("hd,thd->ht", q, k) * 0.3
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        exponentials = scores.exp()
        total = exponentials.sum(-1, keepdim=True)
        if sinks is not None:
            total = total + sinks.double().exp()[:, None]
        rows.append(torch.einsum("ht,thd->hd", exponentials / total, v))
    return torch.stack(rows).float()


# Scores are about 1, so such a cap bends them and such sinks take much of the weight.
FEATURES: dict[str, tuple[float | None, bool]] = {
    "plain": (None, False),
    "softcap": (0.8, False),
    "sinks": (None, True),
    "both": (0.8, True),
}


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("window", [None, 1, 3, 8, 100])
@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize("seed", range(2))
def test_equals_plain_attention(window: int | None, heads: int, seed: int, features: str) -> None:
    compare(window, heads, seed, features, torch.float32, head_dim=8, tolerance=1e-5)


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 256])
def test_half_precision_is_plain_attention_rounded(
    window: int | None, features: str, dtype: torch.dtype, head_dim: int
) -> None:
    compare(window, 4, 0, features, dtype, head_dim, tolerance=4 * torch.finfo(dtype).eps)


def compare(
    window: int | None, heads: int, seed: int, features: str, dtype: torch.dtype, head_dim: int, tolerance: float
) -> None:
    """Steps of decodes and chunks of prompts, in pages that held something else, against plain attention in float64."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    softcap, has_sinks = FEATURES[features]
    sinks = (torch.randn(heads) + 1).to(dtype) if has_sinks else None
    extra = {"softcap": softcap, "s_aux": sinks}
    rng = random.Random(seed)
    memory = arena(16, page_bytes=512 * head_dim)
    memory.kv_view(torch.uint8).fill_(0xFF)  # NaN, as another model's weights may look
    spec = KvSpec(LAYERS, KV_HEADS, head_dim, dtype, block_tokens=4)
    cache = KvCache(memory, "a", spec, kv_tensors(memory, spec).clear)
    lengths = [1, 2, 4, 5, 17, 33, 60]
    rng.shuffle(lengths)
    tables = [cache.try_alloc(spec.blocks_for(length)) or [] for length in lengths]
    # Scores of about 1, however long the vectors are.
    kv = [torch.randn(LAYERS, 2, length, KV_HEADS, head_dim).to(dtype) for length in lengths]
    done = [0] * len(lengths)
    while any(at < length for at, length in zip(done, lengths, strict=True)):
        # Some decode, some prefill a chunk, in any order.
        some = [i for i in range(len(lengths)) if done[i] < lengths[i]]
        rng.shuffle(some)
        counts = {i: rng.choice([1, 1, min(3, lengths[i] - done[i]), lengths[i] - done[i]]) for i in some}
        step = PagedStep(kv_tensors(memory, spec), 4, [Span(tables[i], done[i], counts[i]) for i in some])
        assert step.positions.tolist() == [p for i in some for p in range(done[i], done[i] + counts[i])]
        for layer in range(LAYERS):
            queries = [(torch.randn(counts[i], heads, head_dim) * (8 / head_dim) ** 0.5).to(dtype) for i in some]
            new = torch.cat([kv[i][layer, :, done[i] : done[i] + counts[i]] for i in some], dim=1)
            got = step(
                SimpleNamespace(layer_idx=layer),  # type: ignore[arg-type]
                torch.cat(queries).transpose(0, 1)[None],
                new[0].transpose(0, 1)[None],
                new[1].transpose(0, 1)[None],
                0.3,
                window,
                extra,
            )
            expected = [
                plain(
                    q,
                    kv[i][layer, 0, : done[i] + counts[i]],
                    kv[i][layer, 1, : done[i] + counts[i]],
                    done[i],
                    window,
                    softcap,
                    sinks,
                )
                for i, q in zip(some, queries, strict=True)
            ]
            torch.testing.assert_close(got[0].float(), torch.cat(expected), rtol=tolerance, atol=tolerance)
        for i in some:
            done[i] += counts[i]
    cache.close()
    memory.close()
