"""Making images: what is left when it fails, is cancelled or killed, and who makes one that two want."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from services.gpu_agent.weights.building import prepare_image, remove_stale, remove_unfinished, unfinished
from services.gpu_agent.weights.conversion import TensorSource
from services.gpu_agent.weights.errors import CheckpointError, Problem
from services.gpu_agent.weights.image import delete_image, open_image
from services.gpu_agent.weights.layout import plan_layout
from tests.gpu_agent.checkpoints import llama
from tests.gpu_agent.test_weights_image import PAGE, Prepared, damage, no_progress, opened, planned

torch.set_num_threads(1)

DAY_S = 24 * 3600


@pytest.fixture
def prepared(tmp_path: Path) -> Prepared:
    return Prepared(tmp_path)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tensors that are read from now on."""
    names: list[str] = []
    own = TensorSource.read

    def noted(source: TensorSource) -> Iterator[torch.Tensor]:
        names.append(source.parts[0].name)
        return own(source)

    monkeypatch.setattr(TensorSource, "read", noted)
    return names


def prepare(prepared: Prepared, folder: Path, progress: object = no_progress) -> Path:
    return prepare_image(prepared.checkpoint, prepared.layout, folder, progress)  # type: ignore[arg-type]


def test_an_image_is_made_once_and_progress_reaches_the_end(prepared: Prepared, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    path = prepare(prepared, tmp_path / "new", lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1] == (prepared.layout.total_bytes, prepared.layout.total_bytes)
    assert path.read_bytes() == prepared.path.read_bytes()
    assert sorted(os.listdir(path.parent)) == [path.name, path.name + ".json"]
    before, count = path.stat().st_mtime_ns, len(seen)
    assert prepare(prepared, tmp_path / "new", lambda done, total: seen.append((done, total))) == path
    assert (path.stat().st_mtime_ns, len(seen)) == (before, count)


@contextmanager
def largest_file(nbytes: int) -> Iterator[None]:
    """Any file that would grow beyond this meets an error, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("room", [0, 100, 5 * PAGE])
def test_a_full_disk_leaves_nothing_says_what_to_do_and_is_no_hindrance_once_there_is_space(
    prepared: Prepared, tmp_path: Path, room: int
) -> None:
    full = tmp_path / "full"
    with (
        largest_file(room),
        pytest.raises(CheckpointError, match=r"needs .* MiB in .*full.*disk is full.*free space there") as caught,
    ):
        prepare(prepared, full)
    assert caught.value.kind is Problem.TOO_LARGE
    assert os.listdir(full) == []
    assert prepare(prepared, full).read_bytes() == prepared.path.read_bytes()


def test_a_disk_that_fills_up_behind_the_pages_leaves_nothing(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is allocated at the begin, but the journal grows."""
    full, own = tmp_path / "full", os.write

    def write(fd: int, data: bytes) -> int:
        if os.fstat(fd).st_size > len(data) > 1:
            raise OSError(28, "No space left on device")
        return own(fd, data)

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(CheckpointError, match="disk is full"):
        prepare(prepared, full)
    monkeypatch.setattr(os, "write", own)
    assert os.listdir(full) == []
    assert prepare(prepared, full).read_bytes() == prepared.path.read_bytes()


class GivenUp(Exception):
    """Raised by a progress callback."""


def test_a_build_that_is_given_up_leaves_nothing(prepared: Prepared, tmp_path: Path) -> None:
    def give_up(done: int, _total: int) -> None:
        if done > 3 * PAGE:
            raise GivenUp

    with pytest.raises(GivenUp):
        prepare(prepared, tmp_path / "new", give_up)
    assert os.listdir(tmp_path / "new") == []


def test_a_checkpoint_cut_short_after_it_was_checked(prepared: Prepared, tmp_path: Path) -> None:
    os.truncate(prepared.checkpoint.folder / "model.safetensors", 100_000)
    with pytest.raises(CheckpointError, match="was changed while it was read"):
        prepare(prepared, tmp_path / "new")
    assert os.listdir(tmp_path / "new") == []


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (float("nan"), torch.float32, r"model\.norm\.weight has values that are not finite"),
        (float("inf"), torch.bfloat16, r"model\.norm\.weight has values that are not finite"),
        (1e6, torch.float16, r"model\.norm\.weight has values beyond the range of torch\.float16; serve in bfloat16"),
    ],
)
def test_weights_that_would_not_compute_are_refused(
    tmp_path: Path, value: float, dtype: torch.dtype, message: str
) -> None:
    llama(tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][5] = value
    save_file(tensors, file)
    checkpoint = opened(tmp_path / "m")
    with pytest.raises(CheckpointError, match=message) as caught:
        prepare_image(checkpoint, planned(checkpoint, dtype), tmp_path / "images", no_progress)
    assert caught.value.kind is Problem.INVALID
    assert os.listdir(tmp_path / "images") == []


# Killed and resumed


def _build_and_stand_still(folder: Path, images: Path, page_bytes: int, pages: int, standing: object) -> None:
    def progress(done: int, total: int) -> None:
        if done > pages * page_bytes:
            standing.set()  # type: ignore[attr-defined]
            signal.pause()

    checkpoint = opened(folder)
    layout = plan_layout(checkpoint.shapes, checkpoint.aliases, torch.float32, page_bytes)
    prepare_image(checkpoint, layout, images, progress)


@contextmanager
def half_built(folder: Path, images: Path, pages: int, page_bytes: int = PAGE) -> Iterator[Path]:
    """Another process has made more than so many pages of a checkpoint's image, and stands still.

    It is killed at the end of the block. Yields where the image is to be.
    """
    context = multiprocessing.get_context("forkserver")  # it has what it needs imported when the second is started
    context.set_forkserver_preload([__name__])
    standing = context.Event()
    builder = context.Process(target=_build_and_stand_still, args=(folder, images, page_bytes, pages, standing))
    builder.start()
    try:
        assert standing.wait(120)
        (journal,) = images.glob("*.sums.unfinished")
        yield journal.with_name(journal.name.removesuffix(".sums.unfinished"))
    finally:
        builder.kill()
        builder.join(30)


def test_what_a_killed_agent_had_written_is_kept(prepared: Prepared, tmp_path: Path, read: list[str]) -> None:
    with half_built(prepared.checkpoint.folder, tmp_path / "new", 12):
        pass
    seen: list[int] = []
    path = prepare(prepared, tmp_path / "new", lambda done, total: seen.append(done))
    assert seen[:12] == [(n + 1) * PAGE for n in range(12)]  # looked at, not made
    assert seen == sorted(seen)
    assert read == [
        prepared.checkpoint.tensors[place.name].parts[0].name
        for place in prepared.layout.tensors
        if place.offset + place.nbytes > next(d for d in seen if d > 12 * PAGE) // PAGE * PAGE
    ]
    assert len(read) < len(prepared.layout.tensors)
    assert path.read_bytes() == prepared.path.read_bytes()
    assert sorted(os.listdir(path.parent)) == [path.name, path.name + ".json"]
    open_image(path).close()


@pytest.mark.parametrize("page", [0, 5])
def test_what_is_wrong_in_it_is_written_anew(prepared: Prepared, tmp_path: Path, page: int) -> None:
    """As after a power cut, when the journal may have reached the disk before the pages."""
    with half_built(prepared.checkpoint.folder, tmp_path / "new", 12) as path:
        damage(path.with_name(path.name + ".unfinished"), page * PAGE + 99)
    seen: list[int] = []
    assert prepare(prepared, tmp_path / "new", lambda done, total: seen.append(done)) == path
    assert seen[:page] == [(n + 1) * PAGE for n in range(page)]
    assert path.read_bytes() == prepared.path.read_bytes()
    open_image(path).close()


@pytest.mark.parametrize("journal", [b"", b"{}\n", b'{"format": 3}\n12345678'])
def test_a_journal_of_something_else_is_begun_anew(prepared: Prepared, tmp_path: Path, journal: bytes) -> None:
    with half_built(prepared.checkpoint.folder, tmp_path / "new", 12) as path:
        path.with_name(path.name + ".sums.unfinished").write_bytes(journal)
    assert prepare(prepared, tmp_path / "new").read_bytes() == prepared.path.read_bytes()


def test_what_nobody_goes_on_with_is_removed_after_a_day_unless_somebody_is_at_it(
    prepared: Prepared, tmp_path: Path
) -> None:
    images = tmp_path / "new"
    with half_built(prepared.checkpoint.folder, images, 3) as path:
        journal = path.with_name(path.name + ".sums.unfinished")
        os.utime(journal, (0, time.time() - 2 * DAY_S))
        assert remove_stale(images) == 0
        assert not remove_unfinished(path)
    assert unfinished(images, path.name[:5] + "*") == [path]
    assert unfinished(images, "another*") == []
    os.utime(journal)
    assert remove_stale(images) == 0
    os.utime(journal, (0, time.time() - 2 * DAY_S))
    assert remove_stale(images) == 1
    assert os.listdir(images) == []
    prepare(prepared, images)
    assert remove_stale(images) == 0
    open_image(path).close()


# Two at once


def test_two_that_want_one_image_make_it_once(prepared: Prepared, tmp_path: Path, read: list[str]) -> None:
    threads = [threading.Thread(target=prepare, args=(prepared, tmp_path / "both")) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(read) == len(prepared.layout.tensors)
    path = tmp_path / "both" / prepared.path.name
    assert path.read_bytes() == prepared.path.read_bytes()
    assert sorted(os.listdir(path.parent)) == [path.name, path.name + ".json"]


def test_who_waits_for_another_sees_its_progress_and_can_give_up(prepared: Prepared, tmp_path: Path) -> None:
    seen: list[int] = []

    def give_up(done: int, _total: int) -> None:
        seen.append(done)
        raise GivenUp

    with half_built(prepared.checkpoint.folder, tmp_path / "both", 4) as path:
        with pytest.raises(GivenUp):
            prepare(prepared, tmp_path / "both", give_up)
        assert seen[0] >= 4 * PAGE
        assert path.with_name(path.name + ".unfinished").exists()  # the other's


def test_who_waits_for_one_that_is_killed_goes_on_itself(prepared: Prepared, tmp_path: Path) -> None:
    waiting, made = threading.Event(), []

    def wait() -> None:
        made.append(prepare(prepared, tmp_path / "both", lambda done, total: waiting.set()))

    waiter = threading.Thread(target=wait)
    with half_built(prepared.checkpoint.folder, tmp_path / "both", 4):
        waiter.start()
        assert waiting.wait(60)
        assert not made
    waiter.join(60)
    assert made[0].read_bytes() == prepared.path.read_bytes()


def test_a_deleted_image_is_made_again(prepared: Prepared) -> None:
    good = prepared.path.read_bytes()
    delete_image(prepared.path)
    assert prepare(prepared, prepared.images).read_bytes() == good
