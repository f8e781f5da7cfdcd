"""Choosing tokens: each parameter does what its name says, and a seed says everything about the draws."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence as Many
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from services.gpu_agent.engine import sampling_batch
from services.gpu_agent.engine.logits import edit_logits
from services.gpu_agent.engine.sampling import NonFiniteLogits, sample
from services.gpu_agent.engine.sampling_batch import Row, TokenHistory, prepare, random_unit
from services.gpu_agent.engine.sampling_params import Grammar, GrammarKind, SamplingParams
from services.gpu_agent.engine.sequence import Sequence
from tests.gpu_agent.checkpoints import llama
from tests.gpu_agent.serving import arena, greedy, prompt, run, serve, tokens_of

P = [0.4, 0.3, 0.15, 0.1, 0.05]
LOGITS = torch.tensor([P]).log()


def choose(logits: torch.Tensor, rows: Many[Row], eos: frozenset[int] = frozenset()) -> list[int]:
    """The chosen tokens."""
    logits = logits.clone()
    return [c.token for c in sample(logits, prepare(rows, logits.shape[1], eos)).choices()]


def draws(params: SamplingParams, count: int) -> list[Row]:
    """The rows of `count` successive tokens."""
    return [Row(params, offset) for offset in range(count)]


def frequencies(params: dict[str, object], count: int = 4000) -> dict[int, float]:
    options = SamplingParams(1, seed=7, **params)  # type: ignore[arg-type]
    tokens = choose(LOGITS.expand(count, -1), draws(options, count))
    return {token: n / count for token, n in sorted(Counter(tokens).items())}


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, P),
        ({"temperature": 0.0}, [1]),
        ({"temperature": 0.5}, [p * p / sum(q * q for q in P) for p in P]),
        ({"temperature": 2.0}, [math.sqrt(p) / sum(math.sqrt(q) for q in P) for p in P]),
        ({"temperature": 1e-300}, [1]),
        ({"top_k": 1}, [1]),
        ({"top_k": 2}, [4 / 7, 3 / 7]),
        ({"top_k": 99}, P),
        ({"top_p": 0.39}, [1]),
        ({"top_p": 0.69}, [4 / 7, 3 / 7]),
        ({"top_p": 0.71}, [40 / 85, 30 / 85, 15 / 85]),
        ({"top_k": 2, "top_p": 0.56}, [1]),
        ({"top_p": 1e-9}, [1]),
        ({"min_p": 1.0}, [1]),
        ({"min_p": 0.7}, [4 / 7, 3 / 7]),
        ({"min_p": 0.6, "temperature": 2.0}, [math.sqrt(p) / sum(math.sqrt(q) for q in P[:3]) for p in P[:3]]),
        ({"top_k": 3, "min_p": 0.2}, [40 / 85, 30 / 85, 15 / 85]),
    ],
)
def test_tokens_have_the_probabilities_asked_for(params: dict[str, object], expected: list[float]) -> None:
    got = frequencies(params)
    assert list(got) == list(range(len(expected)))
    assert list(got.values()) == pytest.approx(expected, abs=0.03)


def test_filters_keep_all_of_equal_tokens() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, 1.0, 1.0]]).expand(500, -1)
    assert set(choose(logits, draws(SamplingParams(1, top_k=2), 500))) == {0, 1, 3, 4}
    assert set(choose(logits, draws(SamplingParams(1, top_p=0.5), 500))) == {0, 1, 3, 4}
    assert set(choose(logits, draws(SamplingParams(1, min_p=math.exp(-1) * 0.999), 500))) == {0, 1, 3, 4}


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**63))
def test_units_lie_in_their_interval(seed: int, offset: int) -> None:
    assert 0 <= random_unit(seed, offset) < 1
    assert random_unit(seed, offset) == random_unit(seed, offset)


def test_units_are_fixed_for_ever() -> None:
    """A request may be resumed by an agent of another version."""
    assert [random_unit(0, 0), random_unit(1, 0), random_unit(0, 1)] == [
        0.0564663990004608,
        0.6487508310490744,
        0.44008326622012284,
    ]


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_rows_do_not_influence_one_another(data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 6))
    params = [
        SamplingParams(
            1,
            temperature=data.draw(st.sampled_from([0.0, 0.01, 0.7, 1.0, 2.0])),
            top_p=data.draw(st.sampled_from([0.01, 0.5, 0.95, 1.0])),
            top_k=data.draw(st.sampled_from([0, 1, 5, 1000])),
            seed=data.draw(st.integers(0, 2**64 - 1)),
        )
        for _ in range(rows)
    ]
    wanted = [Row(p, data.draw(st.integers(0, 5000))) for p in params]
    logits = torch.randn(rows, 64, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 999)))) * 4
    assert choose(logits, wanted) == [choose(logits[i : i + 1], wanted[i : i + 1])[0] for i in range(rows)]


def test_impossible_tokens_are_never_drawn() -> None:
    """Also at the ends of the vocabulary, where rounding would put them."""
    logits = torch.full((3000, 6), -math.inf)
    logits[:, 2:4] = 0.0
    assert set(choose(logits, draws(SamplingParams(1), 3000))) == {2, 3}


def test_the_largest_draw_stays_in_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling_batch, "random_unit", lambda seed, offset: 1 - 2.0**-53)
    logits = torch.randn(300, 40, generator=torch.Generator().manual_seed(1))
    logits[:, 30:] = -math.inf
    assert set(choose(logits, draws(SamplingParams(1), 300))) == {29}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_non_finite_logits_are_an_error(bad: float, temperature: float) -> None:
    logits = torch.zeros(2, 5)
    logits[1, 3] = bad
    with pytest.raises(NonFiniteLogits, match="1 of 2 sequences"):
        choose(logits, [Row(SamplingParams(1, temperature=temperature), 0)] * 2)
    with pytest.raises(NonFiniteLogits):
        choose(torch.full((1, 5), -math.inf), [Row(SamplingParams(1), 0)])


@pytest.mark.parametrize(
    "params",
    [
        {"max_tokens": 0},
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": 2.1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": math.nan},
        {"top_k": -1},
        {"seed": -1},
        {"seed": 2**64},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"min_p": math.nan},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": math.inf},
        {"presence_penalty": 2.1},
        {"frequency_penalty": math.nan},
        {"logit_bias": {3: 101.0}},
        {"logit_bias": {3: math.nan}},
        {"logit_bias": {-1: 0.0}},
        {"logit_bias": dict.fromkeys(range(1025), 1.0)},
        {"logprobs": 21},
        {"logprobs": -1},
        {"stop_token_ids": frozenset({-1})},
        {"stop_token_ids": frozenset(range(129))},
        {"min_tokens": -1},
        {"min_tokens": 2},
        {"ignore_eos": True, "grammar": Grammar(GrammarKind.JSON_OBJECT)},
    ],
)
def test_values_out_of_range_are_refused(params: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(params))):
        SamplingParams(**{"max_tokens": 1, **params})  # type: ignore[arg-type]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 10**6),
    st.floats(0.05, 2),
    st.sampled_from([0, 1, 3, 17, 64, 99]),
    st.sampled_from([1.0, 0.99, 0.7, 0.2, 0.01]),
    st.sampled_from([0.0, 0.01, 0.2, 1.0]),
)
def test_filters_are_those_of_transformers(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    """Its warpers one after another, and the inverse of the distribution that they leave."""
    logits = torch.randn(1, 64, generator=generator(seed)) * 3
    scores = logits.double() / temperature
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    scores = TopPLogitsWarper(top_p)(None, scores)
    scores = MinPLogitsWarper(min_p)(None, scores)
    cumulative = scores.softmax(dim=-1).cumsum(dim=-1)[0]
    params = SamplingParams(1, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    tokens = choose(logits.expand(20, -1), draws(params, 20))
    for offset, token in enumerate(tokens):
        unit = random_unit(seed, offset)
        assert cumulative[token] >= unit - 1e-9
        assert unit >= (cumulative[token - 1] if token else 0.0) - 1e-9


def edited(logits: torch.Tensor, rows: Many[Row], eos: frozenset[int] = frozenset()) -> torch.Tensor:
    """The logits from which tokens are drawn."""
    logits = logits.clone()
    edit_logits(logits, prepare(rows, logits.shape[1], eos))
    return logits


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(0, 19), min_size=1, max_size=30),
    st.lists(st.integers(0, 19), max_size=30),
    st.sampled_from([1.0, 0.5, 1.7, 10.0]),
    st.sampled_from([0.0, 1.5, -2.0]),
    st.sampled_from([0.0, 0.3, -0.1]),
    st.dictionaries(st.integers(0, 19), st.floats(-100, 100), max_size=5),
)
def test_penalties_and_biases_come_in_their_order(
    prompt: list[int], answer: list[int], repetition: float, presence: float, frequency: float, bias: dict[int, float]
) -> None:
    """Against transformers for repetition, and the definitions of the others; the rows around are left alone."""
    logits = torch.randn(3, 20, generator=generator(len(prompt))) * 3
    params = SamplingParams(
        99, repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency, logit_bias=bias
    )
    expected = logits.clone()
    expected[1:2] = RepetitionPenaltyLogitsProcessor(repetition)(torch.tensor([prompt + answer]), logits[1:2])
    for token, count in Counter(answer).items():
        expected[1, token] -= presence + frequency * count
    for token, value in bias.items():
        expected[1, token] += value
    plain = Row(SamplingParams(1), 0)
    got = edited(logits, [plain, Row(params, len(answer), TokenHistory(prompt, answer)), plain])
    assert torch.allclose(got, expected, atol=1e-4)
    assert torch.equal(got[[0, 2]], logits[[0, 2]])


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.lists(st.integers(0, 9), max_size=6)),
        min_size=1,
        max_size=4,
    ),
    st.sets(st.integers(0, 3)),
    st.sampled_from([(0.5, 0.0, 0.3), (1.7, 1.5, -0.1)]),
)
def test_a_token_that_only_the_device_knows_is_penalised_alike(
    histories: list[tuple[list[int], list[int]]], late: set[int], rates: tuple[float, float, float]
) -> None:
    """late: the rows whose last token is not in their history yet, but in the slot of which they tell."""
    repetition, presence, frequency = rates
    params = SamplingParams(99, repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency)
    logits = torch.randn(len(histories) + 1, 10, generator=generator(len(histories))) * 3
    plain = Row(SamplingParams(1), 0, pending_slot=7)  # without penalties it does not matter
    last_tokens = torch.full((8,), 5, dtype=torch.int32)
    known, unknown = [plain], [plain]
    for i, (asked, answer) in enumerate(histories):
        known.append(Row(params, len(answer), TokenHistory(asked, answer)))
        if i in late and answer:
            last_tokens[3 - i] = answer[-1]
            unknown.append(Row(params, len(answer), TokenHistory(asked, answer[:-1]), pending_slot=3 - i))
        else:
            unknown.append(known[-1])
    got = logits.clone()
    edit_logits(got, prepare(unknown, 10, last_tokens=last_tokens))
    assert torch.equal(got, edited(logits, known))


def test_a_row_whose_last_token_only_the_device_knows_needs_the_devices() -> None:
    row = Row(SamplingParams(9, presence_penalty=1.0), 1, TokenHistory([1]), pending_slot=0)
    with pytest.raises(ValueError, match="last tokens"):
        prepare([row], 8)


@given(st.lists(st.integers(0, 50)), st.lists(st.integers(0, 10**6), max_size=600), st.lists(st.integers(0, 50)))
def test_a_history_counts_tokens(prompt: list[int], answer: list[int], more: list[int]) -> None:
    history = TokenHistory(prompt, answer)
    for token in more:
        history.append(token)
    counts = Counter(answer + more)
    assert dict(zip(history.tokens.tolist(), history.counts.tolist(), strict=True)) == {
        token: counts[token] for token in {*prompt, *answer, *more}
    }


def test_tokens_that_end_the_answer_are_banned_until_it_is_long_enough() -> None:
    eos = frozenset({3})
    params = SamplingParams(9, min_tokens=2, stop_token_ids=frozenset({5}), logit_bias={5: 100.0, 3: 50.0})
    for offset, banned in [(0, [3, 5]), (1, [3, 5]), (2, [])]:
        logits = edited(torch.zeros(1, 8), [Row(params, offset)], eos)
        assert torch.isinf(logits[0]).nonzero().flatten().tolist() == banned
    ignoring = SamplingParams(9, min_tokens=2, ignore_eos=True, logit_bias={5: 7.0})
    assert edited(torch.zeros(1, 8), [Row(ignoring, 0)], eos).tolist() == [[0, 0, 0, 0, 0, 7.0, 0, 0]]


def test_bans_that_leave_nothing_stop_nobody() -> None:
    params = SamplingParams(9, min_tokens=2, stop_token_ids=frozenset(range(4)))
    assert choose(torch.zeros(2, 4), [Row(params, 0), Row(SamplingParams(1, temperature=0.0), 0)]) == [0, 0]


def test_non_finite_logits_are_seen_behind_a_ban() -> None:
    logits = torch.zeros(1, 4)
    logits[0, 2] = math.nan
    with pytest.raises(NonFiniteLogits):
        choose(logits, [Row(SamplingParams(9, min_tokens=2, stop_token_ids=frozenset({2})), 0)])


def test_log_probabilities_are_the_models_own() -> None:
    logits = torch.randn(4, 30, generator=generator(2))
    own = logits.log_softmax(dim=-1)
    rows = [
        Row(SamplingParams(1, seed=1), 0),
        Row(SamplingParams(1, logprobs=0, temperature=0.0, logit_bias={7: 100.0}), 0),
        Row(SamplingParams(1, logprobs=20, top_k=3, temperature=0.3), 0),
        Row(SamplingParams(1, logprobs=2), 0),
    ]
    choices = sample(logits.clone(), prepare(rows, 30)).choices()
    assert choices[0].logprobs is None
    assert choices[1].token == 7
    for row, count in [(1, 0), (2, 20), (3, 2)]:
        report = choices[row].logprobs
        assert report is not None
        assert report.token == pytest.approx(own[row, choices[row].token].item(), abs=1e-5)
        ranked = own[row].sort(descending=True)
        assert [token for token, _ in report.top] == ranked.indices[:count].tolist()
        assert [value for _, value in report.top] == pytest.approx(ranked.values[:count].tolist(), abs=1e-5)


def test_what_needs_the_last_token_says_so() -> None:
    """The engine prepares all other rows one step ahead."""
    assert SamplingParams(1, grammar=Grammar(GrammarKind.JSON_OBJECT)).needs_last_token
    for params in ({"repetition_penalty": 1.1}, {"presence_penalty": 0.1}, {"frequency_penalty": -0.1}):
        asked = SamplingParams(1, **params)  # type: ignore[arg-type]
        assert not asked.needs_last_token
        with pytest.raises(ValueError, match="history"):
            prepare([Row(asked, 0)], 8)
    ahead = SamplingParams(
        9, top_k=3, top_p=0.5, min_p=0.1, logit_bias={1: 1}, logprobs=3, stop_token_ids=frozenset({1}), min_tokens=4
    )
    assert not ahead.needs_last_token
    prepare([Row(ahead, 3)], 8)


def test_tokens_outside_the_vocabulary_are_refused() -> None:
    SamplingParams(1, logit_bias={7: 1.0}, stop_token_ids=frozenset({7})).check_vocabulary(8)
    with pytest.raises(ValueError, match="logit_bias names token 8"):
        SamplingParams(1, logit_bias={8: 1.0}).check_vocabulary(8)
    with pytest.raises(ValueError, match="stop_token_ids names token 8"):
        SamplingParams(1, stop_token_ids=frozenset({8})).check_vocabulary(8)


def test_a_batch_of_other_rows_is_refused() -> None:
    batch = prepare([Row(SamplingParams(1), 0)], 8)
    for logits in (torch.zeros(2, 8), torch.zeros(1, 8, dtype=torch.float64), torch.zeros(1, 16)[:, ::2]):
        with pytest.raises(ValueError, match="contiguous float32 with 1 rows"):
            sample(logits, batch)


def test_no_rows_are_no_work() -> None:
    assert sample(torch.empty(0, 8), prepare([], 8)).choices() == []


def test_a_seed_decides_the_answer_whatever_runs_beside_it(tmp_path: Path) -> None:
    """Alone, in a batch, and resumed from the middle on: the same tokens."""
    torch.set_num_threads(1)
    memory = arena(24)
    served, _ = serve(memory, llama, tmp_path, "llama")
    served.load()
    params = SamplingParams(30, temperature=0.9, top_p=0.9, top_k=50, seed=123456789)
    asked = prompt(11)

    alone = served.instance()
    alone.add(Sequence("s", 0, list(asked), params))
    answer = tokens_of(run(alone), "s")
    assert len(set(answer)) > 10

    batch = served.instance(token_budget=16, max_batch=8)
    for i in range(4):
        batch.add(greedy(f"g{i}", prompt(5 + 7 * i, seed=i), 20))
    batch.add(Sequence("s", 0, list(asked), params))
    batch.add(Sequence("t", 0, list(asked), SamplingParams(30, temperature=0.9, seed=5)))
    outputs = run(batch)
    assert tokens_of(outputs, "s") == answer
    assert tokens_of(outputs, "t") != answer

    resumed = served.instance()
    resumed.add(Sequence("s", 1, asked + answer[:13], params, num_generated=13))
    assert tokens_of(run(resumed), "s", attempt=1) == answer[13:]
    memory.close()
