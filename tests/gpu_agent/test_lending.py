"""KV takes pages back from warm weights: what it takes, from whom, and what prewarming leaves to instances."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.gpu_agent.arena.arena import Arena
from services.gpu_agent.arena.pages import OutOfPages
from services.gpu_agent.arena.weight_range import WeightRange
from services.gpu_agent.engine.lending import promised_pages
from services.gpu_agent.expectation import sequences_per_instance
from services.gpu_agent.weights.loader import load
from tests.gpu_agent.arena_backends import EACH, Backend
from tests.gpu_agent.checkpoints import llama, mistral
from tests.gpu_agent.serving import arena as host_arena
from tests.gpu_agent.serving import generate, greedy, prompt, run, serve, tokens_of
from warmserve.v1 import cluster_pb2

TOTAL = 10
PATIENCE = 30


@pytest.fixture(params=EACH)
def backend(request: pytest.FixtureRequest) -> Backend:
    kind: Backend = request.param
    return kind


@pytest.fixture
def arena(backend: Backend) -> Iterator[Arena]:
    made = Arena(backend.memory(TOTAL))
    yield made
    made.check()
    backend.settle()
    made.close()


# The rule

LOADS = {
    "total": st.integers(1, 3000),
    "max_batch": st.integers(1, 256),
    "running": st.integers(0, 256),
    "in_use": st.integers(0, 3000),
    "expected": st.floats(0, 1000),
}


@given(**LOADS)
def test_a_promise_covers_what_is_in_use_and_is_never_more_than_there_is(
    total: int, max_batch: int, running: int, in_use: int, expected: float
) -> None:
    running, in_use = min(running, max_batch), min(in_use, total)
    promise = promised_pages(total, running, max_batch, in_use, expected)
    assert in_use <= promise <= total
    assert promise >= min(total, in_use + total / max_batch)
    assert promise >= total * running / max_batch


@given(**LOADS, more=st.floats(0, 100))
def test_a_forecast_only_adds_to_the_published_bound(
    total: int, max_batch: int, running: int, in_use: int, expected: float, more: float
) -> None:
    running, in_use = min(running, max_batch), min(in_use, total)
    published = promised_pages(total, running, max_batch, in_use, 0.0)
    with_forecast = promised_pages(total, running, max_batch, in_use, expected)
    assert published <= with_forecast <= promised_pages(total, running, max_batch, in_use, expected + more)


def test_a_forecast_burst_is_kept_room_for_before_it_comes() -> None:
    assert promised_pages(total=64, running=0, max_batch=8, in_use=0, expected=0) == 8
    assert promised_pages(total=64, running=0, max_batch=8, in_use=0, expected=5) == 40
    # Sequences that are large now are expected to be so then.
    assert promised_pages(total=64, running=2, max_batch=8, in_use=24, expected=4) == 48


def test_an_instance_is_expected_to_run_its_share_of_the_forecasts_peak() -> None:
    forecast = cluster_pb2.Forecast(model="m")
    for p90 in (6, 12, 90):
        forecast.windows.add().peak_load.p90 = p90
    records = [cluster_pb2.InstanceRecord(model=name) for name in ("m", "other", "m", "m")]
    assert sequences_per_instance("m", [cluster_pb2.Forecast(model="x"), forecast], records) == 4
    assert sequences_per_instance("m", [forecast], []) == 12
    assert sequences_per_instance("other", [forecast], records) == 0


# The arena


def test_kv_takes_pages_from_the_end_of_the_least_valuable_first(arena: Arena, backend: Backend) -> None:
    news: list[tuple[str, int, str]] = []
    arena.on_taken_back = lambda *told: news.append(told)
    ranges = {}
    for name, pages, value in (("dear", 3, (2.0, 0.0)), ("old", 3, (1.0, 5.0)), ("new", 2, (1.0, 9.0))):
        ranges[name] = arena.add_weights(name, pages * backend.page)
        ranges[name].grow(pages)
        ranges[name].offer(value)
    assert (arena.usage().lent, arena.free_pages) == (8, 2)
    assert arena.kv_within_reach("i") == TOTAL
    assert len(arena.take_kv("i", 1)) == 1  # free pages first
    assert news == []
    assert len(arena.take_kv("i", 2)) == 2
    assert {name: held.resident_pages for name, held in ranges.items()} == {"dear": 3, "old": 2, "new": 2}
    assert not backend.mapped(ranges["old"].tensor(torch.uint8, (1,), 2 * backend.page).data_ptr())
    assert len(set(arena.take_kv("i", 6))) == 6
    assert {name: held.resident_pages for name, held in ranges.items()} == {"dear": 1, "old": 0, "new": 0}
    assert news == [("old", 1, "i"), ("old", 2, "i"), ("new", 2, "i"), ("dear", 2, "i")]
    with pytest.raises(OutOfPages):
        arena.take_kv("i", 2)
    assert ranges["dear"].resident_pages == 1  # nothing is taken in vain
    arena.check()


def test_what_is_withheld_or_in_use_is_not_taken(arena: Arena, backend: Backend) -> None:
    weights = arena.add_weights("m", 4 * backend.page)
    weights.grow(4)
    weights.offer((0.0, 0.0))
    with weights.in_use(), pytest.raises(OutOfPages):
        arena.take_kv("i", TOTAL - 3)
    assert weights.withhold() == 4
    with pytest.raises(OutOfPages):
        arena.take_kv("i", TOTAL - 3)
    assert arena.kv_within_reach("i") == TOTAL - 4
    weights.offer((0.0, 0.0))
    arena.take_kv("i", TOTAL - 3)
    assert weights.resident_pages == 3


def test_warming_leaves_instances_what_they_were_promised_and_a_wake_does_not(arena: Arena, backend: Backend) -> None:
    weights = arena.add_weights("m", TOTAL * backend.page)
    weights.offer((9.0, 9.0))
    arena.take_kv("i", 2)
    arena.promise_kv("i", 5)
    assert (arena.usage().free, arena.usage().promised) == (TOTAL - 2, 3)
    weights.grow(TOTAL - 5)
    with pytest.raises(OutOfPages):
        weights.grow(1)
    weights.withhold()
    weights.grow(1)
    arena.promise_kv("i", 0)
    weights.offer((9.0, 9.0))
    weights.grow(2)
    assert arena.free_pages == 0


def test_a_wake_takes_back_what_it_needs_and_prewarming_does_not(arena: Arena, backend: Backend) -> None:
    warm = arena.add_weights("warm", 8 * backend.page)
    warm.grow(8)
    warm.offer((1.0, 0.0))
    other = arena.add_weights("other", 6 * backend.page)
    other.offer((2.0, 0.0))
    with pytest.raises(OutOfPages):
        other.grow(3)
    other.withhold()
    with other.filling() as filling:
        filling.claim()
        assert warm.resident_pages == 4
        warm.withhold()
        assert len(filling.map(6)) == 6  # they are its own now, whatever happens to others
    assert arena.free_pages == 6


def test_kv_does_not_wait_for_a_page_that_is_being_written(arena: Arena, backend: Backend) -> None:
    """Warming is cut short at once: what is resident is taken, and the page on its way is given back by the loader."""
    weights = arena.add_weights("m", 8 * backend.page)
    weights.grow(5)
    weights.offer((0.0, 0.0))
    with weights.filling() as filling:
        (page,) = filling.map(1)
        assert len(arena.take_kv("i", TOTAL - 2)) == TOTAL - 2  # four free ones, and four of the five
        assert filling.overtaken
        page.fill_(1)  # the copy that was under way touches nobody's page
        backend.settle()
        assert not filling.done()
    assert (weights.resident_pages, arena.free_pages) == (1, 1)
    arena.check()


def test_kv_finds_pages_that_are_freed_while_it_takes_lent_ones(
    arena: Arena, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An eviction may come first: the pages are there all the same, and nobody is preempted for them."""
    weights = arena.add_weights("m", 6 * backend.page)
    weights.grow(6)
    weights.offer((0.0, 0.0))
    take_back = WeightRange.take_back

    def evicted_first(lender: WeightRange, n: int, owner: str) -> list[int]:
        lender.shrink(0)
        return take_back(lender, n, owner)

    monkeypatch.setattr(WeightRange, "take_back", evicted_first)
    assert len(set(arena.take_kv("i", TOTAL))) == TOTAL


def test_pages_that_warming_writes_are_within_kvs_reach(arena: Arena, backend: Backend) -> None:
    """They can be had as soon as they hold their data: no request is too large because of them."""
    weights = arena.add_weights("m", 6 * backend.page)
    weights.grow(2)
    weights.offer((0.0, 0.0))
    with weights.filling() as filling:
        filling.map(2)
        assert arena.kv_within_reach("i") == arena.kv_share("i") == TOTAL
        weights.withhold()  # a wake
        assert arena.kv_within_reach("i") == TOTAL - 4
        backend.settle()


def test_many_takers_and_a_loader_never_share_a_page(arena: Arena, backend: Backend) -> None:
    kv = arena.kv_view(torch.float32).view(TOTAL, backend.per_page)
    stop, failures = threading.Event(), list[str]()
    models = [arena.add_weights(name, 4 * backend.page) for name in ("a", "b")]

    def load_and_lose(number: int) -> None:
        weights = models[number]
        tensor = weights.tensor(torch.float32, (4, backend.per_page), 0)
        weights.offer((float(number), 0.0))
        while not stop.is_set():
            try:
                with weights.filling() as filling:
                    while filling.first < 4 and not filling.overtaken and weights.resident_pages < 4:
                        filling.map(1)[0].view(torch.float32).fill_(number + 1)
                        backend.settle()
                        filling.done()
            except OutOfPages:
                continue
            with weights.in_use():
                held = weights.resident_pages
                if not bool((tensor[:held] == number + 1).all()):
                    failures.append(f"model {number} lost data that it holds")

    def compute(name: str) -> None:
        mark = -float(ord(name))
        for _ in range(150):
            try:
                pages = arena.take_kv(name, 3)
            except OutOfPages:
                continue
            kv[pages] = mark
            backend.settle()
            if not bool((kv[pages] == mark).all()):
                failures.append(f"instance {name} lost its pages' data")
            arena.give_kv(name, pages)

    loaders = [threading.Thread(target=load_and_lose, args=(number,)) for number in range(2)]
    takers = [threading.Thread(target=compute, args=(name,)) for name in "xyz"]
    for thread in loaders + takers:
        thread.start()
    for thread in takers:
        thread.join(60)
    stop.set()
    for thread in loaders:
        thread.join(60)
    assert not any(thread.is_alive() for thread in loaders + takers)
    assert failures == []
    arena.check()
    assert arena.usage().kv == 0


# Loads and instances


def test_a_load_ends_where_kv_takes_its_pages(tmp_path: Path) -> None:
    memory = host_arena(24)
    served, _ = serve(memory, llama, tmp_path, "llama")
    served.weights.offer((0.0, 0.0))
    total = served.weights.num_pages

    def steal(_: object) -> None:
        if served.weights.resident_pages == 4:
            memory.take_kv("i", memory.free_pages + 2)

    done = load(served.image, served.weights, cancel=threading.Event(), progress=steal)
    assert (done.overtaken, done.complete, done.pages_done) == (True, False, served.weights.resident_pages)
    assert served.weights.resident_pages < total
    memory.check()
    memory.close()


def test_no_sequence_is_preempted_while_warm_pages_can_be_taken(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    memory = host_arena(26)
    active, reference = serve(memory, llama, tmp_path, "llama")
    warm, _ = serve(memory, mistral, tmp_path, "mistral")
    active.load()
    warm.load()
    instance = active.instance(max_batch=4)
    memory.take_kv("somebody", memory.free_pages)
    warm.weights.offer((1.0, 0.0))
    before = warm.weights.resident_pages
    prompts = {f"r{n}": prompt(40 + n) for n in range(4)}
    for name, asked in prompts.items():
        instance.add(greedy(name, asked, 40))
    outputs = run(instance)
    for name, asked in prompts.items():
        assert tokens_of(outputs, name) == generate(reference, asked, 40)
    assert instance.stats.preemptions == 0
    assert warm.weights.resident_pages < before
    # What is left is right, and loads only what is missing.
    warm.weights.withhold()
    instance.close("done")
    seen: list[int] = []
    load(warm.image, warm.weights, cancel=threading.Event(), progress=lambda p: seen.append(p.pages_done))
    assert warm.weights.complete
    assert len(seen) == before - (seen[0] - 1)
    memory.close()


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 8)), max_size=20))
def test_a_promise_never_outlives_the_need_for_it(loads: list[tuple[int, int]]) -> None:
    memory = host_arena(TOTAL, page_bytes=4096)
    for running, in_use in loads:
        memory.promise_kv("i", promised_pages(TOTAL, running, 4, min(in_use, TOTAL), 0))
        assert 0 <= memory.usage().promised <= memory.free_pages
    memory.promise_kv("i", 0)
    assert memory.usage().promised == 0
    memory.close()
