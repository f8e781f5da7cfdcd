"""Images on a real disk, and loading them into a real arena."""

from __future__ import annotations

import json
import os
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from services.gpu_agent.arena.arena import Arena
from services.gpu_agent.arena.host import HostMemory
from services.gpu_agent.arena.pages import OutOfPages
from services.gpu_agent.arena.weight_range import WeightRange
from services.gpu_agent.weights.building import prepare_image
from services.gpu_agent.weights.checkpoint import Checkpoint
from services.gpu_agent.weights.errors import ImageCorrupt
from services.gpu_agent.weights.image import (
    Image,
    delete_image,
    describe,
    image_path,
    open_image,
    open_image_of,
    sidecar,
)
from services.gpu_agent.weights.layout import ImageLayout, plan_layout
from services.gpu_agent.weights.loader import LoadProgress, load
from tests.gpu_agent.checkpoints import FAMILIES, SHARDED, llama

torch.set_num_threads(1)

PAGE = 16384


def opened(folder: Path) -> Checkpoint:
    return Checkpoint.open(folder, [folder.parent])


def planned(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> ImageLayout:
    return plan_layout(checkpoint.shapes, checkpoint.aliases, dtype, PAGE)


def no_progress(done: int, total: int) -> None:
    """For callers that do not look."""


def ignore(progress: LoadProgress) -> None:
    """For callers that do not look."""


class Prepared:
    """A tiny Llama's checkpoint, its layout and its image."""

    def __init__(self, folder: Path) -> None:
        self.model: PreTrainedModel = llama(folder / "models" / "tiny")
        self.checkpoint = opened(folder / "models" / "tiny")
        self.layout = planned(self.checkpoint)
        self.images = folder / "images"
        self.path = prepare_image(self.checkpoint, self.layout, self.images, no_progress)


@pytest.fixture
def prepared(tmp_path: Path) -> Prepared:
    return Prepared(tmp_path)


@pytest.fixture
def image(prepared: Prepared) -> Iterator[Image]:
    with open_image(prepared.path) as opened_image:
        yield opened_image


@pytest.fixture
def arena(prepared: Prepared) -> Iterator[Arena]:
    made = Arena(HostMemory(PAGE, prepared.layout.num_pages + 4))
    yield made
    made.check()
    made.close()


@pytest.fixture
def weights(arena: Arena, prepared: Prepared) -> WeightRange:
    return arena.add_weights("tiny", prepared.layout.total_bytes)


def assert_holds(weights: WeightRange, layout: ImageLayout, model: PreTrainedModel) -> None:
    """Every parameter, by each of its names, is in the range in the serving dtype, bit by bit."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        place = layout.place(name)
        assert torch.equal(weights.tensor(place.dtype, place.shape, place.offset), parameter.to(place.dtype)), name


@pytest.mark.parametrize("serving", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_loaded_image_is_the_checkpoint_in_the_serving_dtype(
    tmp_path: Path, family: str, stored: torch.dtype, serving: torch.dtype
) -> None:
    model = FAMILIES[family](
        tmp_path / "m",
        dtype=stored,
        tied=serving is torch.bfloat16,
        shard_size=SHARDED if stored is torch.bfloat16 else "5GB",
    )
    checkpoint = opened(tmp_path / "m")
    layout = planned(checkpoint, serving)
    path = prepare_image(checkpoint, layout, tmp_path / "images", no_progress)
    arena = Arena(HostMemory(PAGE, layout.num_pages))
    weights = arena.add_weights("m", layout.total_bytes)
    with open_image(path) as image:
        assert image.layout == layout
        assert load(image, weights, cancel=threading.Event(), progress=ignore).complete
    assert_holds(weights, layout, model)
    arena.close()


def test_versions_dtypes_and_page_sizes_have_images_of_their_own(prepared: Prepared, tmp_path: Path) -> None:
    llama(tmp_path / "models" / "other", seed=9)
    other = opened(tmp_path / "models" / "other")
    smaller = plan_layout(prepared.checkpoint.shapes, {}, torch.float32, PAGE // 2)
    paths = {
        prepared.path,
        image_path(prepared.images, other, prepared.layout),
        image_path(prepared.images, prepared.checkpoint, planned(prepared.checkpoint, torch.bfloat16)),
        image_path(prepared.images, prepared.checkpoint, smaller),
    }
    assert len(paths) == 4


# What goes wrong with an image on the disk


def damage(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))


def test_an_image_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_image(tmp_path / "missing.image")


def test_one_wrong_bit_stops_the_load_before_its_page(image: Image, prepared: Prepared, weights: WeightRange) -> None:
    damage(prepared.path, 3 * PAGE + 77)
    with pytest.raises(ImageCorrupt, match=f"page 3 of {prepared.path} does not have its checksum"):
        load(image, weights, cancel=threading.Event(), progress=ignore)
    assert weights.resident_pages == 3
    damage(prepared.path, 3 * PAGE + 77)
    assert load(image, weights, cancel=threading.Event(), progress=ignore).complete
    assert_holds(weights, prepared.layout, prepared.model)


def test_an_image_cut_short(image: Image, prepared: Prepared, weights: WeightRange) -> None:
    os.truncate(prepared.path, 2 * PAGE + 10)
    with pytest.raises(ImageCorrupt, match="ends in page 2"):
        load(image, weights, cancel=threading.Event(), progress=ignore)
    assert weights.resident_pages == 2
    with pytest.raises(ImageCorrupt, match=r"has .* bytes and not"):
        open_image(prepared.path)


@pytest.mark.parametrize("content", [None, b"", b"{}", b"[]", b"\xff\xfe"])
def test_a_damaged_json(prepared: Prepared, content: bytes | None) -> None:
    if content is None:  # still JSON, with one checksum changed
        body = json.loads(sidecar(prepared.path).read_text())
        body["page_sums"][0] ^= 1
        content = json.dumps(body).encode()
    sidecar(prepared.path).write_bytes(content)
    os.utime(sidecar(prepared.path), (0, 0))  # some systems' clocks for files stand still for a few ms
    with pytest.raises(ImageCorrupt, match="is damaged"):
        open_image(prepared.path)


def test_an_image_of_another_format_is_not_read(prepared: Prepared) -> None:
    """It would be laid out otherwise; preparing again replaces it."""
    body = {name: value for name, value in json.loads(sidecar(prepared.path).read_text()).items() if name != "crc32"}
    body["format"] -= 1
    checksum = zlib.crc32(json.dumps(body, sort_keys=True).encode())
    sidecar(prepared.path).write_text(json.dumps({**body, "crc32": checksum}))
    with pytest.raises(ImageCorrupt, match="of another version"):
        open_image(prepared.path)
    prepare_image(prepared.checkpoint, prepared.layout, prepared.images, no_progress)
    open_image(prepared.path).close()


def test_an_image_of_another_version_of_the_checkpoint_is_found_and_replaced(prepared: Prepared) -> None:
    good = sidecar(prepared.path).read_bytes()
    sidecar(prepared.path).write_bytes(describe("f" * 64, prepared.layout, range(prepared.layout.num_pages)))
    with pytest.raises(ImageCorrupt, match="another version of the checkpoint"):
        open_image_of(prepared.path, prepared.checkpoint.fingerprint, prepared.layout)
    prepare_image(prepared.checkpoint, prepared.layout, prepared.images, no_progress)
    assert sidecar(prepared.path).read_bytes() == good
    open_image_of(prepared.path, prepared.checkpoint.fingerprint, prepared.layout).close()


@pytest.mark.parametrize("broken", ["image", "sidecar", "no image", "no sidecar"])
def test_preparing_again_mends_a_broken_image(prepared: Prepared, broken: str) -> None:
    good = prepared.path.read_bytes()
    match broken:
        case "image":
            os.truncate(prepared.path, PAGE)
        case "sidecar":
            sidecar(prepared.path).write_text("{")
        case "no image":
            prepared.path.unlink()
        case "no sidecar":
            sidecar(prepared.path).unlink()
    assert prepare_image(prepared.checkpoint, prepared.layout, prepared.images, no_progress) == prepared.path
    assert prepared.path.read_bytes() == good
    open_image(prepared.path).close()


def test_a_deleted_image_is_gone_but_readable_by_those_who_have_it_open(image: Image, prepared: Prepared) -> None:
    assert image.is_current
    delete_image(prepared.path)
    delete_image(prepared.path)
    assert os.listdir(prepared.images) == []
    assert not image.is_current
    image.read_page(0, torch.empty(PAGE, dtype=torch.uint8))
    prepare_image(prepared.checkpoint, prepared.layout, prepared.images, no_progress)
    assert not image.is_current  # that is another one


# Loading


def test_progress_counts_the_pages_in_order(image: Image, weights: WeightRange) -> None:
    seen: list[LoadProgress] = []
    last = load(image, weights, cancel=threading.Event(), progress=seen.append)
    assert [progress.pages_done for progress in seen] == list(range(1, weights.num_pages + 1))
    assert all(progress.pages_total == weights.num_pages and progress.bytes_per_s > 0 for progress in seen)
    assert last == seen[-1]


def test_a_cancelled_load_leaves_a_good_prefix_and_can_be_continued(
    image: Image, prepared: Prepared, weights: WeightRange
) -> None:
    cancel = threading.Event()

    def stop_at_five(progress: LoadProgress) -> None:
        if progress.pages_done == 5:
            cancel.set()

    stopped = load(image, weights, cancel=cancel, progress=stop_at_five)
    assert (stopped.pages_done, stopped.complete, weights.resident_pages) == (5, False, 5)
    expected = torch.empty(PAGE, dtype=torch.uint8)
    for index in range(5):
        image.read_page(index, expected)
        assert torch.equal(weights.page_view(index), expected)
    seen: list[int] = []
    again = load(image, weights, cancel=threading.Event(), progress=lambda progress: seen.append(progress.pages_done))
    assert again.complete
    assert seen[0] == 6  # only what was missing is copied
    assert_holds(weights, prepared.layout, prepared.model)


def test_a_load_cancelled_before_it_begins_copies_nothing(image: Image, weights: WeightRange) -> None:
    cancel = threading.Event()
    cancel.set()
    assert load(image, weights, cancel=cancel, progress=ignore).pages_done == 0


def test_evicted_pages_come_back_on_other_pages_with_the_same_data(
    image: Image, prepared: Prepared, arena: Arena, weights: WeightRange
) -> None:
    load(image, weights, cancel=threading.Event(), progress=ignore)
    parameters = {
        place.name: weights.tensor(place.dtype, place.shape, place.offset) for place in prepared.layout.tensors
    }
    weights.shrink(2)
    kv = arena.kv_view(torch.uint8).view(arena.num_pages, PAGE)
    taken = arena.take_kv("other", 6)
    kv[taken] = 255
    with pytest.raises(OutOfPages):
        load(image, weights, cancel=threading.Event(), progress=ignore)
    weights.shrink(0)
    arena.give_kv("other", taken[:3])
    load(image, weights, cancel=threading.Event(), progress=ignore)
    for name, parameter in prepared.model.named_parameters():
        assert torch.equal(parameters[name], parameter), name
    assert bool((kv[taken[3:]] == 255).all())


def test_too_few_pages_leave_a_good_prefix(
    image: Image, prepared: Prepared, arena: Arena, weights: WeightRange
) -> None:
    taken = arena.take_kv("busy", 10)
    with pytest.raises(OutOfPages, match="weights of tiny asked for 1 pages, but only 0"):
        load(image, weights, cancel=threading.Event(), progress=ignore)
    assert weights.resident_pages == arena.num_pages - 10
    arena.give_kv("busy", taken)
    assert load(image, weights, cancel=threading.Event(), progress=ignore).complete
    assert_holds(weights, prepared.layout, prepared.model)


def test_a_range_of_another_size_is_refused(image: Image, arena: Arena) -> None:
    with pytest.raises(ValueError, match="but the range of wrong has 1 of"):
        load(image, arena.add_weights("wrong", PAGE), cancel=threading.Event(), progress=ignore)
