"""Host memory as an arena's pages: one memfd, mapped whole as the KV range and page by page into weight ranges."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch

from services.gpu_agent.arena.memory import AddressRange

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


class HostRange:
    """Addresses in this process. They are unmapped when neither this object nor any tensor over them is left.

    Tensors hold the ctypes buffer, and the buffer's end is what unmaps: a stale tensor can therefore never show memory
    that the process has since used for something else.
    """

    def __init__(self, address: int, nbytes: int, page_bytes: int) -> None:
        self.address = address
        self.nbytes = nbytes
        self.num_pages = nbytes // page_bytes
        self._buffer = (ctypes.c_char * nbytes).from_address(address)
        # Not at interpreter exit: threads may still be using tensors then, and the process takes its mappings along.
        weakref.finalize(self._buffer, _libc.munmap, address, nbytes).atexit = False

    def tensor(self, dtype: torch.dtype, shape: Sequence[int], offset_bytes: int) -> torch.Tensor:
        count = math.prod(shape)
        if count <= 0 or any(size < 0 for size in shape):
            raise ValueError(f"a tensor of shape {tuple(shape)} has no elements to place")
        if offset_bytes % dtype.itemsize:
            raise ValueError(f"offset {offset_bytes} is not a multiple of {dtype.itemsize}, the size of {dtype}")
        if offset_bytes < 0 or offset_bytes + count * dtype.itemsize > self.nbytes:
            raise ValueError(
                f"{count} x {dtype} at offset {offset_bytes} leaves the range, which has {self.nbytes} bytes"
            )
        return torch.frombuffer(self._buffer, dtype=dtype, count=count, offset=offset_bytes).view(tuple(shape))


class HostMemory:
    """Memory (see memory.py) on a memfd. Computing on it is computing on the CPU."""

    def __init__(self, page_bytes: int, num_pages: int) -> None:
        """Takes num_pages * page_bytes bytes of host memory at once.

        page_bytes must be a multiple of the system's page size. Raises ValueError where it is not, and MemoryError
        where the machine has not that much memory available.
        """
        if page_bytes <= 0 or page_bytes % mmap.PAGESIZE:
            raise ValueError(f"page_bytes must be a positive multiple of {mmap.PAGESIZE}, not {page_bytes}")
        if num_pages <= 0:
            raise ValueError(f"the arena needs at least one page, not {num_pages}")
        self.page_bytes = page_bytes
        self.num_pages = num_pages
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
        self._kv: torch.Tensor | None = HostRange(address, nbytes, page_bytes).tensor(torch.uint8, (nbytes,), 0)
        self._ranges: set[HostRange] = set()

    @property
    def kv_range(self) -> torch.Tensor:
        if self._kv is None:
            raise RuntimeError("the memory is closed")
        return self._kv

    def reserve(self, nbytes: int) -> HostRange:
        self._check_open()
        if nbytes <= 0:
            raise ValueError(f"a range needs at least one byte, not {nbytes}")
        rounded = -(-nbytes // self.page_bytes) * self.page_bytes
        address = _mmap(None, rounded, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        reserved = HostRange(address, rounded, self.page_bytes)
        self._ranges.add(reserved)
        return reserved

    def map(self, target: AddressRange, first_index: int, pages: Sequence[int]) -> None:
        ours = self._part(target, first_index, len(pages))
        if any(not 0 <= page < self.num_pages for page in pages):
            raise ValueError(f"pages {list(pages)} are not all within 0..{self.num_pages - 1}")
        for index, page in enumerate(pages, first_index):
            _mmap(
                ours.address + index * self.page_bytes,
                self.page_bytes,
                mmap.PROT_READ | mmap.PROT_WRITE,
                # Populating maps the page's 4 KiB parts in one go instead of one fault each.
                mmap.MAP_SHARED | mmap.MAP_POPULATE | _MAP_FIXED,
                self._fd,
                page * self.page_bytes,
            )

    def unmap(self, target: AddressRange, first_index: int, count: int) -> None:
        ours = self._part(target, first_index, count)
        if count:
            self._cover(ours, first_index * self.page_bytes, count * self.page_bytes)

    def release(self, target: AddressRange) -> None:
        ours = self._part(target, 0, target.num_pages)
        self._cover(ours, 0, ours.nbytes)
        self._ranges.discard(ours)

    def close(self) -> None:
        if self._kv is None:
            return
        for target in list(self._ranges):
            self.release(target)
        self._kv = None
        os.close(self._fd)

    @staticmethod
    def _cover(target: HostRange, offset: int, nbytes: int) -> None:
        """Replaces a part of the range by addresses that nothing may touch; they stay reserved."""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED
        _mmap(target.address + offset, nbytes, _PROT_NONE, flags, -1, 0)

    def _check_open(self) -> None:
        if self._kv is None:
            raise RuntimeError("the memory is closed")

    def _part(self, target: AddressRange, first_index: int, count: int) -> HostRange:
        self._check_open()
        # Mapping over addresses that are not ours would destroy whatever the process has there.
        if not isinstance(target, HostRange) or target not in self._ranges:
            raise ValueError("the range is not, or no longer, one of this memory")
        if first_index < 0 or count < 0 or first_index + count > target.num_pages:
            raise ValueError(f"pages {first_index}..{first_index + count - 1} leave the range of {target.num_pages}")
        return target


def _available_bytes() -> int:
    """Memory that can be taken without swapping, as the kernel estimates it."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/meminfo has no line MemAvailable")
