"""An instance's dealings with requests: limits, deadlines, cancellation, repeats, and damaged weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from services.gpu_agent.engine.sampling import NonFiniteLogits
from services.gpu_agent.engine.sampling_params import SamplingParams
from services.gpu_agent.engine.sequence import FinishReason, Sequence
from tests.gpu_agent.checkpoints import llama
from tests.gpu_agent.serving import Served, arena, end_of, generate, greedy, prompt, run, serve, tokens_of


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, PreTrainedModel]]:
    torch.set_num_threads(1)
    memory = arena(24)
    served, reference = serve(memory, llama, tmp_path_factory.mktemp("models"), "llama")
    served.load()
    yield served, reference
    memory.close()


@pytest.fixture
def served(both: tuple[Served, PreTrainedModel]) -> Served:
    return both[0]


def test_the_context_ends_an_answer(both: tuple[Served, PreTrainedModel]) -> None:
    served, reference = both
    instance = served.instance(context_tokens=20)
    instance.add(greedy("a", prompt(15), 99))
    outputs = run(instance)
    assert tokens_of(outputs, "a") == generate(reference, prompt(15), 5)
    assert end_of(outputs, "a").finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize(
    ("ids", "generated", "error"),
    [
        ([], 0, "prompt is empty"),
        ([5, 6], 2, "prompt is empty"),
        ([3] * 20, 0, "20 tokens; the context holds 20"),
        ([3, 512], 0, "below 512"),
        ([3, -1], 0, "at least 0"),
    ],
)
def test_what_cannot_be_run_ends_with_the_reason(served: Served, ids: list[int], generated: int, error: str) -> None:
    instance = served.instance(context_tokens=20)
    instance.add(greedy("good", prompt(4), 3))
    instance.add(greedy("bad", ids, 9, num_generated=generated))
    outputs = run(instance)
    assert end_of(outputs, "bad").finish_reason is FinishReason.ERROR
    assert error in end_of(outputs, "bad").error
    assert len(tokens_of(outputs, "good")) == 3


def test_too_large_for_all_pages_ends_with_the_numbers(served: Served) -> None:
    instance = served.instance()
    taken = served.arena.free_pages - 1
    weights = served.arena.add_weights("filler", taken * served.arena.page_bytes)
    weights.grow(taken)  # weights are not for KV, so one page is all there can be
    slots = instance._kv.slots_per_page
    tokens = slots * 4
    instance.add(greedy("large", prompt(tokens), 5))
    instance.add(greedy("fits", prompt(tokens - 4), 4))
    outputs = run(instance)
    assert end_of(outputs, "large").finish_reason is FinishReason.TOO_LARGE
    assert f"{tokens + 1} tokens need {slots + 1} KV blocks" in end_of(outputs, "large").error
    assert len(tokens_of(outputs, "fits")) == 4
    weights.remove()


def test_stalls_while_others_hold_the_pages(served: Served) -> None:
    """The engine's loop relies on it, so as not to spin."""
    instance = served.instance()
    taken = served.arena.take_kv("somebody", served.arena.free_pages)
    instance.add(greedy("a", prompt(6), 4))
    assert not instance.launch()
    assert (instance.news(), instance.in_flight, instance.has_work) == ([], 0, True)
    served.arena.give_kv("somebody", taken)
    outputs = instance.step()
    assert len(tokens_of(outputs + run(instance), "a")) == 4


@pytest.mark.parametrize("generated", [6, 7])
def test_resumed_behind_its_last_token(served: Served, generated: int) -> None:
    instance = served.instance()
    instance.add(greedy("a", prompt(10), 6, num_generated=generated))
    (output,) = run(instance)
    assert (output.token_ids, output.offset, output.finish_reason) == ([], generated, FinishReason.LENGTH)


def test_resumed_behind_its_end_of_sequence(served: Served) -> None:
    instance = served.instance(eos=True)
    instance.add(greedy("a", [*prompt(5), 2], 6, num_generated=1))
    instance.add(greedy("b", [*prompt(5), 2], 6))  # in the prompt it means nothing
    ignoring = SamplingParams(6, temperature=0.0, ignore_eos=True)
    instance.add(Sequence("c", 0, [*prompt(5), 2], ignoring, num_generated=1))
    outputs = run(instance)
    assert (tokens_of(outputs, "a"), end_of(outputs, "a").finish_reason) == ([], FinishReason.STOP)
    assert len(tokens_of(outputs, "b")) >= 1
    assert len(tokens_of(outputs, "c")) == 5


def test_cancel_running_and_waiting(served: Served) -> None:
    instance = served.instance(max_batch=2)
    for name in "abc":
        instance.add(greedy(name, prompt(6, seed=ord(name)), 8))
    outputs = instance.step()
    assert (instance.stats.running, instance.stats.waiting) == (2, 1)
    for name in ("a", "c", "unknown"):
        instance.cancel(name)
    outputs += run(instance)
    assert end_of(outputs, "a").finish_reason is FinishReason.CANCELLED
    assert len(tokens_of(outputs, "a")) == end_of(outputs, "a").offset == 1
    assert tokens_of(outputs, "c") == []
    assert len(tokens_of(outputs, "b")) == 8
    assert instance.stats.kv_pages == 0


def test_deadlines(served: Served) -> None:
    now = 100.0
    instance = served.instance(max_batch=2, clock=lambda: now)
    instance.add(greedy("a", prompt(6), 8, deadline=101.0))
    instance.add(greedy("b", prompt(7), 8))
    instance.add(greedy("c", prompt(8), 8, deadline=100.5))
    assert instance.next_deadline == 100.5
    outputs = instance.step() + instance.step()
    now = 101.0
    outputs += run(instance)
    assert len(tokens_of(outputs, "a")) == 2
    assert [end_of(outputs, name).finish_reason for name in "abc"] == [
        FinishReason.DEADLINE,
        FinishReason.LENGTH,
        FinishReason.DEADLINE,
    ]


def test_the_prompt_that_is_passed_stays_as_it_is(served: Served) -> None:
    instance, ids = served.instance(), prompt(5)
    instance.add(Sequence("r", 0, ids, SamplingParams(3, temperature=0.0)))
    assert len(tokens_of(run(instance), "r")) == 3
    assert ids == prompt(5)


def test_delivered_twice_is_run_once(served: Served) -> None:
    instance = served.instance()
    instance.add(greedy("a", prompt(6), 4))
    instance.step()
    instance.add(greedy("a", prompt(6), 4))
    assert len(tokens_of(run(instance), "a")) == 3
    # A later attempt is another sequence.
    instance.add(greedy("a", prompt(6), 4))
    instance.add(Sequence("a", 1, prompt(6), SamplingParams(4, temperature=0.0)))
    outputs = run(instance)
    assert tokens_of(outputs, "a") == tokens_of(outputs, "a", attempt=1)


def test_damaged_weights_are_an_error(served: Served) -> None:
    weight = served.model.module.get_parameter("model.layers.1.mlp.down_proj.weight")
    good = weight.clone()
    instance = served.instance()
    instance.add(greedy("a", prompt(6), 4))
    instance.add(greedy("b", prompt(9), 4))
    outputs = instance.step()
    weight.data[3, 3] = float("nan")
    with pytest.raises(NonFiniteLogits, match="2 of 2 sequences"):
        instance.step()
    outputs += instance.close("damaged")
    weight.data.copy_(good)
    assert [(end_of(outputs, n).finish_reason, end_of(outputs, n).error) for n in "ab"] == [
        (FinishReason.ERROR, "damaged")
    ] * 2
    assert not instance.has_work
    assert served.arena.usage().kv == 0


def test_reserved_pages_stay(served: Served) -> None:
    instance = served.instance()
    instance._kv.reserve(2)
    instance.add(greedy("a", prompt(6), 4))
    run(instance)
    assert served.arena.usage().kv == 2
    instance.close("over")
    assert served.arena.usage().kv == 0


def test_a_batch_larger_than_the_token_budget(served: Served) -> None:
    instance = served.instance(max_batch=6, token_budget=2)
    for i in range(6):
        instance.add(greedy(str(i), prompt(3, seed=i), 4))
    outputs = run(instance)
    assert [len(tokens_of(outputs, str(i))) for i in range(6)] == [4] * 6


def test_stats(served: Served) -> None:
    instance = served.instance()
    instance.add(greedy("a", prompt(6), 4))
    run(instance)
    stats = instance.stats
    assert (stats.steps, stats.computed_tokens, stats.generated_tokens) == (4, 9, 4)
    assert (stats.running, stats.waiting, stats.kv_blocks) == (0, 0, 0)


def test_bfloat16(tmp_path: Path) -> None:
    """Weights and KV in bfloat16; its rounding differs with the batch, so only the first token is compared."""
    memory = arena(12)
    served, reference = serve(memory, lambda folder: llama(folder, dtype=torch.bfloat16), tmp_path, "llama")
    served.load()
    assert served.model.kv_spec.dtype == torch.bfloat16
    instance = served.instance(token_budget=16, max_batch=4)
    for n in (3, 30):
        instance.add(greedy(f"p{n}", prompt(n), 6))
    outputs = run(instance)
    for n in (3, 30):
        answer = tokens_of(outputs, f"p{n}")
        assert len(answer) == 6
        assert answer[0] == generate(reference, prompt(n), 1)[0]
    memory.close()
