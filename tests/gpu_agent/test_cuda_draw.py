"""The kernel that draws tokens chooses what the CPU's implementation chooses, row by row, in any batch.

Without a GPU it runs in Triton's interpreter (see conftest.py), on vocabularies of a few blocks.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from services.gpu_agent.engine.cuda import draw as kernel
from services.gpu_agent.engine.sampling import draw_on_cpu, sample
from services.gpu_agent.engine.sampling_batch import Row, TokenHistory, prepare
from services.gpu_agent.engine.sampling_params import Grammar, GrammarKind, SamplingParams

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INF = math.inf
FILTERS: list[tuple[float, float, float]] = [
    (0, 1.0, 0.0),
    (1, 1.0, 0.0),
    (5, 1.0, 0.0),
    (10**6, 1.0, 0.0),
    (0, 0.5, 0.0),
    (0, 0.95, 0.0),
    (0, 1e-9, 0.0),
    (20, 0.8, 0.0),
    (0, 1.0, 0.3),
    (0, 1.0, 1.0),
    (40, 0.9, 0.02),
]


@pytest.fixture(autouse=True)
def blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the interpreter, blocks small enough that small vocabularies take several."""
    torch.set_num_threads(1)
    if DEVICE == "cpu":
        monkeypatch.setattr(kernel, "BLOCK", 64)
        monkeypatch.setattr(kernel, "FILTER_BLOCK", 128)


def settings_of(*rows: tuple[float, float, float, float, float]) -> torch.Tensor:
    """SamplingBatch.settings: temperature, top_k, top_p, min_p, unit."""
    return torch.tensor(rows, dtype=torch.float64)


def draw(logits: torch.Tensor, settings: torch.Tensor, filtered: bool) -> tuple[list[int], list[bool]]:
    """What the kernel draws."""
    tokens, finite = kernel.draw(logits.to(DEVICE), settings.to(DEVICE), filtered)
    return tokens.tolist(), finite.tolist()


def random_logits(rows: int, vocabulary: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3


def random_units(count: int, seed: int = 0) -> list[float]:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()


SIZES = [
    pytest.param(5, 1, id="small"),
    pytest.param(200, 1, id="blocks"),
    *(pytest.param(v, 40, id=f"v{v}", marks=pytest.mark.gpu) for v in (50_257, 128_256, 151_936, 262_144)),
]


@pytest.mark.parametrize(("vocabulary", "repeats"), SIZES)
@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0, 1e-30])
def test_draws_are_those_of_the_cpu(vocabulary: int, repeats: int, temperature: float) -> None:
    rows = [(temperature, *filters) for filters in FILTERS] * repeats
    settings = settings_of(*((*row, unit) for row, unit in zip(rows, random_units(len(rows)), strict=True)))
    logits = random_logits(len(rows), vocabulary)
    tokens, finite = draw(logits, settings, True)
    expected, _ = draw_on_cpu(logits, settings, True)
    assert all(finite)
    differing = sum(a != b for a, b in zip(tokens, expected.tolist(), strict=True))
    # Sums in float32 move the bounds between tokens by about 1e-6 of the whole.
    assert differing <= (0 if repeats == 1 else len(rows) // 100)


@pytest.mark.parametrize("filters", [(0.0, 1.0, 0.0), (3.0, 1.0, 0.0), (0.0, 0.8, 0.0), (4.0, 0.9, 0.2)])
def test_tokens_come_as_often_as_they_are_likely(filters: tuple[float, float, float]) -> None:
    """Units in equal steps: each token's share of them is its probability."""
    steps = 400 if DEVICE == "cuda" else 40
    probabilities = torch.tensor([0.05, 0.4, 0.15, 0.3, 0.1])
    settings = settings_of(*((1.0, *filters, (i + 0.5) / steps) for i in range(steps)))
    tokens, _ = draw(probabilities.log().expand(steps, -1).contiguous(), settings, True)
    kept = {(0.0, 1.0, 0.0): 0.0, (3.0, 1.0, 0.0): 0.15, (0.0, 0.8, 0.0): 0.15, (4.0, 0.9, 0.2): 0.1}[filters]
    expected = torch.where(probabilities >= kept, probabilities, 0.0)
    got = torch.bincount(torch.tensor(tokens), minlength=5) / steps
    assert got.tolist() == pytest.approx((expected / expected.sum()).tolist(), abs=1.01 / steps)
    assert tokens == sorted(tokens)  # in order of token id


def test_a_row_is_drawn_alike_alone_and_in_a_batch() -> None:
    vocabulary = 128_256 if DEVICE == "cuda" else 300
    rows = [(0.8, *filters) for filters in FILTERS]
    settings = settings_of(*((*row, unit) for row, unit in zip(rows, random_units(len(rows), 3), strict=True)))
    logits = random_logits(len(rows), vocabulary, 5)
    together, _ = draw(logits, settings, True)
    assert together == [draw(logits[i : i + 1], settings[i : i + 1], True)[0][0] for i in range(len(rows))]
    plain = draw(logits[:1], settings[:1], False)[0]
    assert plain == together[:1]


def test_the_first_of_equal_tokens_is_the_likeliest() -> None:
    logits = torch.full((2, 300), -1.0)
    logits[0, [70, 71, 250]] = 5.0
    logits[1] = 0.0
    assert draw(logits, settings_of(*[(0.0, 0, 1.0, 0.0, 0.0)] * 2), False)[0] == [70, 0]


def test_filters_keep_all_of_equal_tokens() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, 1.0, 1.0]).expand(12, -1).contiguous()
    units = [(i + 0.5) / 12 for i in range(12)]
    for filters in [(2, 1.0, 0.0), (0, 0.5, 0.0), (0, 1.0, 0.36)]:
        tokens, _ = draw(logits, settings_of(*((1.0, *filters, unit) for unit in units)), True)
        assert set(tokens) == {0, 1, 3, 4}


@pytest.mark.parametrize("unit", [0.0, 0.5, 1 - 2.0**-53])
@pytest.mark.parametrize("filtered", [False, True])
def test_impossible_tokens_are_never_drawn(unit: float, filtered: bool) -> None:
    """At both ends of the vocabulary, of blocks, and where weights vanish in float32."""
    logits = torch.full((4, 300), -INF)
    logits[0, 100:120] = 1.0
    logits[1, 299] = -3.0
    logits[2, [63, 64]] = 2.0
    logits[3] = -200.0
    logits[3, 150] = 30.0
    filters = (250, 0.999, 0.0) if filtered else (0, 1.0, 0.0)
    tokens, finite = draw(logits, settings_of(*[(1.0, *filters, unit)] * 4), filtered)
    assert all(finite)
    assert tokens[0] in range(100, 120)
    assert tokens[1:] == [299, 63 if unit < 0.5 else 64, 150]


def test_logits_that_are_not_finite_are_told() -> None:
    logits = random_logits(6, 200)
    logits[1, 150] = math.nan
    logits[2, 3] = INF
    logits[3] = -INF
    logits[4, 3] = -INF
    tokens, finite = draw(logits, settings_of(*[(1.0, 5, 0.9, 0.0, 0.3)] * 6), True)
    assert finite == [True, False, False, False, True, True]
    assert [tokens[i] for i in (1, 2, 3)] == [0, 0, 0]
    _, on_cpu = draw_on_cpu(logits, settings_of(*[(1.0, 5, 0.9, 0.0, 0.3)] * 6), True)
    assert on_cpu.tolist() == finite


def test_no_rows_are_no_work() -> None:
    assert draw(torch.empty(0, 50), torch.empty(0, 5, dtype=torch.float64), False) == ([], [])


class EvenTokens:
    """A matcher that allows the even tokens."""

    def __init__(self, vocabulary: int) -> None:
        bits = np.zeros(-(-vocabulary // 32) * 32, np.uint8)
        bits[:vocabulary:2] = 1
        self.mask = np.packbits(bits, bitorder="little").view(np.int32)


@pytest.mark.gpu
@pytest.mark.parametrize("vocabulary", [128_256, 50_257])
def test_whole_steps_are_those_of_the_cpu(vocabulary: int) -> None:
    """Penalties, biases, bans, masks, log probabilities: without a wait, and with the CPU's results."""

    def row(i: int) -> Row:
        grammar = Grammar(GrammarKind.REGEX, "x") if i % 4 == 3 else None
        params = SamplingParams(
            50,
            temperature=[0.0, 0.7, 1.0][i % 3],
            top_k=[0, 50][i % 2],
            top_p=[1.0, 0.9][i % 2],
            seed=i,
            repetition_penalty=[1.0, 1.3][i // 2 % 2],
            presence_penalty=0.5 * (i % 2),
            frequency_penalty=0.2 * (i % 3),
            logit_bias={7: 3.0, 9: -100.0} if i % 5 == 0 else {},
            logprobs=[None, 0, 5][i % 3],
            stop_token_ids=frozenset({11}),
            min_tokens=30,
            grammar=grammar,
        )
        history = TokenHistory(range(100, 600), [3, 3, 9, 100 + i])
        return Row(params, i, history, EvenTokens(vocabulary) if grammar else None)

    rows = [row(i) for i in range(48)]
    logits = random_logits(48, vocabulary, 8)
    expected = sample(logits.clone(), prepare(rows, vocabulary, frozenset({5}))).choices()
    there = logits.cuda()
    sample(there.clone(), prepare(rows, vocabulary, frozenset({5}), "cuda"))  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        host = sample(there, prepare(rows, vocabulary, frozenset({5}), "cuda")).to_host()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    got = host.choices()
    assert sum(a.token != b.token for a, b in zip(got, expected, strict=True)) <= 1
    for a, b in zip(got, expected, strict=True):
        assert (a.logprobs is None) == (b.logprobs is None)
        if a.logprobs and b.logprobs and a.token == b.token:
            assert a.logprobs.token == pytest.approx(b.logprobs.token, abs=1e-3)
            assert [t for t, _ in a.logprobs.top] == [t for t, _ in b.logprobs.top]


@pytest.mark.gpu
def test_the_kernel_can_be_captured_in_a_graph() -> None:
    logits = random_logits(8, 128_256, 2).cuda()
    settings = settings_of(*((1.0, 40, 0.9, 0.0, unit) for unit in random_units(8))).cuda()
    kernel.draw(logits, settings, True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens, _ = kernel.draw(logits, settings, True)
    logits.copy_(random_logits(8, 128_256, 3))
    graph.replay()
    assert tokens.tolist() == kernel.draw(logits, settings, True)[0].tolist()
