"""Images in the node's memory: what is kept, what goes, and what a killed or failing agent leaves behind."""

from __future__ import annotations

import errno
import mmap
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from services.gpu_agent.arena.arena import Arena
from services.gpu_agent.arena.pages import OutOfPages
from services.gpu_agent.arena.weight_range import WeightRange
from services.gpu_agent.weights.direct import DirectFile
from services.gpu_agent.weights.errors import ImageCorrupt
from services.gpu_agent.weights.host_image import HostImageCorrupt
from services.gpu_agent.weights.host_tier import HostTier, Kept, most_valuable
from services.gpu_agent.weights.image import Image
from services.gpu_agent.weights.layout import plan_layout
from services.gpu_agent.weights.loader import load
from services.gpu_agent.weights.sums import host_sum
from tests.gpu_agent.arena_backends import EACH, Backend
from tests.gpu_agent.checkpoints import llama
from tests.gpu_agent.serving import PAGE_BYTES, arena, serve_files
from tests.gpu_agent.test_weights_building import largest_file

torch.set_num_threads(1)

PAGES = 9


@pytest.fixture
def tier_folder() -> Iterator[Path]:
    """In memory, as a tier is: CUDA registers no file of a disk."""
    with tempfile.TemporaryDirectory(prefix="warmserve-test-", dir="/dev/shm") as folder:
        yield Path(folder) / "tier"


def images(folder: Path, count: int, make: Callable[[int], Arena] = lambda _: arena(1)) -> list[Image]:
    """As many images of the same size."""
    return [
        serve_files(make(n), lambda path, n=n, **kw: llama(path, seed=n, **kw), folder, f"m{n}", torch.float32)[0].image
        for n in range(count)
    ]


def names(tier: HostTier) -> list[str]:
    return [kept.name for kept in tier.kept()]


def test_the_least_valuable_go_first_and_only_for_what_is_worth_more(tmp_path: Path, tier_folder: Path) -> None:
    one, two, three, four = images(tmp_path, 4)
    tier = HostTier(tier_folder, 2 * one.layout.total_bytes)
    assert tier.fill(one, 2.0)
    assert tier.fill(two, 1.0)
    assert not tier.fill(three, 1.2)  # worth hardly more than what is there
    assert tier.fill(four, 1.5)
    assert names(tier) == [four.path.name, one.path.name]
    tier.appraise(one.path.name, 0.5)
    assert HostTier(tier_folder, 2 * one.layout.total_bytes).fill(three, 1.0)  # as another agent of the node sees it
    assert names(tier) == [three.path.name, four.path.name]


kept_images = st.lists(
    st.builds(
        Kept,
        name=st.integers(0, 999).map(str),
        nbytes=st.integers(1, 50),
        value=st.floats(0, 1e6),
    ),
    unique_by=lambda image: image.name,
)


@given(kept_images, st.integers(0, 200), st.sets(st.integers(0, 999).map(str)))
def test_the_most_valuable_are_chosen_as_far_as_the_budget_goes(
    images: list[Kept], budget: int, there: set[str]
) -> None:
    chosen = most_valuable(images, there, budget)
    taken = sum(image.nbytes for image in chosen)
    assert taken <= budget
    assert len({image.name for image in chosen}) == len(chosen)
    for image in images:
        if image not in chosen:  # it does not fit beside those that are clearly worth no less
            before = [c for c in chosen if c.value * 1.25 >= image.value]
            assert sum(c.nbytes for c in before) + image.nbytes > budget


def test_what_is_there_gives_way_only_to_what_is_clearly_worth_more() -> None:
    def chosen(value: float) -> list[str]:
        images = [Kept("new", 1, value), Kept("old", 1, 4.0)]
        return [image.name for image in most_valuable(images, {"old"}, 1)]

    assert [chosen(value) for value in (4.0, 4.9, 5.1)] == [["old"], ["old"], ["new"]]


def test_what_is_read_stays_and_what_is_removed_is_given_back(tmp_path: Path, tier_folder: Path) -> None:
    one, two = images(tmp_path, 2)
    budget = one.layout.total_bytes
    mine, others = HostTier(tier_folder, budget), HostTier(tier_folder, budget)
    mine.fill(one, 1.0)
    with mine.reading(one) as host:
        assert host is not None
        assert not others.fill(two, 9.0)
        assert bytes(host.page(0).numpy()) == one.path.read_bytes()[:PAGE_BYTES]
    assert others.fill(two, 9.0)
    with mine.reading(one) as host:
        assert host is None
    mine.sweep()
    assert mine._opened == {}
    mine.close()


def test_the_last_agent_that_stops_gives_the_memory_back(tmp_path: Path, tier_folder: Path) -> None:
    (image,) = images(tmp_path, 1)
    one, other = HostTier(tier_folder, 1 << 30), HostTier(tier_folder, 1 << 30)
    one.fill(image, 1.0)
    one.close()
    with other.reading(image) as host:
        assert host is not None
    other.close()
    other.close()
    assert list(tier_folder.glob("*.image*")) == []


def test_registered_once_and_taken_back_at_the_end(tmp_path: Path, tier_folder: Path) -> None:
    (image,) = images(tmp_path, 1)
    pinned: list[int] = []

    def pin(address: int, nbytes: int) -> Callable[[], None]:
        assert nbytes == PAGE_BYTES
        pinned.append(address)
        return lambda: pinned.remove(address)

    tier = HostTier(tier_folder, image.layout.total_bytes, pin)
    tier.fill(image, 1.0)
    for _ in range(2):
        with tier.reading(image) as host:
            assert host is not None
            assert host.page(1).data_ptr() == host.page(1).data_ptr()
    assert len(pinned) == 1
    tier.close()
    assert pinned == []


def test_what_another_agent_removes_can_be_read_to_the_end(tmp_path: Path, tier_folder: Path) -> None:
    """An agent that finds it damaged does so; meanwhile copies from it may be under way."""
    (image,) = images(tmp_path, 1)
    pinned: list[int] = []

    def pin(address: int, nbytes: int) -> Callable[[], None]:
        pinned.append(address)
        return lambda: pinned.remove(address)

    mine, others = (HostTier(tier_folder, image.layout.total_bytes, pin) for _ in range(2))
    mine.fill(image, 1.0)
    with mine.reading(image) as host:
        assert host is not None
        first = host.page(0)
        others.discard(image.path.name)
        mine.sweep()
        with mine.reading(image) as again:
            assert again is None
        assert first.data_ptr() in pinned
        assert bytes(host.page(1).numpy()) == image.path.read_bytes()[PAGE_BYTES : 2 * PAGE_BYTES]
    mine.sweep()
    assert pinned == []
    mine.close()
    others.close()


def test_an_image_larger_than_the_budget_is_not_kept_and_it_is_said(tmp_path: Path, tier_folder: Path) -> None:
    (image,) = images(tmp_path, 1)
    tier = HostTier(tier_folder, image.layout.total_bytes - 1)
    with capture_logs() as logs:
        assert not tier.fill(image, 1e9)
    assert "smaller than this image" in logs[0]["event"]
    assert list(tier_folder.glob("*.image*")) == []


def test_a_full_memory_file_system_is_no_error(
    tmp_path: Path, tier_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (image,) = images(tmp_path, 1)
    tier = HostTier(tier_folder, 10 * image.layout.total_bytes)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert not tier.fill(image, 1.0)
    assert list(tier_folder.glob("*.image*")) == []


def test_a_folder_that_somebody_has_deleted_is_made_again(tmp_path: Path, tier_folder: Path) -> None:
    one, two = images(tmp_path, 2)
    tier = HostTier(tier_folder, 2 * one.layout.total_bytes)
    assert tier.fill(one, 1.0)
    shutil.rmtree(tier_folder)
    assert names(tier) == []
    with tier.reading(one) as host:
        assert host is None
    assert tier.fill(two, 1.0)
    assert tier.fill(one, 1.0)
    assert names(tier) == sorted([one.path.name, two.path.name])


def test_a_worth_that_cannot_be_written_leaves_nothing_of_itself(tmp_path: Path, tier_folder: Path) -> None:
    (image,) = images(tmp_path, 1)
    tier = HostTier(tier_folder, image.layout.total_bytes)
    assert tier.fill(image, 1.0)
    before = sorted(tier_folder.iterdir())
    with largest_file(0), pytest.raises(OSError, match="too large"):
        tier.appraise(image.path.name, 2.0)
    assert sorted(tier_folder.iterdir()) == before
    assert [kept.value for kept in tier.kept()] == [1.0]


def test_a_damaged_image_is_not_taken_in(tmp_path: Path, tier_folder: Path) -> None:
    (image,) = images(tmp_path, 1)
    _flip(image.path, 2 * PAGE_BYTES + 5)
    tier = HostTier(tier_folder, image.layout.total_bytes)
    with pytest.raises(ImageCorrupt, match="page 2"):
        tier.fill(image, 1.0)
    assert list(tier_folder.glob("*.image*")) == []


def test_an_image_that_is_cut_off_is_not_taken_in_and_the_reason_is_told(tmp_path: Path, tier_folder: Path) -> None:
    (image,) = images(tmp_path, 1)
    os.truncate(image.path, 2 * PAGE_BYTES + 5)
    tier = HostTier(tier_folder, image.layout.total_bytes)
    with pytest.raises(ImageCorrupt, match="page 2"):
        tier.fill(image, 1.0)
    assert list(tier_folder.glob("*.image*")) == []


def test_filling_that_is_stopped_leaves_nothing(tmp_path: Path, tier_folder: Path) -> None:
    (image,) = images(tmp_path, 1)
    tier = HostTier(tier_folder, image.layout.total_bytes)
    turns = iter([True, True, False])
    assert not tier.fill(image, 1.0, lambda: next(turns, False))
    assert list(tier_folder.glob("*.image*")) == []
    assert tier.fill(image, 1.0)


def _fill_and_stand_still(image_path: Path, tier_folder: Path, filling: object) -> None:
    from services.gpu_agent.weights.image import open_image

    def go_on() -> bool:
        filling.set()  # type: ignore[attr-defined]
        signal.pause()
        return True

    HostTier(tier_folder, 1 << 30).fill(open_image(image_path), 1.0, go_on)


def test_an_agent_killed_while_filling_leaves_nothing_half_done(tmp_path: Path, tier_folder: Path) -> None:
    (image,) = images(tmp_path, 1)
    context = multiprocessing.get_context("spawn")
    filling = context.Event()
    agent = context.Process(target=_fill_and_stand_still, args=(image.path, tier_folder, filling))
    agent.start()
    assert filling.wait(60)
    other = HostTier(tier_folder, image.layout.total_bytes)
    assert len(list(tier_folder.glob("*.unfinished"))) == 1  # it lives, so nobody takes it for dead
    assert not other.fill(image, 9.0)
    with other.reading(image) as host:
        assert host is None
    agent.kill()
    agent.join(30)
    assert other.fill(image, 1.0)
    assert [path.suffix for path in tier_folder.glob(f"{image.path.name}*")].count(".unfinished") == 0
    other.close()


def _flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 4]))


def synthetic(backend: Backend, folder: Path) -> tuple[Arena, Image, WeightRange]:
    """An image of random bytes, and where it is to go."""
    generator = torch.Generator().manual_seed(3)
    content = torch.randint(0, 256, (PAGES, backend.page), dtype=torch.uint8, generator=generator)
    path = folder / "an.image"
    path.write_bytes(content.numpy().tobytes())
    layout = plan_layout({"w": (PAGES * backend.per_page,)}, {}, torch.float32, backend.page)
    sums = [host_sum(page.numpy().data) for page in content]
    image = Image(path, "fingerprint", layout, sums, DirectFile(path))
    memory = Arena(backend.memory(PAGES + 4))
    return memory, image, memory.add_weights("m", PAGES * backend.page)


@pytest.mark.parametrize("backend", EACH)
def test_weights_come_from_memory_right_and_in_order(backend: Backend, tmp_path: Path, tier_folder: Path) -> None:
    memory, image, weights = synthetic(backend, tmp_path)
    tier = HostTier(tier_folder, image.layout.total_bytes, getattr(memory._memory, "pin", None))
    tier.fill(image, 1.0)
    weights.grow(1)
    image.read_page(0, page := torch.empty(weights.page_bytes, dtype=torch.uint8))
    weights.page_view(0).copy_(page)
    backend.settle()
    seen: list[int] = []
    _load(image, weights, tier, seen)
    assert seen == sorted(seen)
    assert seen[-1] == weights.num_pages
    for index in range(weights.num_pages):
        image.read_page(index, page)
        assert torch.equal(weights.page_view(index).cpu(), page), index
    tier.close()
    memory.close()


@pytest.mark.parametrize("backend", EACH)
def test_a_flipped_bit_in_memory_is_found_before_the_page_is_resident(
    backend: Backend, tmp_path: Path, tier_folder: Path
) -> None:
    memory, image, weights = synthetic(backend, tmp_path)
    tier = HostTier(tier_folder, image.layout.total_bytes, getattr(memory._memory, "pin", None))
    tier.fill(image, 1.0)
    _flip(tier_folder / image.path.name, 3 * weights.page_bytes + 77)
    with pytest.raises(HostImageCorrupt, match="page 3"):
        _load(image, weights, tier, [])
    assert 1 < weights.resident_pages <= 3  # pages that came with it are not counted on either
    memory.check()
    tier.discard(image.path.name)
    _load(image, weights, tier, [])
    assert weights.complete
    tier.close()
    memory.close()


@pytest.mark.parametrize("backend", EACH)
def test_copies_under_way_end_before_their_pages_are_given_back(
    backend: Backend, tmp_path: Path, tier_folder: Path
) -> None:
    memory, image, weights = synthetic(backend, tmp_path)
    tier = HostTier(tier_folder, image.layout.total_bytes, getattr(memory._memory, "pin", None))
    tier.fill(image, 1.0)
    memory.take_kv("i", memory.free_pages - weights.num_pages + 2)  # two pages are lacking
    with pytest.raises(OutOfPages):
        _load(image, weights, tier, [])
    assert weights.resident_pages == weights.num_pages - 2
    memory.check()
    tier.close()
    memory.close()


def _load(image: Image, weights: object, tier: HostTier, seen: list[int]) -> None:
    with tier.reading(image) as host:
        load(
            image,
            weights,  # type: ignore[arg-type]
            cancel=threading.Event(),
            progress=lambda done: seen.append(done.pages_done),
            host=host,
        )


def test_reading_goes_on_through_the_page_cache_where_direct_reads_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(3 * 4096))
    own = os.open

    def refuse(name: object, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no direct reads here")
        return own(name, flags, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", refuse)
    into = bytearray(2 * 4096)
    with DirectFile(path) as file:
        file.read(4096, memoryview(into))
        with pytest.raises(OSError, match="ends at 12288"):
            file.read(2 * 4096, memoryview(into))
    assert bytes(into[:4096]) == path.read_bytes()[8192:]


@pytest.mark.parametrize("cached", [0, 5 * 4096, 5 * 4096 + 77, 16 * 4096])
def test_what_the_page_cache_has_comes_from_there_and_the_rest_from_the_disk(tmp_path: Path, cached: int) -> None:
    path = tmp_path / "file"
    content = os.urandom(16 * 4096)
    path.write_bytes(content)
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # nothing is read ahead
        assert file.read(cached) == content[:cached]
    with mmap.mmap(-1, 12 * 4096) as into, DirectFile(path) as direct:
        direct.read(2 * 4096, memoryview(into))
        assert into[:] == content[2 * 4096 : 14 * 4096]
