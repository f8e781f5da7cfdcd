"""What the arena needs of the memory below it: equal physical pages, and address ranges to map any of them into."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch

from services.gpu_agent.arena.turns import Turns


class AddressRange:
    """Reserved addresses of whole pages. They stay the same while the physical pages under them come and go.

    The addresses go when neither this object nor any tensor over them is left: a stale tensor can therefore never show
    memory that the process has since used for something else.
    """

    def __init__(self, base: torch.Tensor, page_bytes: int) -> None:
        """`base` is one uint8 tensor over all of the range, whose storage keeps the addresses reserved."""
        self.address = base.data_ptr()
        self.nbytes = base.numel()
        self.num_pages = self.nbytes // page_bytes
        self.mapped: set[int] = set()  # pages of the range that have a physical one; Memory's to change
        self._base = base

    def tensor(self, dtype: torch.dtype, shape: Sequence[int], offset_bytes: int) -> torch.Tensor:
        """A contiguous tensor over the range's addresses, to be made once.

        It shows whatever pages are mapped at the moment of each access; touching it where none is mapped is a fault.
        Raises ValueError where it would be unaligned or leave the range.
        """
        count = math.prod(shape)
        if count <= 0 or any(size < 0 for size in shape):
            raise ValueError(f"a tensor of shape {tuple(shape)} has no elements to place")
        if offset_bytes % dtype.itemsize:
            raise ValueError(f"offset {offset_bytes} is not a multiple of {dtype.itemsize}, the size of {dtype}")
        end = offset_bytes + count * dtype.itemsize
        if offset_bytes < 0 or end > self.nbytes:
            raise ValueError(
                f"{count} x {dtype} at offset {offset_bytes} leaves the range, which has {self.nbytes} bytes"
            )
        return self._base[offset_bytes:end].view(dtype).view(tuple(shape))


class Memory(ABC):
    """All the memory of one agent, taken once and cut into pages. Threads may use it at once, on distinct ranges.

    On a GPU, nothing may be computing with pages while they are unmapped: callers have waited for the kernels that use
    them. Mapping, and unmapping other pages, may go on beside running kernels.
    """

    def __init__(self, page_bytes: int, num_pages: int, device: torch.device) -> None:
        if num_pages <= 0:
            raise ValueError(f"the arena needs at least one page, not {num_pages}")
        self.page_bytes = page_bytes
        self.num_pages = num_pages
        self.device = device
        self.turns = Turns()
        """Who has it keeps the driver to himself: pages are mapped and unmapped with it, a piece at a time, and steps
        launched."""
        self._ranges: set[AddressRange] = set()
        self._kv: torch.Tensor | None = None  # set by the backend; None again once closed

    @property
    def kv_range(self) -> torch.Tensor:
        """uint8, 1-D, num_pages * page_bytes long: page p lies at [p * page_bytes, (p + 1) * page_bytes), always."""
        if self._kv is None:
            raise RuntimeError("the memory is closed")
        return self._kv

    def reserve(self, nbytes: int) -> AddressRange:
        """Reserves addresses, rounded up to whole pages. Nothing is mapped there yet."""
        self._check_open()
        if nbytes <= 0:
            raise ValueError(f"a range needs at least one byte, not {nbytes}")
        reserved = self._reserve(-(-nbytes // self.page_bytes) * self.page_bytes)
        self._ranges.add(reserved)
        return reserved

    def map(self, target: AddressRange, first_index: int, pages: Sequence[int]) -> None:
        """Maps physical `pages` to the range's pages first_index, first_index + 1, ... Where it fails, none is mapped.

        Raises ValueError, and MemoryError where the system has no room to note the mapping.
        """
        self._check_part(target, first_index, len(pages))
        if any(not 0 <= page < self.num_pages for page in pages):
            raise ValueError(f"pages {list(pages)} are not all within 0..{self.num_pages - 1}")
        indices = range(first_index, first_index + len(pages))
        if taken := target.mapped.intersection(indices):
            raise ValueError(f"pages {sorted(taken)} of the range are mapped already")
        if pages:
            self._map(target.address + first_index * self.page_bytes, pages)
            target.mapped.update(indices)

    def unmap(self, target: AddressRange, first_index: int, count: int) -> None:
        """Takes the physical pages away from `count` pages of the range, from first_index on; some may have none."""
        self._check_part(target, first_index, count)
        going = target.mapped.intersection(range(first_index, first_index + count))
        for index, length in runs(going):
            self._unmap(target.address + index * self.page_bytes, length * self.page_bytes)
        target.mapped -= going

    def release(self, target: AddressRange) -> None:
        """Unmaps what is mapped and gives the addresses back once no tensor lies over them any more."""
        self.unmap(target, 0, target.num_pages)
        self._ranges.discard(target)

    def close(self) -> None:
        """Releases every range and the physical pages. Closing twice is closing once.

        What kv_range gave out stays usable as long as it is kept.
        """
        if self._kv is None:
            return
        for target in list(self._ranges):
            self.release(target)
        self._kv = None
        self._close()

    @abstractmethod
    def _reserve(self, nbytes: int) -> AddressRange:
        """Reserves addresses of whole pages, with nothing mapped there."""

    @abstractmethod
    def _map(self, address: int, pages: Sequence[int]) -> None:
        """Maps physical pages, at least one, one behind the other; all or none."""

    @abstractmethod
    def _unmap(self, address: int, nbytes: int) -> None:
        """Takes away the mappings of whole pages, all of them mapped; the addresses stay reserved."""

    @abstractmethod
    def _close(self) -> None:
        """Gives the physical pages back."""

    def _check_open(self) -> None:
        if self._kv is None:
            raise RuntimeError("the memory is closed")

    def _check_part(self, target: AddressRange, first_index: int, count: int) -> None:
        self._check_open()
        # Mapping over addresses that are not ours would destroy whatever the process has there.
        if target not in self._ranges:
            raise ValueError("the range is not, or no longer, one of this memory")
        if first_index < 0 or count < 0 or first_index + count > target.num_pages:
            raise ValueError(f"pages {first_index}..{first_index + count - 1} leave the range of {target.num_pages}")


def runs(indices: set[int]) -> Iterator[tuple[int, int]]:
    """The indices as (first, length) of the longest runs without a gap, in order."""
    first = length = 0
    for index in sorted(indices):
        if length and index == first + length:
            length += 1
            continue
        if length:
            yield first, length
        first, length = index, 1
    if length:
        yield first, length
