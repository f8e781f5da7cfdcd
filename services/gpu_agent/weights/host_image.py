"""An image in the node's memory, as one agent reads it."""

from __future__ import annotations

import fcntl
import mmap
import os
import threading
from collections.abc import Callable

import torch

from services.gpu_agent.weights.errors import ImageCorrupt

Pin = Callable[[int, int], Callable[[], None]]
"""Registers (address, bytes) with the device; what it returns takes that back."""


class HostImageCorrupt(ImageCorrupt):
    """The copy in memory is not what was written there; the one on the disk may be right."""


class HostImage:
    """An image in memory. Safe to read from several threads, within HostTier.reading."""

    def __init__(self, fd: int, page_bytes: int, pin: Pin | None) -> None:
        """`fd` is the file's, and this object's from now on."""
        self._fd = fd
        self._bytes = torch.frombuffer(mmap.mmap(fd, os.fstat(fd).st_size), dtype=torch.uint8).view(-1, page_bytes)
        self._pin = pin
        self._pinned: dict[int, Callable[[], None]] = {}
        self._lock = threading.Lock()
        self._readers = 0

    @property
    def gone(self) -> bool:
        """Whether an agent has removed it from the tier."""
        return os.fstat(self._fd).st_nlink == 0

    @property
    def held(self) -> bool:
        """Whether somebody reads it."""
        return self._readers > 0

    @property
    def registered(self) -> bool:
        """Whether all pages are registered with the device, or there is none to register them with."""
        return self._pin is None or len(self._pinned) == len(self._bytes)

    def page(self, index: int) -> torch.Tensor:
        """A page: uint8, page_bytes. Registered with the device, where there is one, when it is first asked for."""
        page = self._bytes[index]
        if self._pin is not None:
            with self._lock:
                if index not in self._pinned:
                    self._pinned[index] = self._pin(page.data_ptr(), page.numel())
        return page

    def hold(self) -> bool:
        """From now on no agent removes it; False where one has."""
        with self._lock:
            fcntl.flock(self._fd, fcntl.LOCK_SH)
            self._readers += 1
        if self.gone:
            self.let_go()
        return not self.gone

    def let_go(self) -> None:
        """Ends what `hold` began. It stays mapped, and registered, for the next time."""
        with self._lock:
            self._readers -= 1
            if not self._readers:
                fcntl.flock(self._fd, fcntl.LOCK_UN)

    def close(self) -> None:
        """Ends its use; no copy from it may be under way."""
        with self._lock:
            while self._pinned:
                self._pinned.popitem()[1]()
        del self._bytes  # unmapped when no tensor lies over it any more
        os.close(self._fd)
