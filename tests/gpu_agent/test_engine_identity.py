"""Greedy output is that of transformers' `generate`, token by token, whatever happens around a request."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from transformers import PreTrainedModel

from services.gpu_agent.engine.sequence import FinishReason
from tests.gpu_agent.checkpoints import FAMILIES, SLIDING_WINDOW
from tests.gpu_agent.serving import Served, arena, end_of, generate, greedy, prompt, run, serve, tokens_of

# Shorter than a KV block, longer than the sliding window, and longer than several chunks.
PROMPTS = {f"r{length}": prompt(length) for length in (1, 3, 8, 9, 21, 40)}
TOKENS = {name: 12 + 3 * i for i, name in enumerate(PROMPTS)}


@dataclass
class Case:
    served: Served
    other: Served
    reference: PreTrainedModel
    expected: dict[str, list[int]]


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("models")
    shared = arena(40)
    served, reference = serve(shared, FAMILIES[request.param], folder, request.param)
    another = next(name for name in sorted(FAMILIES) if name != request.param)
    other, _ = serve(shared, FAMILIES[another], folder, another)
    served.load()
    expected = {name: generate(reference, PROMPTS[name], TOKENS[name]) for name in PROMPTS}
    yield Case(served, other, reference, expected)
    shared.close()


def test_the_references_differ_from_one_another(case: Case) -> None:
    """Else the tests below would not notice if sequences were mixed up."""
    answers = [tuple(answer) for answer in case.expected.values()]
    assert len(set(answers)) == len(answers)
    assert all(len(set(answer)) > 3 for answer in answers)


@pytest.mark.parametrize("name", PROMPTS)
def test_alone(case: Case, name: str) -> None:
    instance = case.served.instance()
    instance.add(greedy(name, PROMPTS[name], TOKENS[name]))
    outputs = run(instance)
    assert tokens_of(outputs, name) == case.expected[name]
    assert end_of(outputs, name).finish_reason is FinishReason.LENGTH
    assert instance.stats.kv_pages == 0


@pytest.mark.parametrize("token_budget", [6, 17, 512])
def test_mixed_batch(case: Case, token_budget: int) -> None:
    """Different lengths together; with a small budget, long prompts are computed in chunks while others decode."""
    instance = case.served.instance(token_budget=token_budget, max_batch=6)
    outputs = []
    for name in PROMPTS:
        instance.add(greedy(name, PROMPTS[name], TOKENS[name]))
        outputs += instance.step()
    outputs += run(instance)
    assert {name: tokens_of(outputs, name) for name in PROMPTS} == case.expected
    assert instance.stats.kv_pages == 0


def test_chunks_run_beside_decodes(case: Case) -> None:
    """What test_mixed_batch relies on: a prefill in chunks does not hold up a sequence that decodes."""
    instance = case.served.instance(token_budget=6, max_batch=6)
    instance.add(greedy("r3", PROMPTS["r3"], TOKENS["r3"]))
    assert [o.request_id for o in instance.step()] == ["r3"]
    instance.add(greedy("r40", PROMPTS["r40"], TOKENS["r40"]))
    for _ in range(7):
        assert [o.request_id for o in instance.step()] == ["r3"]
    assert [o.request_id for o in instance.step()] == ["r3", "r40"]
    instance.close("over")


def test_after_eviction_and_reload(case: Case) -> None:
    """The weights' pages serve another model in between; the bound module stays the same."""
    served, other = case.served, case.other
    addresses = [p.data_ptr() for p in served.model.module.parameters()]
    free = served.arena.free_pages
    served.weights.shrink(0)
    # All pages but the other model's are dirtied, so that nothing of the old weights is left to be found.
    other.load()
    pages = served.arena.take_kv("dirt", served.arena.free_pages)
    view = served.arena.kv_view(torch.uint8).view(served.arena.num_pages, -1)
    view[pages] = 0xFF  # NaN in any format
    served.arena.give_kv("dirt", pages)
    instance = other.instance()
    instance.add(greedy("x", PROMPTS["r9"], 5))
    assert len(tokens_of(run(instance), "x")) == 5
    served.load()  # on other pages than before, because the other model has some of those
    other.weights.shrink(0)
    assert served.arena.free_pages == free
    assert [p.data_ptr() for p in served.model.module.parameters()] == addresses
    test_mixed_batch(case, 17)


def test_preemption(case: Case) -> None:
    """With too few KV pages for all, sequences are preempted and computed anew."""
    served = case.served
    longest = max(len(PROMPTS[name]) + TOKENS[name] for name in PROMPTS)
    instance = served.instance(token_budget=24, max_batch=6)
    kv = instance._kv
    # As many pages as the longest alone needs: more than one slot each, so that the others fit beside it at first.
    pages = -(-kv.spec.blocks_for(longest) // kv.slots_per_page)
    spare = served.arena.take_kv("spare", served.arena.free_pages - pages)
    slots = kv.slots_per_page * pages - kv.spec.blocks_for(longest)
    held = kv.try_alloc(slots)  # and no slot more
    assert held is not None
    for name in PROMPTS:
        instance.add(greedy(name, PROMPTS[name], TOKENS[name]))
    outputs = run(instance)
    assert {name: tokens_of(outputs, name) for name in PROMPTS} == case.expected
    assert instance.stats.preemptions > 0
    kv.free(held)
    assert instance.stats.kv_pages == 0
    served.arena.give_kv("spare", spare)


def test_resumed_in_the_middle(case: Case) -> None:
    """A request put back with the tokens it already had goes on as if nothing had happened."""
    name, cut = "r21", 7
    instance = case.served.instance()
    instance.add(greedy(name, PROMPTS[name] + case.expected[name][:cut], TOKENS[name], num_generated=cut))
    outputs = run(instance)
    assert outputs[0].offset == cut
    assert tokens_of(outputs, name) == case.expected[name][cut:]


def test_end_of_sequence(case: Case) -> None:
    """An answer ends with the end-of-sequence token, as generate's does, unless that is to be ignored."""
    expected = case.expected["r9"]
    eos = expected[4]
    short = generate(case.reference, PROMPTS["r9"], TOKENS["r9"], eos)
    assert 0 < len(short) <= 5
    instance = case.served.instance()
    instance._eos_ids = frozenset([eos])
    instance.add(greedy("r9", PROMPTS["r9"], TOKENS["r9"]))
    outputs = run(instance)
    assert tokens_of(outputs, "r9") == short
    assert end_of(outputs, "r9").finish_reason is FinishReason.STOP


def test_prompts_exceed_the_window() -> None:
    assert max(len(p) for p in PROMPTS.values()) > 2 * SLIDING_WINDOW
