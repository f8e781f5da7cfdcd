"""What the arena needs of the memory below it: equal physical pages, and address ranges to map any of them into."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch


class AddressRange(Protocol):
    """Reserved addresses of whole pages. They stay the same while the physical pages under them come and go."""

    @property
    def num_pages(self) -> int:
        """Pages that the range can hold."""
        ...

    def tensor(self, dtype: torch.dtype, shape: Sequence[int], offset_bytes: int) -> torch.Tensor:
        """A contiguous tensor over the range's addresses, to be made once.

        It shows whatever pages are mapped at the moment of each access; touching it where none is mapped is a fault.
        Raises ValueError where it would be unaligned or leave the range.
        """
        ...


class Memory(Protocol):
    """All the memory of one agent, taken once and cut into pages. Threads may use it at once, on distinct ranges."""

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        ...

    @property
    def num_pages(self) -> int:
        """Physical pages in all."""
        ...

    @property
    def kv_range(self) -> torch.Tensor:
        """uint8, 1-D, num_pages * page_bytes long: page p lies at [p * page_bytes, (p + 1) * page_bytes), always."""
        ...

    def reserve(self, nbytes: int) -> AddressRange:
        """Reserves addresses, rounded up to whole pages. Nothing is mapped there yet."""
        ...

    def map(self, target: AddressRange, first_index: int, pages: Sequence[int]) -> None:
        """Maps physical `pages` to the range's pages first_index, first_index + 1, ..."""
        ...

    def unmap(self, target: AddressRange, first_index: int, count: int) -> None:
        """Takes the physical pages away from `count` pages of the range, from first_index on."""
        ...

    def release(self, target: AddressRange) -> None:
        """Unmaps what is mapped and gives the addresses back once no tensor lies over them any more."""
        ...

    def close(self) -> None:
        """Releases every range and the physical pages. Closing twice is closing once."""
        ...
