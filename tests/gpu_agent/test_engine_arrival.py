"""Prompts computed while their model's weights arrive, layer by layer."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from services.gpu_agent.arena.arena import Arena
from services.gpu_agent.engine.arrival import Behind, enters_before_use, with_norms_behind
from services.gpu_agent.engine.instance import Instance
from services.gpu_agent.engine.loop import EngineLoop
from services.gpu_agent.engine.sequence import FinishReason
from services.gpu_agent.engine.step import Pending, StepResult
from tests.gpu_agent import checkpoints
from tests.gpu_agent.arena_backends import append
from tests.gpu_agent.serving import Served, arena, generate, greedy, prompt, run, serve, tokens_of
from tests.gpu_agent.test_engine_loop import Listener

PAGE = 1 << 14


@pytest.fixture
def memory() -> Iterator[Arena]:
    torch.set_num_threads(1)
    made = arena(400, page_bytes=PAGE)
    yield made
    made.check()
    made.close()


def next_page(served: Served) -> None:
    append(served.weights, served.image.read_page)


def waiting(served: Served, asked: list[int]) -> tuple[Instance, Behind]:
    """An instance whose only step waits for weights, and that step: of request "r", for 4 tokens."""
    instance = served.instance()
    instance.add(greedy("r", asked, 4))
    instance.launch()
    behind = instance._flights[-1].pending
    assert isinstance(behind, Behind)
    return instance, behind


@pytest.mark.parametrize("family", checkpoints.CONFIGS)
def test_every_family_computes_behind_its_weights_and_never_touches_what_is_not_there(
    memory: Arena, tmp_path: Path, family: str
) -> None:
    """A layer that began too early would end this process: its pages are not mapped."""
    served, reference = serve(memory, partial(checkpoints.checkpoint, family), tmp_path, family)
    instance = served.instance()
    asked = prompt(37)
    instance.add(greedy("r", asked, 6))
    assert instance.launch()
    assert instance.is_behind
    stops = {served.model.gates[0].pages}
    while not instance.advance():
        assert (instance.in_flight, instance.depth) == (1, 1)  # nothing may overtake it
        stops.add(instance._flights[-1].pending._needed)  # type: ignore[attr-defined]
        next_page(served)
    assert len(stops) > reference.config.get_text_config().num_hidden_layers
    while not served.weights.complete:
        next_page(served)
    instance.collect()
    assert tokens_of(instance.news() + run(instance), "r") == generate(reference, asked, 6)
    instance.close("done")


def test_resident_layers_are_computed_at_once_and_the_rest_waits(memory: Arena, tmp_path: Path) -> None:
    served, reference = serve(memory, checkpoints.llama, tmp_path, "llama")
    while served.weights.resident_pages < served.weights.num_pages - 1:
        next_page(served)
    instance = served.instance()
    asked = prompt(20)
    instance.add(greedy("r", asked, 4))
    assert instance.launch()
    assert not instance.advance()
    assert not instance.advance()  # asked again, it neither waits nor goes on
    next_page(served)
    assert instance.advance()
    instance.collect()
    assert tokens_of(instance.news() + run(instance), "r") == generate(reference, asked, 4)
    instance.close("done")


@pytest.mark.parametrize(("left", "at_once"), [(0, True), (1, True), (-1, False)])
def test_a_step_whose_weights_come_while_much_is_left_is_computed_at_once(
    memory: Arena, tmp_path: Path, left: int, at_once: bool
) -> None:
    """left: the gate, counted as in a list, that waits when all the rest of the weights come."""
    served, reference = serve(memory, checkpoints.llama, tmp_path, "llama")
    asked = prompt(20)
    instance, behind = waiting(served, asked)
    called = []

    def whole() -> Pending:
        called.append(served.weights.complete)
        return compute()

    compute, behind._at_once = behind._compute, whole
    while served.weights.resident_pages < served.model.gates[left].pages - 1:
        next_page(served)
        instance.advance()
    while not served.weights.complete:
        next_page(served)
    assert instance.advance()
    instance.collect()
    assert called == ([True] if at_once else [])
    assert tokens_of(instance.news() + run(instance), "r") == generate(reference, asked, 4)
    instance.close("done")


def test_a_pass_of_the_engines_thread_is_nobodys_to_stop(memory: Arena, tmp_path: Path) -> None:
    """As when the rest of the graphs is captured while a prompt waits between two layers, and all weights have come."""
    served, reference = serve(memory, checkpoints.llama, tmp_path, "llama")
    asked = prompt(20)
    instance, behind = waiting(served, asked)
    behind._at_once = behind._compute
    while served.weights.resident_pages < served.model.gates[1].pages:
        next_page(served)
        assert not instance.advance()
    while not served.weights.complete:
        next_page(served)
    other = served.instance()
    other.add(greedy("o", asked, 4))
    assert tokens_of(run(other), "o") == generate(reference, asked, 4)
    other.close("done")
    assert instance.advance()
    instance.collect()
    assert tokens_of(instance.news() + run(instance), "r") == generate(reference, asked, 4)
    instance.close("done")


def test_a_step_that_is_not_wanted_any_more_ends_where_it_is(memory: Arena, tmp_path: Path) -> None:
    served, _ = serve(memory, checkpoints.llama, tmp_path, "llama")
    threads = threading.active_count()
    instance = served.instance()
    instance.add(greedy("r", prompt(20), 4))
    instance.launch()
    next_page(served)
    instance.advance()
    (output,) = instance.close("its weights do not come")
    assert (output.finish_reason, output.error) == (FinishReason.ERROR, "its weights do not come")
    assert memory.usage().kv == 0
    assert threading.active_count() == threads
    served.weights.shrink(0)


class _Early(nn.Module):
    """Uses the second layer's weight before it calls the second layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(2))

    def forward(self, x: torch.Tensor, early: bool) -> torch.Tensor:
        x = self.layers[0](x)
        if early:
            x = x + next(self.layers[1].parameters()).sum()
        last: torch.Tensor = self.layers[1](x)
        return last


def test_a_model_that_uses_weights_of_layers_it_has_not_entered_is_found() -> None:
    with torch.device("meta"):
        module, x = _Early(), torch.zeros(1, 4)
    assert enters_before_use(module, lambda: module(x, early=False))
    assert not enters_before_use(module, lambda: module(x, early=True))


def test_layers_that_compute_the_next_norm_wait_for_it(memory: Arena, tmp_path: Path) -> None:
    served, _ = serve(memory, checkpoints.llama, tmp_path, "llama")
    own, shifted = served.model.gates, with_norms_behind(served.model.gates)
    assert [gate.module for gate in own] == [gate.module for gate in shifted]
    for gate, following, moved in zip(own, own[1:], shifted, strict=False):
        assert moved.pages == max(gate.pages, following.pages)


def test_others_go_on_while_an_instance_waits_for_weights(memory: Arena, tmp_path: Path) -> None:
    late, late_reference = serve(memory, checkpoints.llama, tmp_path, "late")
    other, other_reference = serve(memory, checkpoints.mistral, tmp_path, "other")
    other.load()
    listener = Listener()
    engine = EngineLoop(listener.on_step, listener.on_failure)
    waiting, going = late.instance(), other.instance()
    engine.activate(waiting)
    engine.activate(going)
    engine.submit(waiting.id, greedy("late", prompt(30), 8))
    engine.submit(going.id, greedy("before", prompt(10), 60))
    engine.start()
    listener.wait_ended("before")
    assert not any(output.request_id == "late" for output in listener.outputs)
    while not late.weights.complete:
        next_page(late)
        engine.look()
    engine.submit(going.id, greedy("after", prompt(11), 60))
    listener.wait_ended("late", "after")
    assert tokens_of(listener.outputs, "late") == generate(late_reference, prompt(30), 8)
    for name, length in (("before", 10), ("after", 11)):
        assert tokens_of(listener.outputs, name) == generate(other_reference, prompt(length), 60)
    engine.stop()


class _Slow:
    """A step that says that it took the device long, as one does that was interrupted by others'."""

    def result(self) -> StepResult:
        return StepResult([], 1000.0)


def test_waiting_is_not_computing(memory: Arena) -> None:
    """Else an instance would have no turn for as long as its weights took to arrive."""
    weights = memory.add_weights("m", PAGE)
    behind = Behind(_Slow, (), weights)
    assert behind.advance()
    assert behind.result().seconds < 1000


def test_an_instance_that_waits_for_weights_can_be_ended(memory: Arena, tmp_path: Path) -> None:
    late, _ = serve(memory, checkpoints.llama, tmp_path, "late")
    listener = Listener()
    engine = EngineLoop(listener.on_step, listener.on_failure)
    instance = late.instance()
    engine.activate(instance)
    engine.submit(instance.id, greedy("r", prompt(30), 8))
    engine.start()
    next_page(late)
    engine.look()
    engine.deactivate(instance.id).result(30)
    listener.wait_ended("r")
    late.weights.shrink(0)  # nobody computes with them any more
    assert memory.usage().kv == 0
    engine.stop()
