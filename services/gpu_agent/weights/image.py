"""Images: a model's weights in one file, laid out as in the arena; beside it a JSON with layout and checksums."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from services.gpu_agent.weights.checkpoint import Checkpoint
from services.gpu_agent.weights.direct import DirectFile, FileEnds
from services.gpu_agent.weights.errors import ImageCorrupt
from services.gpu_agent.weights.layout import ImageLayout
from services.gpu_agent.weights.sums import host_sum

_FORMAT = 4  # 2: the matrices of a layer before its vectors, a dtype for each tensor; 3: sums of pages; 4: sums alone

_DESCRIBED = 256  # images of which JSONs that were read are kept: reading one takes milliseconds, which a wake has not


class Image:
    """An image's open file. Safe to read from several threads; reading and summing hold no interpreter lock."""

    def __init__(
        self, path: Path, fingerprint: str, layout: ImageLayout, sums: Sequence[int], file: DirectFile
    ) -> None:
        """sums: of each page (see sums.py)."""
        self.path = path
        self.fingerprint = fingerprint
        self.layout = layout
        self._sums = sums
        self._file = file

    def read_page(self, index: int, into: torch.Tensor) -> None:
        """Reads one page into `into` (uint8, CPU, contiguous, page_bytes long) and checks it.

        It is read by way of the page cache. Raises ImageCorrupt, and OSError where the disk fails.
        """
        page_bytes = self.layout.page_bytes
        if into.numel() != page_bytes or into.dtype != torch.uint8:
            raise ValueError(f"a page needs {page_bytes} bytes of uint8, not {into.numel()} of {into.dtype}")
        target = into.numpy().data
        try:
            self._file.read_through_cache(index * page_bytes, target)
        except FileEnds as error:
            raise self._cut_short(index) from error
        self.check(index, host_sum(target))

    def fetch_page(self, index: int, into: memoryview) -> None:
        """Reads one page past the page cache and does not check it: for memory whose address is a multiple of 4,096.

        Raises ImageCorrupt where the file ends, and OSError where the disk fails.
        """
        try:
            self._file.read(index * self.layout.page_bytes, into)
        except FileEnds as error:
            raise self._cut_short(index) from error

    def is_page(self, index: int, found: int) -> bool:
        """Whether a page whose sum is `found` is page `index`."""
        return found == self._sums[index]

    def check(self, index: int, found: int) -> None:
        """Raises ImageCorrupt unless `found` is the sum of page `index`."""
        if not self.is_page(index, found):
            raise ImageCorrupt(f"page {index} of {self.path} does not have its checksum")

    @property
    def is_current(self) -> bool:
        """Whether the file is still the one of its name; False where it was deleted or replaced."""
        return self._file.is_at(self.path)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def __enter__(self) -> Image:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _cut_short(self, index: int) -> ImageCorrupt:
        return ImageCorrupt(f"{self.path} ends in page {index} of {self.layout.num_pages}")


def image_path(folder: Path, checkpoint: Checkpoint, layout: ImageLayout) -> Path:
    """The file for this version of a checkpoint in this layout; another version or dtype has another file."""
    dtype = str(layout.dtype).removeprefix("torch.")
    return folder / f"{checkpoint.fingerprint[:32]}-{dtype}-{layout.page_bytes}.image"


def sidecar(path: Path) -> Path:
    """The JSON beside an image."""
    return path.with_name(f"{path.name}.json")


def describe(fingerprint: str, layout: ImageLayout, sums: Iterable[int]) -> bytes:
    """What the JSON beside an image says."""
    body = {"format": _FORMAT, "fingerprint": fingerprint, "layout": layout.to_json(), "page_sums": list(sums)}
    return json.dumps({**body, "crc32": _checksum(body)}).encode()


def open_image(path: Path) -> Image:
    """Opens an image. FileNotFoundError where there is none; ImageCorrupt where file and JSON do not fit."""
    beside = sidecar(path)
    found = beside.stat()
    fingerprint, layout, sums = _described(beside, (found.st_ino, found.st_mtime_ns, found.st_size))
    file = DirectFile(path)
    if file.size != layout.total_bytes or len(sums) != layout.num_pages:
        size = file.size
        file.close()
        raise ImageCorrupt(f"{path} has {size} bytes and not {layout.total_bytes}")
    return Image(path, fingerprint, layout, sums, file)


@lru_cache(maxsize=_DESCRIBED)
def _described(path: Path, version: tuple[int, ...]) -> tuple[str, ImageLayout, tuple[int, ...]]:
    """Fingerprint, layout and sums that a JSON tells; `version` is another one when the file is."""
    try:
        body = json.loads(path.read_bytes())
        checksum = body.pop("crc32")
        if body["format"] != _FORMAT or checksum != _checksum(body):
            raise ImageCorrupt(f"{path} is damaged or of another version")
        return body["fingerprint"], ImageLayout.from_json(body["layout"]), tuple(body["page_sums"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ImageCorrupt(f"{path} is damaged: {error!r}") from error


def open_image_of(path: Path, fingerprint: str, layout: ImageLayout) -> Image:
    """The same, of just this checkpoint in just this layout: ImageCorrupt where it is another one's."""
    image = open_image(path)
    if image.fingerprint != fingerprint or image.layout != layout:
        image.close()
        raise ImageCorrupt(f"{path} is of another version of the checkpoint")
    return image


def delete_image(path: Path) -> None:
    """Deletes an image and its JSON. Those who have it open can still read it. Nothing where there is none."""
    sidecar(path).unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _checksum(body: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())
