"""Images read into weight ranges on each kind of memory, in a worker's thread as the agent does it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from services.gpu_agent.arena.arena import Arena
from services.gpu_agent.arena.pages import OutOfPages
from services.gpu_agent.arena.weight_range import WeightRange
from services.gpu_agent.weights import loader
from services.gpu_agent.weights.direct import DirectFile
from services.gpu_agent.weights.errors import ImageCorrupt
from services.gpu_agent.weights.image import Image
from services.gpu_agent.weights.layout import plan_layout
from services.gpu_agent.weights.loader import LoadProgress, load
from services.gpu_agent.weights.sums import host_sum
from tests.gpu_agent.arena_backends import EACH, Backend

torch.set_num_threads(1)

PAGES = 9


@pytest.fixture(params=EACH)
def backend(request: pytest.FixtureRequest) -> Backend:
    kind: Backend = request.param
    return kind


@pytest.fixture
def arena(backend: Backend) -> Iterator[Arena]:
    made = Arena(backend.memory(PAGES + 4))
    yield made
    made.check()
    backend.settle()
    made.close()


@pytest.fixture
def content(backend: Backend) -> torch.Tensor:
    """What the image holds: random bytes, (PAGES, page)."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (PAGES, backend.page), dtype=torch.uint8, generator=generator)


@pytest.fixture
def image(backend: Backend, content: torch.Tensor, tmp_path: Path) -> Iterator[Image]:
    path = tmp_path / "an.image"
    path.write_bytes(content.numpy().tobytes())
    layout = plan_layout({"w": (PAGES * backend.per_page,)}, {}, torch.float32, backend.page)
    sums = [host_sum(page.numpy().data) for page in content]
    with Image(path, "fingerprint", layout, sums, DirectFile(path)) as opened:
        yield opened


@pytest.fixture
def weights(arena: Arena, backend: Backend) -> WeightRange:
    return arena.add_weights("m", PAGES * backend.page)


def loaded(image: Image, weights: WeightRange, stop_at: int | None = None) -> list[int]:
    """Loads in another thread, and returns the counts of resident pages that it told. Raises what it raised."""
    cancel = threading.Event()
    seen: list[int] = []
    raised: list[BaseException] = []

    def note(progress: LoadProgress) -> None:
        seen.append(progress.pages_done)
        if progress.pages_done == stop_at:
            cancel.set()

    def work() -> None:
        try:
            load(image, weights, cancel=cancel, progress=note)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    if raised:
        raise raised[0]
    return seen


def assert_holds(weights: WeightRange, content: torch.Tensor, pages: int = PAGES) -> None:
    assert weights.resident_pages == pages
    for index in range(pages):
        assert torch.equal(weights.page_view(index).cpu(), content[index]), index


def test_each_page_is_told_when_it_holds_its_data(image: Image, weights: WeightRange, content: torch.Tensor) -> None:
    assert loaded(image, weights) == list(range(1, PAGES + 1))
    assert_holds(weights, content)


class Bus:
    """Stands for a bus with room for many copies; each has arrived when it is waited for."""

    ahead = 32

    def __init__(self, image: Image) -> None:
        self._image = image
        self._begun: list[tuple[int, torch.Tensor]] = []
        self.most = 0  # pages under way at once

    def begin(self, first: int, pages: torch.Tensor) -> None:
        self._begun.append((first, pages))
        self.most = max(self.most, sum(len(pages) for _, pages in self._begun))

    def end(self, first: int, n: int) -> None:
        begun, pages = self._begun.pop(0)
        assert (begun, len(pages)) == (first, n)
        for index, page in enumerate(pages, first):
            self._image.read_page(index, page)


@pytest.mark.parametrize("backend", EACH[:1], indirect=True)
@pytest.mark.parametrize(("urgent", "computing", "most"), [(False, False, 8), (False, True, 1), (True, True, PAGES)])
def test_prewarming_leaves_the_bus_to_steps_and_a_wake_does_not(
    image: Image,
    weights: WeightRange,
    content: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
    urgent: bool,
    computing: bool,
    most: int,
) -> None:
    bus = Bus(image)
    monkeypatch.setattr(loader, "page_source", lambda *_: nullcontext(bus))
    never = threading.Event()
    done = load(
        image, weights, cancel=never, progress=lambda _: None, claim=lambda: urgent, gives_way=lambda: computing
    )
    assert done.complete
    assert bus.most == most
    assert_holds(weights, content)


def test_a_load_that_was_cut_short_goes_on_where_it_was(
    image: Image, weights: WeightRange, content: torch.Tensor
) -> None:
    assert loaded(image, weights, stop_at=4) == [1, 2, 3, 4]
    assert_holds(weights, content, 4)
    assert loaded(image, weights) == [5, 6, 7, 8, 9]
    assert_holds(weights, content)


def test_a_damaged_page_ends_the_load_before_it(
    image: Image, weights: WeightRange, content: torch.Tensor, backend: Backend
) -> None:
    with image.path.open("r+b") as file:
        file.seek(3 * backend.page + 77)
        file.write(bytes([int(content[3, 77]) ^ 1]))
    with pytest.raises(ImageCorrupt, match=r"page 3 of .* does not have its checksum"):
        loaded(image, weights)
    assert_holds(weights, content, 3)


def test_weights_come_back_right_onto_other_pages(
    image: Image, weights: WeightRange, content: torch.Tensor, arena: Arena, backend: Backend
) -> None:
    tensor = weights.tensor(torch.uint8, (PAGES, backend.page), 0)
    loaded(image, weights)
    weights.shrink(2)
    kv = arena.kv_view(torch.uint8).view(arena.num_pages, backend.page)
    taken = arena.take_kv("other", 6)
    kv[taken] = 255
    backend.settle()
    with pytest.raises(OutOfPages):
        loaded(image, weights)
    assert_holds(weights, content, 7)
    weights.shrink(0)
    arena.give_kv("other", taken[:2])
    loaded(image, weights)
    assert torch.equal(tensor.cpu(), content)
    assert bool((kv[taken[2:]] == 255).all())
