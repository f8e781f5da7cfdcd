"""What fills the pages of a weight range: from the disk or from the host tier, on the host or on a GPU."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import Protocol

import torch

from services.gpu_agent.weights.host_tier import HostImage, HostImageCorrupt
from services.gpu_agent.weights.image import Image, page_sum

# Pinned pages: one is copied while the others are read. Reading and summing a page takes a core longer than copying it.
_STAGING_PAGES = 4
# Copies from pinned memory under way: while one is waited for, the bus has the next ones.
_COPIES_AHEAD = 4


class PageSource(Protocol):
    """Writes pages one after the other, in the thread that entered `page_source`."""

    @property
    def ahead(self) -> int:
        """How many pages may be begun before the first of them has ended."""
        ...

    def begin(self, index: int, page: torch.Tensor) -> None:
        """Begins to write a page (uint8, page_bytes)."""
        ...

    def end(self, index: int) -> None:
        """Returns when the page that was begun first holds its data. Raises ImageCorrupt, OSError."""
        ...


@contextmanager
def page_source(image: Image, host: HostImage | None, first: int, device: torch.device) -> Iterator[PageSource]:
    """What fills pages `first`, `first` + 1, ... of a weight range on `device`, from `host` where it is given.

    When the block ends, nothing writes to a page any more.
    """
    on_host = device.type == "cpu"
    if host is not None:
        copies = _HostCopies(image, host) if on_host else _DeviceCopies(image, host, device)
        try:
            yield copies
        finally:
            copies.settle()
    elif on_host:
        yield _Reads(image)
    else:
        with ThreadPoolExecutor(_STAGING_PAGES - 1, "read-image") as readers:
            staged = _StagedPages(image, first, device, readers)
            try:
                yield staged
            finally:
                staged.abandon()


class _Reads:
    """From the disk to host memory."""

    ahead = 1

    def __init__(self, image: Image) -> None:
        self._image = image

    def begin(self, index: int, page: torch.Tensor) -> None:
        self._page = page

    def end(self, index: int) -> None:
        self._image.read_page(index, self._page)


class _HostCopies:
    """From the host tier to host memory."""

    ahead = 1

    def __init__(self, image: Image, host: HostImage) -> None:
        self._image = image
        self._host = host

    def begin(self, index: int, page: torch.Tensor) -> None:
        self._page = page
        page.copy_(self._host.page(index))

    def end(self, index: int) -> None:
        _check(self._image, index, int(page_sum(self._page)))

    def settle(self) -> None:
        """Nothing is under way."""


class _DeviceCopies:
    """From the host tier to a GPU: several copies under way, each summed up where it arrives."""

    ahead = _COPIES_AHEAD

    def __init__(self, image: Image, host: HostImage, device: torch.device) -> None:
        self._image = image
        self._host = host
        self._stream = _copy_stream(device)
        self._sums = torch.empty(_COPIES_AHEAD, dtype=torch.int64, pin_memory=True)
        # They sleep rather than spin, for the engine needs the core.
        self._copied = [torch.cuda.Event(blocking=True) for _ in range(_COPIES_AHEAD)]  # type: ignore[no-untyped-call]

    def begin(self, index: int, page: torch.Tensor) -> None:
        place = index % _COPIES_AHEAD
        with torch.cuda.stream(self._stream):
            page.copy_(self._host.page(index), non_blocking=True)
            self._sums[place].copy_(page_sum(page), non_blocking=True)
            self._copied[place].record()

    def end(self, index: int) -> None:
        place = index % _COPIES_AHEAD
        self._copied[place].synchronize()
        _check(self._image, index, int(self._sums[place]))

    def settle(self) -> None:
        self._stream.synchronize()


class _StagedPages:
    """From the disk to a GPU, by pinned memory: page i + 1 and more are read while page i is copied."""

    ahead = 1

    def __init__(self, image: Image, first: int, device: torch.device, readers: ThreadPoolExecutor) -> None:
        self._image = image
        self._readers = readers
        self._next = first
        self._stream = _copy_stream(device)
        # It sleeps rather than spins, for the engine needs the core.
        self._copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._reading: deque[tuple[int, torch.Tensor, Future[None]]] = deque()
        for _ in range(_STAGING_PAGES):
            # torch keeps pinned memory for the next load, so only the first one pays for it.
            self._read_next(torch.empty(image.layout.page_bytes, dtype=torch.uint8, pin_memory=True))

    def begin(self, index: int, page: torch.Tensor) -> None:
        self._page = page

    def end(self, index: int) -> None:
        expected, staging, read = self._reading[0]
        if index != expected:
            raise ValueError(f"page {index} was asked for, but page {expected} is next")
        read.result()
        self._reading.popleft()
        with torch.cuda.stream(self._stream):
            self._page.copy_(staging, non_blocking=True)
            self._copied.record()
        self._copied.synchronize()
        self._read_next(staging)

    def abandon(self) -> None:
        """Has reads that nobody waits for any more not begin."""
        for _, _, read in self._reading:
            read.cancel()

    def _read_next(self, staging: torch.Tensor) -> None:
        index = self._next
        if index < self._image.layout.num_pages:
            self._next += 1
            self._reading.append((index, staging, self._readers.submit(self._image.read_page, index, staging)))


def _check(image: Image, index: int, found: int) -> None:
    if found != image.sums[index]:
        raise HostImageCorrupt(f"page {index} of {image.path.name} has another sum in the host tier")


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all loads.

    torch has 32 streams and hands them out in turn: with a new one for each load, some load would get the engine's,
    wait for its steps, and be recorded rather than done while a graph is captured there.
    """
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        page_sum(torch.zeros(1 << 20, dtype=torch.uint8, device=device))  # what summing needs is taken now, not later
    return stream
