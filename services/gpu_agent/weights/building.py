"""Making images from checkpoints: page by page, by one agent of a node at a time, resumed where a killed one stopped.

While an image is made there lie beside its place its pages so far (`.unfinished`) and a journal (`.sums.unfinished`)
with the sum of each of them. Who works on it holds a lock on the journal. Image and JSON appear by renaming, and the
journal goes last; so whoever finds the journal can go on from what is there, once its sums have shown it to be right.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from services.common.telemetry import logger
from services.gpu_agent.weights.checkpoint import Checkpoint
from services.gpu_agent.weights.errors import CheckpointError, ImageCorrupt, Problem
from services.gpu_agent.weights.image import describe, image_path, open_image_of, sidecar
from services.gpu_agent.weights.layout import ImageLayout, TensorPlace
from services.gpu_agent.weights.sums import host_sum

_log = logger(__name__)
_UNFINISHED = ".unfinished"
_JOURNAL = ".sums.unfinished"
_SUM = struct.Struct("<q")
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_LOOK_S = 0.05  # how often it is looked whether another agent has finished: a lock has no timeout
STALE_S = 24 * 3600.0  # what nobody has gone on with for so long is not wanted any more

BuildProgress = Callable[[int, int], None]  # bytes done, bytes in all


def prepare_image(checkpoint: Checkpoint, layout: ImageLayout, folder: Path, progress: BuildProgress) -> Path:
    """Sees to it that the image is in `folder`, and returns its path: makes it, or waits for another agent that does.

    It does not read the pages of an image that is there: after an ImageCorrupt from a load, delete it and prepare it
    again. `progress` is called after each piece; what it raises ends the work, and leaves nothing. Raises
    CheckpointError, also with nothing left: too_large where the disk is full, invalid where a weight is not finite in
    the layout's dtype.
    """
    path = image_path(folder, checkpoint, layout)
    folder.mkdir(parents=True, exist_ok=True)
    header = describe(checkpoint.fingerprint, layout, []) + b"\n"
    total, furthest = layout.total_bytes, 0

    def advance(done: int, _: int) -> None:
        """It never goes back, although what a killed agent had written is looked through again."""
        nonlocal furthest
        furthest = max(furthest, done)
        progress(furthest, total)

    with _disk_full_said(total, folder):
        while not _is_there(path, checkpoint, layout):
            with _working(path) as journal:
                if journal is None:
                    advance(_written(path, len(header), layout), total)
                    time.sleep(_LOOK_S)
                elif not _is_there(path, checkpoint, layout):  # another may have finished it meanwhile
                    _build(checkpoint, layout, path, journal, header, advance)
    return path


def remove_unfinished(path: Path) -> bool:
    """Deletes what was left of an image that was not finished; False where somebody works on it."""
    with _working(path) as journal:
        if journal is not None:
            _delete_parts(path)
        return journal is not None


def remove_stale(folder: Path) -> int:
    """Deletes what nobody has gone on with for a day; returns how many images' parts."""
    removed = 0
    for path in unfinished(folder):
        with suppress(FileNotFoundError):  # finished in this moment
            if time.time() - _beside(path, _JOURNAL).stat().st_mtime > STALE_S:
                removed += remove_unfinished(path)
    return removed


def unfinished(folder: Path, pattern: str = "*") -> list[Path]:
    """Where the images are to be that were begun and not finished, of those whose name fits."""
    return [path.with_name(path.name.removesuffix(_JOURNAL)) for path in folder.glob(f"{pattern}{_JOURNAL}")]


def _is_there(path: Path, checkpoint: Checkpoint, layout: ImageLayout) -> bool:
    with suppress(FileNotFoundError, ImageCorrupt), open_image_of(path, checkpoint.fingerprint, layout):
        return True
    return False


@contextmanager
def _working(path: Path) -> Iterator[int | None]:
    """The image's journal, open, with nobody else at work within the block; None where somebody is."""
    place = _beside(path, _JOURNAL)
    journal = os.open(place, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        if not os.fstat(journal).st_nlink:  # whoever had the lock has finished
            yield None
            return
        try:
            yield journal
        except BaseException:
            _delete_parts(path)
            raise
        place.unlink(missing_ok=True)
    finally:
        os.close(journal)


def _build(
    checkpoint: Checkpoint, layout: ImageLayout, path: Path, journal: int, header: bytes, progress: BuildProgress
) -> None:
    pages = os.open(_beside(path, _UNFINISHED), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        os.posix_fallocate(pages, 0, layout.total_bytes)
        os.ftruncate(pages, layout.total_bytes)
        sums = _kept(journal, header, pages, layout, progress)
        os.ftruncate(journal, 0)
        _write(journal, header + b"".join(map(_SUM.pack, sums)))
        if sums:
            _log.info("going on with an image that was begun", image=path.name, page=len(sums), of=layout.num_pages)
        writer = _PageWriter(pages, journal, layout.page_bytes, sums)
        _write_pages(checkpoint, layout, writer, progress)
        os.fsync(pages)
    finally:
        os.close(pages)
    beside = sidecar(path).with_name(sidecar(path).name + _UNFINISHED)
    with beside.open("wb") as file:
        file.write(describe(checkpoint.fingerprint, layout, writer.sums))
        file.flush()
        os.fsync(file.fileno())
    os.rename(_beside(path, _UNFINISHED), path)
    os.rename(beside, sidecar(path))
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _kept(journal: int, header: bytes, pages: int, layout: ImageLayout, progress: BuildProgress) -> list[int]:
    """The sums of the first pages, as far as they are there and right."""
    written = os.pread(journal, os.fstat(journal).st_size, 0)
    if not written.startswith(header):
        return []  # it was begun otherwise
    records = written[len(header) :]
    sums = [value for (value,) in _SUM.iter_unpack(records[: len(records) // _SUM.size * _SUM.size])]
    page = memoryview(bytearray(layout.page_bytes))
    for index, expected in enumerate(sums):
        if os.preadv(pages, [page], index * layout.page_bytes) != len(page) or host_sum(page) != expected:
            return sums[:index]
        progress((index + 1) * layout.page_bytes, layout.total_bytes)
    return sums


def _written(path: Path, header_bytes: int, layout: ImageLayout) -> int:
    """How many bytes whoever is at work has written."""
    try:
        records = _beside(path, _JOURNAL).stat().st_size - header_bytes
    except FileNotFoundError:
        return 0
    return max(0, min(records // _SUM.size, layout.num_pages)) * layout.page_bytes


def _write_pages(checkpoint: Checkpoint, layout: ImageLayout, writer: _PageWriter, progress: BuildProgress) -> None:
    """Writes all tensors and the padding between them, but for what the writer has already."""
    begin = writer.position
    for place in layout.tensors:
        if place.offset + place.nbytes <= begin:
            continue
        writer.pad(place.offset)
        at = place.offset
        for piece in checkpoint.tensors[place.name].read():
            there = max(0, begin - at)
            at += piece.numel() * place.dtype.itemsize
            if at > begin:
                writer.write(_converted(piece, place)[there:])
                progress(writer.position, layout.total_bytes)
    writer.pad(layout.total_bytes)
    progress(writer.position, layout.total_bytes)


def _converted(piece: torch.Tensor, place: TensorPlace) -> torch.Tensor:
    serving = piece.to(place.dtype)
    if not bool(torch.isfinite(serving).all()):
        stored_well = bool(torch.isfinite(piece).all())
        raise CheckpointError(
            Problem.INVALID,
            f"tensor {place.name} has values beyond the range of {place.dtype}; serve in bfloat16 or float32"
            if stored_well
            else f"tensor {place.name} has values that are not finite numbers; the checkpoint is damaged",
        )
    return serving.view(torch.uint8)


class _PageWriter:
    """Writes bytes in sequence, page by page, and then each page's sum into the journal. No step holds the GIL."""

    def __init__(self, pages: int, journal: int, page_bytes: int, sums: list[int]) -> None:
        """It goes on behind the pages whose sums are given."""
        self._pages = pages
        self._journal = journal
        self._page = torch.empty(page_bytes, dtype=torch.uint8)
        self.position = len(sums) * page_bytes
        self.sums = list(sums)

    def write(self, data: torch.Tensor) -> None:
        """The next bytes: uint8, 1-D, CPU."""
        size = len(self._page)
        while len(data):
            filled = self.position % size
            part = data[: size - filled]
            self._page[filled : filled + len(part)].copy_(part)
            self.position += len(part)
            if filled + len(part) == size:
                page = self._page.numpy().data
                _write(self._pages, page, self.position - size)
                self.sums.append(host_sum(page))
                _write(self._journal, _SUM.pack(self.sums[-1]))
            data = data[len(part) :]

    def pad(self, end: int) -> None:
        """Writes zeros up to there; nothing where that is written already."""
        self.write(torch.zeros(max(0, end - self.position), dtype=torch.uint8))


def _write(fd: int, data: bytes | memoryview, offset: int | None = None) -> None:
    """Writes all of it, at the file's end where no offset is given."""
    done = 0
    while done < len(data):
        rest = memoryview(data)[done:]
        done += os.write(fd, rest) if offset is None else os.pwrite(fd, rest, offset + done)


@contextmanager
def _disk_full_said(nbytes: int, folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise
        raise CheckpointError(
            Problem.TOO_LARGE,
            f"the image needs {nbytes / 2**20:.1f} MiB in {folder}, but the disk is full ({error.strerror}); free "
            "space there or configure another folder for images",
        ) from error


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _delete_parts(path: Path) -> None:
    """The journal last: without it nobody would find the rest."""
    for part in (_beside(path, _UNFINISHED), _beside(sidecar(path), _UNFINISHED), _beside(path, _JOURNAL)):
        part.unlink(missing_ok=True)
