"""From an image's file to pages on a GPU: read into pinned memory, ahead of a copy on a stream of its own."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache

import torch

from services.gpu_agent.weights.image import Image

Fill = Callable[[int, torch.Tensor], None]  # index of the page, and the page: uint8, page_bytes long

# Pinned pages: one is copied while the others are read. Reading and summing a page takes a core longer than copying it.
_STAGING_PAGES = 4


@contextmanager
def page_source(image: Image, first: int, device: torch.device) -> Iterator[Fill]:
    """What fills pages `first`, `first` + 1, ... of a weight range on `device`, for WeightRange.append.

    It must be called for these pages in this order, in the thread that entered. It returns when the page holds its
    data, and raises what Image.read_page does.
    """
    if device.type == "cpu":
        yield image.read_page
        return
    with ThreadPoolExecutor(_STAGING_PAGES - 1, "read-image") as readers:
        staged = _StagedPages(image, first, device, readers)
        try:
            yield staged.fill
        finally:
            staged.abandon()


class _StagedPages:
    """Reads ahead, so that reading page i + 1 and more goes on while page i is copied."""

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

    def fill(self, index: int, page: torch.Tensor) -> None:
        expected, staging, read = self._reading[0]
        if index != expected:
            raise ValueError(f"page {index} was asked for, but page {expected} is next")
        read.result()
        self._reading.popleft()
        with torch.cuda.stream(self._stream):
            page.copy_(staging, non_blocking=True)
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


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all loads.

    torch has 32 streams and hands them out in turn: with a new one for each load, some load would get the engine's,
    wait for its steps, and be recorded rather than done while a graph is captured there.
    """
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
