"""The kernels that draw tokens choose what the CPU's implementation chooses, row by row, in any batch.

Without a GPU they run in Triton's interpreter (see conftest.py), on vocabularies of a few blocks.
"""

from __future__ import annotations

import math

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

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


UNITS = [(1.0, 0.0), (1.0, 0.5), (1.0, 1 - 2.0**-53), (1e-30, 0.5)]  # temperature, unit


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


def draw(logits: torch.Tensor, settings: torch.Tensor) -> tuple[list[int], list[bool]]:
    """What the kernels draw, and whether the logits are finite."""
    return told(kernel.draw(logits.to(DEVICE), settings.to(DEVICE)))


def told(outcome: torch.Tensor) -> tuple[list[int], list[bool]]:
    tokens, finite = outcome.tolist()
    assert set(finite) <= {0, 1}
    return tokens, [bool(sound) for sound in finite]


def random_logits(rows: int, vocabulary: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3


def random_units(count: int, seed: int = 0) -> list[float]:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()


SIZES = [
    pytest.param(5, 1, id="small"),
    pytest.param(64, 1, id="one block"),
    pytest.param(65, 1, id="one token more"),
    pytest.param(200, 1, id="blocks"),
    *(pytest.param(v, 40, id=f"v{v}", marks=pytest.mark.gpu) for v in (50_257, 128_256, 151_936, 262_144)),
]


@pytest.mark.parametrize(("vocabulary", "repeats"), SIZES)
@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0, 1e-30])
def test_draws_are_those_of_the_cpu(vocabulary: int, repeats: int, temperature: float) -> None:
    rows = [(temperature, *filters) for filters in FILTERS] * repeats
    settings = settings_of(*((*row, unit) for row, unit in zip(rows, random_units(len(rows)), strict=True)))
    logits = random_logits(len(rows), vocabulary)
    tokens, finite = draw(logits, settings)
    expected, _ = told(draw_on_cpu(logits, settings, True))
    assert all(finite)
    differing = sum(a != b for a, b in zip(tokens, expected, strict=True))
    # Sums in float32 move the bounds between tokens by about 1e-6 of the whole.
    assert differing <= (0 if repeats == 1 else len(rows) // 100)


@pytest.mark.parametrize("filters", [(0.0, 1.0, 0.0), (3.0, 1.0, 0.0), (0.0, 0.8, 0.0), (4.0, 0.9, 0.2)])
def test_tokens_come_as_often_as_they_are_likely(filters: tuple[float, float, float]) -> None:
    """Units in equal steps: each token's share of them is its probability."""
    steps = 400 if DEVICE == "cuda" else 40
    probabilities = torch.tensor([0.05, 0.4, 0.15, 0.3, 0.1])
    settings = settings_of(*((1.0, *filters, (i + 0.5) / steps) for i in range(steps)))
    tokens, _ = draw(probabilities.log().expand(steps, -1).contiguous(), settings)
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
    together, _ = draw(logits, settings)
    assert together == [draw(logits[i : i + 1], settings[i : i + 1])[0][0] for i in range(len(rows))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_in_half_precision_are_those_in_float32(dtype: torch.dtype) -> None:
    settings = settings_of(*((0.8, *filters, unit) for filters, unit in zip(FILTERS, random_units(11), strict=True)))
    logits = random_logits(11, 300, 7).to(dtype)
    logits[3, 17] = math.nan
    assert draw(logits, settings) == draw(logits.float(), settings)


def test_tokens_are_kept_for_their_slots() -> None:
    """And of those that are not to be drawn, whose logits may be anything, nothing is."""
    logits = random_logits(4, 200, 9)
    logits[1] = math.nan
    settings = settings_of((0.0, 0, 1.0, 0.0, 0.0), *[(1.0, 20, 0.9, 0.0, 0.4)] * 3)
    alone, _ = draw(logits, settings)
    settings[[1, 3], 0] = -1
    out = torch.full((2, 4), -7, dtype=torch.int64, device=DEVICE)
    last = torch.arange(100, 106, dtype=torch.int32, device=DEVICE)
    slots = torch.tensor([5, 2, 0, 2], dtype=torch.int32, device=DEVICE)
    found = kernel.draw(logits.to(DEVICE), settings.to(DEVICE), out, slots, last)
    assert found is out
    assert out.tolist() == [[alone[0], -7, alone[2], -7], [1, -7, 1, -7]]
    assert last.tolist() == [alone[2], 101, 102, 103, 104, alone[0]]


@given(st.data())
@hypothesis.settings(max_examples=25, deadline=None)
def test_any_row_gets_a_possible_token_and_the_same_in_any_batch(data: st.DataObject) -> None:
    """Rows of every kind side by side, with tokens banned at random, damaged rows among them."""
    vocabulary = data.draw(st.sampled_from([30, 20_000] if DEVICE == "cuda" else [1, 30, 64, 65, 150]))
    rows = data.draw(st.integers(1, 5))
    logits = random_logits(rows, vocabulary, data.draw(st.integers(0, 999)))
    numbers = []
    for row in logits:
        banned = data.draw(st.sets(st.integers(0, vocabulary - 1), max_size=min(vocabulary - 1, 200)))
        row[sorted(banned)] = -INF
        if data.draw(st.integers(0, 5)) == 0:
            row[data.draw(st.integers(0, vocabulary - 1))] = data.draw(st.sampled_from([math.nan, INF]))
        temperature = data.draw(st.sampled_from([0.0, 1e-30, 0.7, 2.0]))
        unit = data.draw(st.sampled_from([0.0, 0.3, 0.9, 1 - 2.0**-53]))
        numbers.append((temperature, *data.draw(st.sampled_from(FILTERS)), unit))
    settings = settings_of(*numbers)
    tokens, finite = draw(logits, settings)
    for i, (temperature, *_) in enumerate(numbers):
        alone = draw(logits[i : i + 1], settings[i : i + 1])
        assert alone == ([tokens[i]], [finite[i]])
        assert finite[i] == bool((logits[i] < INF).all())
        if not finite[i]:
            assert tokens[i] == 0
        elif temperature == 0:
            assert tokens[i] == logits[i].argmax()
        else:
            assert logits[i, tokens[i]] > -INF


def test_the_first_of_equal_tokens_is_the_likeliest() -> None:
    logits = torch.full((2, 300), -1.0)
    logits[0, [70, 71, 250]] = 5.0
    logits[1] = 0.0
    assert draw(logits, settings_of(*[(0.0, 0, 1.0, 0.0, 0.0)] * 2))[0] == [70, 0]


def test_filters_keep_all_of_equal_tokens() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, 1.0, 1.0]).expand(12, -1).contiguous()
    units = [(i + 0.5) / 12 for i in range(12)]
    for filters in [(2, 1.0, 0.0), (0, 0.5, 0.0), (0, 1.0, 0.36)]:
        tokens, _ = draw(logits, settings_of(*((1.0, *filters, unit) for unit in units)))
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
    tokens, finite = draw(logits, settings_of(*[(1.0, *filters, unit)] * 4))
    assert all(finite)
    assert tokens[0] in range(100, 120)
    assert tokens[1:] == [299, 63 if unit < 0.5 else 64, 150]


def test_logits_that_are_not_finite_are_told() -> None:
    logits = random_logits(6, 200)
    logits[1, 150] = math.nan
    logits[2, 3] = INF
    logits[3] = -INF
    logits[4, 3] = -INF
    tokens, finite = draw(logits, settings_of(*[(1.0, 5, 0.9, 0.0, 0.3)] * 6))
    assert finite == [True, False, False, False, True, True]
    assert [tokens[i] for i in (1, 2, 3)] == [0, 0, 0]
    _, on_cpu = told(draw_on_cpu(logits, settings_of(*[(1.0, 5, 0.9, 0.0, 0.3)] * 6), True))
    assert on_cpu == finite


@pytest.mark.parametrize("damage", [math.nan, INF])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_one_bad_logit_is_found_wherever_it_is(damage: float, temperature: float) -> None:
    """At the ends of blocks and of the vocabulary, beside a larger logit; the rows around it get what they would."""
    places = [0, 63, 64, 127, 128, 199]
    logits = random_logits(len(places) + 1, 200)
    logits[:, 100] = 50.0
    settings = settings_of(*[(temperature, 0, 1.0, 0.0, 0.5)] * len(logits))
    for row, place in enumerate(places):
        logits[row, place] = damage
    assert draw(logits, settings) == ([0] * len(places) + [100], [False] * len(places) + [True])


@pytest.mark.parametrize("likely", [63, 64, 150, 199])
def test_where_whole_blocks_are_impossible(likely: int) -> None:
    """Blocks without a possible token, as masks leave them, and one with all that is possible."""
    logits = torch.full((5, 200), -INF)
    logits[:, likely] = -1e30
    settings = settings_of(*((temperature, 0, 1.0, 0.0, unit) for temperature, unit in ((0, 0), *UNITS)))
    assert draw(logits, settings) == ([likely] * 5, [True] * 5)


def test_the_border_between_blocks_is_where_their_probabilities_say() -> None:
    """Four blocks, the last not whole, of unlike peaks: each token's share of equal steps of the unit."""
    steps = 200
    logits = torch.full((200,), -INF)
    for token, probability in ((10, 0.15), (63, 0.1), (64, 0.05), (70, 0.35), (190, 0.05), (199, 0.3)):
        logits[token] = math.log(probability) + 3.0
    settings = settings_of(*((1.0, 0, 1.0, 0.0, (i + 0.5) / steps) for i in range(steps)))
    tokens, _ = draw(logits.expand(steps, -1).contiguous(), settings)
    expected = [10] * 30 + [63] * 20 + [64] * 10 + [70] * 70 + [190] * 10 + [199] * 60
    assert tokens == expected


def test_a_hot_row_keeps_its_unlikely_blocks() -> None:
    """A token far below the likeliest is drawn as often as float64 says, though its block is far below too."""
    logits = torch.full((200,), -INF)
    logits[[5, 150]] = torch.tensor([-60.0, 0.0])
    units = [0.0, 8e-27, 1e-26, 0.5]  # exp(-60) is 8.76e-27
    settings = settings_of(*((1.0, 0, 1.0, 0.0, unit) for unit in units))
    many = logits.expand(4, -1).contiguous()
    tokens, _ = draw(many, settings)
    assert tokens == [5, 5, 150, 150] == told(draw_on_cpu(many, settings, False))[0]


def test_no_rows_are_no_work() -> None:
    assert draw(torch.empty(0, 50), torch.empty(0, 5, dtype=torch.float64)) == ([], [])


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
    kernel.draw(logits, settings)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outcome = kernel.draw(logits, settings)
    logits.copy_(random_logits(8, 128_256, 3))
    graph.replay()
    assert outcome.tolist() == kernel.draw(logits, settings).tolist()
