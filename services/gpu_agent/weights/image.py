"""Images: a model's weights in one file, laid out as in the arena; beside it a JSON with layout and checksums."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch

from services.gpu_agent.weights.checkpoint import Checkpoint
from services.gpu_agent.weights.errors import CheckpointError, ImageCorrupt, Problem
from services.gpu_agent.weights.layout import ImageLayout, TensorPlace

_FORMAT = 3  # 2: the matrices of a layer before its vectors, a dtype for each tensor; 3: sums of pages
UNFINISHED = ".unfinished"
"""How the names of files end that are being written."""
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

BuildProgress = Callable[[int, int], None]  # bytes done, bytes in all


class Image:
    """An image's open file. Safe to read from several threads."""

    def __init__(
        self, path: Path, fingerprint: str, layout: ImageLayout, checksums: list[int], sums: list[int], fd: int
    ) -> None:
        """checksums: CRC-32 of each page, for what comes from a disk; sums: see page_sum."""
        self.path = path
        self.fingerprint = fingerprint
        self.layout = layout
        self.sums = sums
        """The sum of each page (see page_sum): weaker than its CRC, but as fast as memory, on a GPU too."""
        self._checksums = checksums
        self._fd = fd

    def read_page(self, index: int, into: torch.Tensor) -> None:
        """Reads one page into `into` (uint8, CPU, contiguous, page_bytes long) and verifies its checksum.

        Neither reading nor summing holds the interpreter lock. Raises ImageCorrupt, and OSError where the disk fails.
        """
        page_bytes = self.layout.page_bytes
        if into.numel() != page_bytes or into.dtype != torch.uint8:
            raise ValueError(f"a page needs {page_bytes} bytes of uint8, not {into.numel()} of {into.dtype}")
        target = into.numpy().data
        done = 0
        while done < page_bytes:
            read = os.preadv(self._fd, [target[done:]], index * page_bytes + done)
            if read == 0:
                raise ImageCorrupt(f"{self.path} ends in page {index} of {self.layout.num_pages}")
            done += read
        self.verify(index, target)

    def verify(self, index: int, page: memoryview) -> None:
        """Raises ImageCorrupt unless these are the bytes of a page."""
        if zlib.crc32(page) != self._checksums[index]:
            raise ImageCorrupt(f"page {index} of {self.path} does not have its checksum")

    def close(self) -> None:
        """Closes the file."""
        os.close(self._fd)

    def __enter__(self) -> Image:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def image_path(folder: Path, checkpoint: Checkpoint, layout: ImageLayout) -> Path:
    """The file for this version of a checkpoint in this layout; another version or dtype has another file."""
    dtype = str(layout.dtype).removeprefix("torch.")
    return folder / f"{checkpoint.fingerprint[:32]}-{dtype}-{layout.page_bytes}.image"


def prepare_image(checkpoint: Checkpoint, layout: ImageLayout, folder: Path, progress: BuildProgress) -> Path:
    """Sees to it that the image is in `folder`, building it where it is missing or broken, and returns its path.

    It does not read the pages: after an ImageCorrupt from a load, delete the image and prepare it again.
    """
    path = image_path(folder, checkpoint, layout)
    with suppress(FileNotFoundError, ImageCorrupt), open_image(path) as image:
        if image.fingerprint == checkpoint.fingerprint and image.layout == layout:
            return path
    build_image(checkpoint, layout, path, progress)
    return path


def build_image(checkpoint: Checkpoint, layout: ImageLayout, path: Path, progress: BuildProgress) -> None:
    """Writes the image, converted to the layout's dtype. It appears when it is complete, or not at all.

    `progress` is called after each piece; what it raises ends the work. Raises CheckpointError: too_large where the
    disk is full, invalid where a weight is not finite in the serving dtype.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _replacing(path) as file:
            os.posix_fallocate(file.fileno(), 0, layout.total_bytes)
            pages = _write_pages(checkpoint, layout, file, progress)
        body = {
            "format": _FORMAT,
            "fingerprint": checkpoint.fingerprint,
            "layout": layout.to_json(),
            "page_crc32": pages.checksums,
            "page_sums": pages.sums,
        }
        with _replacing(_sidecar(path)) as file:
            file.write(json.dumps({**body, "crc32": _checksum(body)}).encode())
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise
        raise CheckpointError(
            Problem.TOO_LARGE,
            f"the image needs {layout.total_bytes / 2**20:.1f} MiB in {path.parent}, but the disk is full "
            f"({error.strerror}); free space there or configure another folder for images",
        ) from error


def open_image(path: Path) -> Image:
    """Opens an image. FileNotFoundError where there is none; ImageCorrupt where file and sidecar do not fit."""
    try:
        body = json.loads(_sidecar(path).read_bytes())
        checksum = body.pop("crc32")
        if body["format"] != _FORMAT or checksum != _checksum(body):
            raise ImageCorrupt(f"{_sidecar(path)} is damaged or of another version")
        layout = ImageLayout.from_json(body["layout"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ImageCorrupt(f"{_sidecar(path)} is damaged: {error!r}") from error
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    size = os.fstat(fd).st_size
    checksums, sums = body["page_crc32"], body["page_sums"]
    if size != layout.total_bytes or not len(checksums) == len(sums) == layout.num_pages:
        os.close(fd)
        raise ImageCorrupt(f"{path} has {size} bytes and not {layout.total_bytes}")
    return Image(path, body["fingerprint"], layout, checksums, sums, fd)


def page_sum(page: torch.Tensor) -> torch.Tensor:
    """The sum of a page (uint8, on any device) as int64s, which wraps; it finds any flipped bit."""
    return page.view(torch.int64).sum()


def delete_image(path: Path) -> None:
    """Deletes an image and its sidecar. Those who have it open can still read it. Nothing where there is none."""
    _sidecar(path).unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> int:
    """Deletes what builds that were killed left in `folder`, and returns how many files; running builds are spared."""
    removed = 0
    for path in folder.glob(f"*{UNFINISHED}"):
        with suppress(FileNotFoundError), path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            path.unlink()
            removed += 1
    return removed


def _write_pages(checkpoint: Checkpoint, layout: ImageLayout, file: IO[bytes], progress: BuildProgress) -> _PageWriter:
    """Writes all tensors and the padding between them; returns what knows the checksums of the pages."""
    pages = _PageWriter(file, layout.page_bytes)
    for place in layout.tensors:
        pages.write(bytes(place.offset - pages.position))
        for piece in checkpoint.tensors[place.name].read():
            pages.write(_converted(piece, place))
            progress(pages.position, layout.total_bytes)
    pages.write(bytes(layout.total_bytes - pages.position))
    progress(pages.position, layout.total_bytes)
    return pages


def _converted(piece: torch.Tensor, place: TensorPlace) -> memoryview:
    serving = piece.to(place.dtype)
    if not bool(torch.isfinite(serving).all()):
        stored_well = bool(torch.isfinite(piece).all())
        raise CheckpointError(
            Problem.INVALID,
            f"tensor {place.name} has values beyond the range of {place.dtype}; serve in bfloat16 or float32"
            if stored_well
            else f"tensor {place.name} has values that are not finite numbers; the checkpoint is damaged",
        )
    return serving.view(torch.uint8).numpy().data


class _PageWriter:
    """Writes bytes in sequence, page by page, and sums up each page."""

    def __init__(self, file: IO[bytes], page_bytes: int) -> None:
        self._file = file
        self._page = torch.empty(page_bytes, dtype=torch.uint8)
        self._bytes = self._page.numpy().data
        self.position = 0
        self.checksums: list[int] = []
        self.sums: list[int] = []

    def write(self, data: bytes | memoryview) -> None:
        rest = memoryview(data)
        while rest:
            filled = self.position % len(self._bytes)
            part = rest[: len(self._bytes) - filled]
            self._bytes[filled : filled + len(part)] = part
            self.position += len(part)
            if filled + len(part) == len(self._bytes):
                self._file.write(self._bytes)
                self.checksums.append(zlib.crc32(self._bytes))
                self.sums.append(int(page_sum(self._page)))
            rest = rest[len(part) :]


@contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of `path` when the block ends, safely on the disk; if it raises, nothing is left."""
    while True:
        fd, name = tempfile.mkstemp(prefix=f"{path.name}.", suffix=UNFINISHED, dir=path.parent)
        # The lock tells remove_unfinished that this build lives; it may have been there before the lock was.
        fcntl.flock(fd, fcntl.LOCK_EX)
        if os.fstat(fd).st_nlink:
            break
        os.close(fd)
    try:
        with os.fdopen(fd, "wb") as file:
            yield file
            file.flush()
            os.fsync(fd)
            os.rename(name, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(name)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _sidecar(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _checksum(body: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())
