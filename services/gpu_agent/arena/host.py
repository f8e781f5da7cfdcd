"""Host memory as an arena's pages: one memfd, mapped whole as the KV range and page by page into weight ranges."""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch

from services.gpu_agent.arena.memory import AddressRange, Memory

_PROT_NONE = 0
_MAP_FIXED = 0x10  # the same on every Linux architecture that PyTorch supports; Python's mmap module lacks it
_MAP_FAILED = ctypes.c_void_p(-1).value

# CDLL calls let go of the interpreter lock, so mapping does not stop the engine's thread.
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


def _mmap(address: int | None, nbytes: int, protection: int, flags: int, fd: int, offset: int) -> int:
    mapped: int | None = _libc.mmap(address, nbytes, protection, flags, fd, offset)
    if mapped is None or mapped == _MAP_FAILED:
        number = ctypes.get_errno()
        raise OSError(number, f"mmap of {nbytes} bytes failed: {os.strerror(number)}")
    return mapped


class HostMemory(Memory):
    """Memory (see memory.py) on a memfd. Computing on it is computing on the CPU."""

    def __init__(self, page_bytes: int, num_pages: int) -> None:
        """Takes num_pages * page_bytes bytes of host memory at once.

        page_bytes must be a multiple of the system's page size. Raises ValueError where it is not, and MemoryError
        where the machine has not that much memory available.
        """
        if page_bytes <= 0 or page_bytes % mmap.PAGESIZE:
            raise ValueError(f"page_bytes must be a positive multiple of {mmap.PAGESIZE}, not {page_bytes}")
        super().__init__(page_bytes, num_pages, torch.device("cpu"))
        nbytes = page_bytes * num_pages
        available = _available_bytes()
        if nbytes > available:
            raise MemoryError(
                f"an arena of {nbytes / 2**20:.0f} MiB was asked for, but the machine has "
                f"{available / 2**20:.0f} MiB available; configure a smaller arena"
            )
        self._fd = os.memfd_create("warmserve-arena", os.MFD_CLOEXEC)
        try:
            # Taken now rather than on first touch, where a shortage would kill the process.
            os.posix_fallocate(self._fd, 0, nbytes)
            shared = mmap.MAP_SHARED | mmap.MAP_POPULATE
            address = _mmap(None, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, shared, self._fd, 0)
        except OSError:
            os.close(self._fd)
            raise
        self._kv = _bytes_at(address, nbytes)

    def _reserve(self, nbytes: int) -> AddressRange:
        address = _mmap(None, nbytes, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        return AddressRange(_bytes_at(address, nbytes), self.page_bytes)

    def _map(self, address: int, pages: Sequence[int]) -> None:
        # Populating maps a page's 4 KiB parts in one go instead of one fault each.
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE | _MAP_FIXED
        try:
            for place, page in enumerate(pages):
                _mmap(
                    address + place * self.page_bytes,
                    self.page_bytes,
                    mmap.PROT_READ | mmap.PROT_WRITE,
                    flags,
                    self._fd,
                    page * self.page_bytes,
                )
        except BaseException:
            self._unmap(address, len(pages) * self.page_bytes)
            raise

    def _unmap(self, address: int, nbytes: int) -> None:
        # In their place come addresses that nothing may touch, so that they stay reserved.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED
        _mmap(address, nbytes, _PROT_NONE, flags, -1, 0)

    def _close(self) -> None:
        os.close(self._fd)


def _bytes_at(address: int, nbytes: int) -> torch.Tensor:
    """A uint8 tensor over addresses that are unmapped when no tensor over them is left."""
    buffer = (ctypes.c_char * nbytes).from_address(address)
    # Not at interpreter exit: threads may still be using tensors then, and the process takes its mappings along.
    weakref.finalize(buffer, _libc.munmap, address, nbytes).atexit = False
    return torch.frombuffer(buffer, dtype=torch.uint8)


def _available_bytes() -> int:
    """Memory that can be taken without swapping, as the kernel estimates it."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/meminfo has no line MemAvailable")
