"""What fills the pages of a weight range: from the disk or from the host tier, on the host or on a GPU."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from mmap import mmap
from typing import Any, Protocol

import torch

from services.gpu_agent.weights.host_image import HostImage, HostImageCorrupt
from services.gpu_agent.weights.image import Image
from services.gpu_agent.weights.sums import device_sums, host_sum, prepare_sums

# Pinned memory between the disk and a GPU: one page of it is copied while the others are read. One read of a large page
# keeps a disk busy; of small ones it takes more.
_STAGING_BYTES = 128 << 20
_FEWEST_STAGED, _MOST_STAGED = 4, 16
# Most pages on their way from pinned memory: while some are waited for, the bus has the next ones.
_COPIES_AHEAD = 32
MOST_AT_ONCE = 8
"""Most pages begun at a time: the bus waits for the first of them to be mapped, and steps of instances for all."""


class PageSource(Protocol):
    """Writes pages in their order, in the thread that entered `page_source`."""

    @property
    def ahead(self) -> int:
        """How many pages may be begun before the first of them has ended."""
        ...

    def begin(self, first: int, pages: torch.Tensor) -> None:
        """Begins to write pages `first`, `first` + 1, ...: uint8, (n, page_bytes), n at most MOST_AT_ONCE."""
        ...

    def end(self, first: int, n: int) -> None:
        """Returns when those n pages, of all under way begun first, hold their data. Raises ImageCorrupt, OSError."""
        ...


@contextmanager
def page_source(image: Image, host: HostImage | None, first: int, device: torch.device) -> Iterator[PageSource]:
    """What fills pages `first`, `first` + 1, ... of a weight range on `device`, from `host` where it is given.

    When the block ends, nothing writes to a page any more.
    """
    if device.type == "cpu":
        yield _Reads(image) if host is None else _HostCopies(image, host)
        return
    with torch.cuda.device(device):  # of this thread, which may be a new one
        copies = _DeviceCopies(image.layout.page_bytes, device)
        try:
            if host is not None:
                yield _FromHostTier(image, host, copies)
            else:
                with _staged_pages(image, first, copies) as staged:
                    yield staged
        finally:
            copies.settle()


class _Reads:
    """From the disk to host memory, by way of the page cache: it is the tier of a machine without a GPU."""

    ahead = 1

    def __init__(self, image: Image) -> None:
        self._image = image

    def begin(self, first: int, pages: torch.Tensor) -> None:
        self._pages = pages

    def end(self, first: int, n: int) -> None:
        for index, page in enumerate(self._pages, first):
            self._image.read_page(index, page)


class _HostCopies:
    """From the host tier to host memory."""

    ahead = 1

    def __init__(self, image: Image, host: HostImage) -> None:
        self._image = image
        self._host = host

    def begin(self, first: int, pages: torch.Tensor) -> None:
        self._pages = pages
        for index, page in enumerate(pages, first):
            page.copy_(self._host.page(index))

    def end(self, first: int, n: int) -> None:
        for index, page in enumerate(self._pages, first):
            _check_host(self._image, index, host_sum(page.numpy().data))


class _DeviceCopies:
    """Copies from pinned memory to a GPU, several under way; what has arrived is summed up there beside the next."""

    def __init__(self, page_bytes: int, device: torch.device) -> None:
        self._streams = _streams(page_bytes, device)
        # For each time that copies are begun, of which there are at most as many under way as pages.
        self._sums = torch.empty(_COPIES_AHEAD, MOST_AT_ONCE, dtype=torch.int64, pin_memory=True)
        self._copied = [torch.cuda.Event() for _ in range(_COPIES_AHEAD)]  # type: ignore[no-untyped-call]
        # Who waits for it sleeps rather than spins, for the engine needs the core.
        self._summed = [torch.cuda.Event(blocking=True) for _ in range(_COPIES_AHEAD)]  # type: ignore[no-untyped-call]
        self._begun = self._ended = 0

    def begin(self, pages: torch.Tensor, sources: list[torch.Tensor]) -> None:
        """Begins to copy pages (n, page_bytes); all but the last _COPIES_AHEAD pages before them must have ended."""
        place, (copying, summing) = self._begun % _COPIES_AHEAD, self._streams
        self._begun += 1
        with torch.cuda.stream(copying):
            torch._foreach_copy_(list(pages), sources, non_blocking=True)
            self._copied[place].record()
        with torch.cuda.stream(summing):
            summing.wait_event(self._copied[place])
            self._sums[place, : len(pages)].copy_(device_sums(pages), non_blocking=True)
            self._summed[place].record()

    def end(self, n: int) -> list[int]:
        """The sums of the n pages that were begun first, when they have arrived."""
        place = self._ended % _COPIES_AHEAD
        self._ended += 1
        self._summed[place].synchronize()
        return [int(found) for found in self._sums[place, :n].tolist()]

    def settle(self) -> None:
        """Returns when nothing is under way."""
        for stream in self._streams:
            stream.synchronize()


class _FromHostTier:
    """From the host tier to a GPU."""

    ahead = _COPIES_AHEAD

    def __init__(self, image: Image, host: HostImage, copies: _DeviceCopies) -> None:
        self._image = image
        self._host = host
        self._copies = copies

    def begin(self, first: int, pages: torch.Tensor) -> None:
        self._copies.begin(pages, [self._host.page(index) for index in range(first, first + len(pages))])

    def end(self, first: int, n: int) -> None:
        for index, found in enumerate(self._copies.end(n), first):
            _check_host(self._image, index, found)


@contextmanager
def _staged_pages(image: Image, first: int, copies: _DeviceCopies) -> Iterator[_StagedPages]:
    page_bytes = image.layout.page_bytes
    count = min(max(_FEWEST_STAGED, _STAGING_BYTES // page_bytes), _MOST_STAGED)
    staged = _StagedPages(image, first, copies, ThreadPoolExecutor(count - 1, "read-image"))
    try:
        for _ in range(min(count, image.layout.num_pages - first)):
            staged.add(_Pinned(page_bytes))  # while one is made ready, those before it are filled
        yield staged
    finally:
        staged.close()


class _StagedPages:
    """From the disk to a GPU, by pinned memory: page i + 1 and more are read while page i is copied."""

    ahead = 1

    def __init__(self, image: Image, first: int, copies: _DeviceCopies, readers: ThreadPoolExecutor) -> None:
        self._image = image
        self._copies = copies
        self._readers = readers
        self._next = first
        self._pinned: list[_Pinned] = []
        self._reading: deque[tuple[int, torch.Tensor, Future[None]]] = deque()

    def add(self, pinned: _Pinned) -> None:
        """Has one more page of pinned memory used, from now on."""
        self._pinned.append(pinned)
        self._read_next(pinned.page)

    def begin(self, first: int, pages: torch.Tensor) -> None:
        self._pages = pages

    def end(self, first: int, n: int) -> None:
        expected, staging, read = self._reading[0]
        if (first, n) != (expected, 1):
            raise ValueError(f"{n} pages from {first} on were asked for, but page {expected} is next, by itself")
        read.result()
        self._reading.popleft()
        self._copies.begin(self._pages, [staging])
        self._image.check(first, *self._copies.end(1))
        self._read_next(staging)

    def close(self) -> None:
        """Gives the pinned memory back, when nothing reads or copies any more."""
        self._readers.shutdown(cancel_futures=True)
        self._copies.settle()
        for pinned in self._pinned:
            pinned.close()

    def _read_next(self, staging: torch.Tensor) -> None:
        index = self._next
        if index < self._image.layout.num_pages:
            self._next += 1
            read = self._readers.submit(self._image.fetch_page, index, staging.numpy().data)
            self._reading.append((index, staging, read))


class _Pinned:
    """A page of host memory that a disk writes to directly and a GPU reads from directly.

    It is memory of the process that is registered, and not torch's, which direct reads might refuse.
    """

    def __init__(self, page_bytes: int) -> None:
        self.page = torch.frombuffer(mmap(-1, page_bytes), dtype=torch.uint8)
        cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        torch.cuda.check_error(cudart.cudaHostRegister(self.page.data_ptr(), page_bytes, 0))

    def close(self) -> None:
        """Ends its registration; nothing may read it any more."""
        cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        torch.cuda.check_error(cudart.cudaHostUnregister(self.page.data_ptr()))


def _check_host(image: Image, index: int, found: int) -> None:
    if not image.is_page(index, found):
        raise HostImageCorrupt(f"page {index} of {image.path.name} has another sum in the host tier")


@cache
def _streams(page_bytes: int, device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """One to copy and one to sum up, for all loads.

    torch has 32 streams and hands them out in turn: with new ones for each load, some load would get the engine's,
    wait for its steps, and be recorded rather than done while a graph is captured there.
    """
    streams = torch.cuda.Stream(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(streams[1]):  # what summing up needs is taken now, not later
        prepare_sums(page_bytes, MOST_AT_ONCE, device)
    streams[1].synchronize()
    return streams
