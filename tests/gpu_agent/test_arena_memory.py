"""The arena on real memory, the host's and the GPU's: data stays where it was put, addresses stay valid."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from typing import ClassVar

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from services.gpu_agent.arena.arena import Arena
from services.gpu_agent.arena.pages import ArenaClosed, OutOfPages
from services.gpu_agent.arena.weight_range import WeightRange
from tests.gpu_agent.arena_backends import CUDA, EACH, HOST, Backend, append

torch.set_num_threads(1)

TOTAL = 10
NAMES = st.sampled_from(["a", "b", "c"])


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


class Model:
    """A weight range with the tensor made over it once, and what each of its pages ought to hold."""

    def __init__(self, weights: WeightRange) -> None:
        self.weights = weights
        self.tensor = weights.tensor(torch.float32, (weights.num_pages, weights.page_bytes // 4), 0)
        self.expected: list[float] = []


class Everything(RuleBasedStateMachine):
    """Random orders from several owners; after each one, every owner finds its own data where it left it."""

    backend: ClassVar[Backend]

    def __init__(self) -> None:
        super().__init__()
        self.arena = Arena(self.backend.memory(TOTAL))
        self.kv_view = self.arena.kv_view(torch.float32).view(TOTAL, self.backend.per_page)
        self.models: dict[str, Model] = {}
        self.kv: dict[str, dict[int, float]] = {}
        self.next_value = 0.0

    def teardown(self) -> None:
        self.backend.settle()
        self.arena.close()

    def value(self) -> float:
        self.next_value += 1.0
        return self.next_value

    def free(self) -> int:
        weights = sum(len(model.expected) for model in self.models.values())
        return TOTAL - weights - sum(map(len, self.kv.values()))

    @rule(name=NAMES, pages=st.integers(1, TOTAL + 1), short=st.floats(0, 1, exclude_max=True))
    def add(self, name: str, pages: int, short: float) -> None:
        page = self.backend.page
        if name in self.models:
            with pytest.raises(ValueError, match="already"):
                self.arena.add_weights(name, page)
        else:
            self.models[name] = Model(self.arena.add_weights(name, pages * page - int(short * page)))
            assert self.models[name].weights.num_pages == pages

    @rule(name=NAMES)
    def remove(self, name: str) -> None:
        if name in self.models:
            self.models.pop(name).weights.remove()

    @rule(name=NAMES, n=st.integers(0, TOTAL + 1))
    def grow(self, name: str, n: int) -> None:
        if name not in self.models:
            return
        model = self.models[name]
        resident = len(model.expected)
        if resident + n > model.weights.num_pages:
            with pytest.raises(ValueError, match="cannot grow"):
                model.weights.grow(n)
        elif n > self.free():
            with pytest.raises(OutOfPages):
                model.weights.grow(n)
        else:
            model.weights.grow(n)
            for index in range(resident, resident + n):
                model.expected.append(self.value())
                model.tensor[index] = model.expected[-1]

    @rule(name=NAMES, well=st.booleans())
    def append(self, name: str, well: bool) -> None:
        model = self.models.get(name)
        if model is None or len(model.expected) == model.weights.num_pages or not self.free():
            return
        value = self.value()

        def fill(index: int, page: torch.Tensor) -> None:
            assert index == len(model.expected)
            page.view(torch.float32).fill_(value)
            self.backend.settle()
            if not well:
                raise OSError("the disk failed")

        if well:
            append(model.weights, fill)
            model.expected.append(value)
        else:
            with pytest.raises(OSError, match="the disk failed"):
                append(model.weights, fill)

    @rule(name=NAMES, keep=st.integers(0, TOTAL))
    def shrink(self, name: str, keep: int) -> None:
        if name in self.models:
            self.models[name].weights.shrink(keep)
            del self.models[name].expected[keep:]

    @rule(name=NAMES, n=st.integers(0, TOTAL))
    def take_kv(self, name: str, n: int) -> None:
        if n > self.free():
            with pytest.raises(OutOfPages):
                self.arena.take_kv(name, n)
            return
        for page in self.arena.take_kv(name, n):
            self.kv.setdefault(name, {})[page] = self.value()
            self.kv_view[page] = self.kv[name][page]

    @rule(name=NAMES, n=st.integers(0, TOTAL))
    def give_kv(self, name: str, n: int) -> None:
        held = self.kv.get(name, {})
        given = list(held)[:n]
        self.arena.give_kv(name, given)
        for page in given:
            del held[page]

    @invariant()
    def pages_have_one_owner_and_data_is_intact(self) -> None:
        self.arena.check()
        usage = self.arena.usage()
        assert usage.free == self.arena.free_pages == self.free()
        assert usage.free + usage.kv + usage.weights == usage.total == TOTAL
        assert self.arena._pages.weights() == {name: len(model.expected) for name, model in self.models.items()}
        assert usage.kv_by_instance == {name: len(held) for name, held in self.kv.items() if held}
        for model in self.models.values():
            assert model.weights.resident_pages == len(model.expected)
            for index, value in enumerate(model.expected):
                assert bool((model.tensor[index] == value).all())
        for held in self.kv.values():
            for page, value in held.items():
                assert bool((self.kv_view[page] == value).all())


class OnHost(Everything):
    backend = HOST


class OnCuda(Everything):
    backend = CUDA


TestEverythingOnHost = OnHost.TestCase
TestEverythingOnHost.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestEverythingOnCuda = pytest.mark.gpu(OnCuda.TestCase)
TestEverythingOnCuda.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_tensor_made_once_is_right_over_other_physical_pages(arena: Arena, backend: Backend) -> None:
    per_page = backend.per_page
    weights = arena.add_weights("m", 3 * backend.page)
    tensor = weights.tensor(torch.float32, (3, per_page), 0)
    weights.grow(3)
    content = torch.arange(3.0 * per_page).view(3, per_page).to(arena.device)
    tensor.copy_(content)
    address = tensor.data_ptr()
    kv = arena.kv_view(torch.float32).view(TOTAL, per_page)
    before = [int(kv[page, 0].item()) for page in range(3)]
    assert before == [0, per_page, 2 * per_page]  # through the KV range, the model is on pages 0 to 2

    weights.shrink(0)
    taken = arena.take_kv("other", 3)
    kv[taken] = -1.0
    weights.grow(3)
    tensor.copy_(content)

    assert tensor.data_ptr() == address
    assert torch.equal(tensor, content)
    assert bool((kv[taken] == -1.0).all())  # the pages it had are another's, untouched


def test_a_stale_tensor_cannot_reach_pages_that_have_another_owner(arena: Arena, backend: Backend) -> None:
    weights = arena.add_weights("m", 3 * backend.page)
    address = weights.tensor(torch.uint8, (1,), 0).data_ptr()
    places = [address + i * backend.page for i in range(3)]
    assert [backend.mapped(place) for place in places] == [False, False, False]
    weights.grow(3)
    assert [backend.mapped(place) for place in places] == [True, True, True]
    weights.shrink(1)
    assert [backend.mapped(place) for place in places] == [True, False, False]
    stale = weights.tensor(torch.uint8, (1,), 0)
    weights.remove()
    assert stale.data_ptr() == address
    assert not backend.mapped(address)
    del weights, stale
    gc.collect()
    assert not backend.mapped(address)


def test_tensors_at_offsets_share_the_pages(arena: Arena, backend: Backend) -> None:
    page = backend.page
    weights = arena.add_weights("m", 2 * page)
    weights.grow(2)
    whole = weights.tensor(torch.uint8, (2 * page,), 0)
    whole.zero_()
    across = weights.tensor(torch.bfloat16, (4, 8), page - 32)
    across.fill_(1.0)
    assert bool((whole[page - 32 : page + 32].view(torch.bfloat16) == 1.0).all())
    assert int(whole.count_nonzero()) == 64
    assert torch.equal(weights.page_view(1), whole[page:])
    assert whole.device == across.device == weights.device == arena.device


@pytest.mark.parametrize(
    ("shape", "pages", "offset", "message"),
    [
        ((2,), 1, -4, "leaves the range"),
        ((1,), 1, 0, "leaves the range"),
        ((1,), 0, -4, "leaves the range"),
        ((1,), 0, 2, "not a multiple of 4"),
        ((0, 4), 0, 0, "no elements"),
        ((-1, -4), 0, 0, "no elements"),
    ],
)
def test_a_tensor_outside_the_range_is_refused(
    arena: Arena, backend: Backend, shape: tuple[int, ...], pages: int, offset: int, message: str
) -> None:
    weights = arena.add_weights("m", backend.page)
    with pytest.raises(ValueError, match=message):
        weights.tensor(torch.float32, shape, pages * backend.page + offset)


def test_only_resident_pages_can_be_viewed(arena: Arena, backend: Backend) -> None:
    weights = arena.add_weights("m", 3 * backend.page)
    weights.grow(1)
    with pytest.raises(IndexError, match="page 1 of m is not resident; 1 pages are"):
        weights.page_view(1)


def test_pages_beyond_the_free_ones_are_refused_with_the_numbers(arena: Arena, backend: Backend) -> None:
    weights = arena.add_weights("m", (TOTAL + 5) * backend.page)
    weights.grow(4)
    with pytest.raises(OutOfPages, match=rf"weights of m asked for 8 pages, but only {TOTAL - 4} of {TOTAL}"):
        weights.grow(8)
    assert (weights.resident_pages, arena.free_pages) == (4, TOTAL - 4)


def test_a_removed_range_cannot_be_used_and_its_name_is_free(arena: Arena, backend: Backend) -> None:
    weights = arena.add_weights("m", 2 * backend.page)
    weights.grow(2)
    weights.remove()
    weights.remove()
    assert arena.free_pages == TOTAL
    for use in (lambda: weights.grow(1), lambda: weights.shrink(0), lambda: weights.page_view(0)):
        with pytest.raises(ArenaClosed, match="weight range of m was removed"):
            use()
    arena.add_weights("m", backend.page).grow(1)


def test_addresses_are_not_used_again_while_a_tensor_lies_over_them(arena: Arena, backend: Backend) -> None:
    weights = arena.add_weights("old", 4 * backend.page)
    stale = weights.tensor(torch.uint8, (4 * backend.page,), 0)
    weights.remove()
    del weights
    ranges = [arena.add_weights(f"new{i}", 4 * backend.page) for i in range(8)]
    addresses = {made.tensor(torch.uint8, (1,), 0).data_ptr() for made in ranges}
    assert not any(stale.data_ptr() <= address < stale.data_ptr() + 4 * backend.page for address in addresses)


def test_a_kv_view_outlives_close(backend: Backend) -> None:
    arena = Arena(backend.memory(2))
    kv = arena.kv_view(torch.uint8)
    arena.close()
    kv.fill_(7)
    assert int(kv.sum()) == 7 * 2 * backend.page


def test_a_closed_arena_refuses_everything_and_says_so(backend: Backend) -> None:
    arena = Arena(backend.memory(2))
    weights = arena.add_weights("m", backend.page)
    arena.close()
    for use in (
        lambda: arena.add_weights("n", backend.page),
        lambda: arena.take_kv("i", 1),
        lambda: arena.give_kv("i", []),
        lambda: arena.kv_view(torch.uint8),
        lambda: weights.grow(1),
    ):
        with pytest.raises(ArenaClosed):
            use()


def test_shrink_waits_for_the_page_that_is_being_filled(arena: Arena, backend: Backend) -> None:
    weights = arena.add_weights("m", 2 * backend.page)
    filling, go_on = threading.Event(), threading.Event()

    def fill(_index: int, page: torch.Tensor) -> None:
        filling.set()
        assert go_on.wait(30)
        page.fill_(1)
        backend.settle()

    loader = threading.Thread(target=append, args=(weights, fill))
    loader.start()
    assert filling.wait(30)
    evictor = threading.Thread(target=weights.shrink, args=(0,))
    evictor.start()
    # Meanwhile the engine is not held up: accounting has a lock of its own.
    assert len(arena.take_kv("i", TOTAL - 1)) == TOTAL - 1
    assert weights.resident_pages == 0
    go_on.set()
    loader.join(30)
    evictor.join(30)
    assert not loader.is_alive()
    assert not evictor.is_alive()
    assert (weights.resident_pages, arena.free_pages) == (0, 1)


def test_threads_that_compete_never_share_a_page(arena: Arena, backend: Backend) -> None:
    kv = arena.kv_view(torch.float32).view(TOTAL, backend.per_page)
    failures: list[str] = []

    def work(number: int) -> None:
        weights = arena.add_weights(f"m{number}", 3 * backend.page)
        tensor = weights.tensor(torch.float32, (3, backend.per_page), 0)
        for round_ in range(60):
            mark = float(number * 1000 + round_)
            try:
                weights.grow(3)
                tensor.fill_(mark)
                pages = arena.take_kv(f"i{number}", 1)
            except OutOfPages:
                backend.settle()
                weights.shrink(0)
                continue
            kv[pages] = -mark
            if not bool((tensor == mark).all()) or not bool((kv[pages] == -mark).all()):
                failures.append(f"thread {number} lost its data in round {round_}")
            arena.give_kv(f"i{number}", pages)
            weights.shrink(0)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert failures == []
    assert arena.free_pages == TOTAL


def test_memory_maps_only_its_own_ranges_and_pages(backend: Backend) -> None:
    one, other = backend.memory(2), backend.memory(2)
    ours = one.reserve(2 * backend.page)
    with pytest.raises(ValueError, match="not, or no longer, one of this memory"):
        other.map(ours, 0, [0])
    with pytest.raises(ValueError, match="leave the range"):
        one.map(ours, 1, [0, 1])
    with pytest.raises(ValueError, match="not all within"):
        one.map(ours, 0, [2])
    one.map(ours, 1, [0])
    with pytest.raises(ValueError, match=r"pages \[1\] of the range are mapped already"):
        one.map(ours, 0, [0, 1])
    one.unmap(ours, 0, 2)
    one.map(ours, 0, [0, 1])
    one.release(ours)
    with pytest.raises(ValueError, match="no longer"):
        one.map(ours, 0, [0])
    one.close()
    other.close()


def test_pages_with_gaps_between_them_are_unmapped_together(backend: Backend) -> None:
    memory = backend.memory(4)
    target = memory.reserve(6 * backend.page)
    places = [target.address + index * backend.page for index in range(6)]
    memory.map(target, 0, [2])
    memory.map(target, 2, [0, 3])
    memory.map(target, 5, [1])
    memory.unmap(target, 1, 2)
    assert [backend.mapped(place) for place in places] == [True, False, False, True, False, True]
    stale = target.tensor(torch.uint8, (1,), 0)
    memory.release(target)
    assert not any(backend.mapped(place) for place in places)
    memory.close()
    del stale
