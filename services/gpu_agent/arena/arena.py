"""The arena: an agent's pages, their owners, and the address ranges over them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from services.gpu_agent.arena.memory import Memory
from services.gpu_agent.arena.pages import Pages


class ArenaClosed(RuntimeError):
    """The arena, or the weight range, has been closed and cannot be used any more."""


@dataclass(frozen=True)
class ArenaUsage:
    """What the pages are used for, in pages; free + kv + weights = total."""

    total: int
    free: int
    kv: int
    weights: int
    kv_by_instance: dict[str, int]
    weights_by_model: dict[str, int]


class Arena:
    """Pages of one agent's memory. Thread-safe: the engine's and the loader's threads both call it.

    Only the accounting is done under the arena's lock. Mapping, which takes longer, is done under the lock of the
    weight range concerned, so that the engine never waits for it.
    """

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._pages = Pages(memory.num_pages)
        self._lock = threading.Lock()
        self._ranges: dict[str, WeightRange] = {}
        self._kept: dict[str, int] = {}  # KV pages that each instance never gives back as long as it lives
        self._closed = False

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        return self._memory.page_bytes

    @property
    def num_pages(self) -> int:
        """Pages in all."""
        return self._memory.num_pages

    @property
    def device(self) -> torch.device:
        """Where the pages are, and with them every tensor over them."""
        return self._memory.device

    @property
    def free_pages(self) -> int:
        """Pages that nobody owns."""
        with self._lock:
            return self._pages.free

    def usage(self) -> ArenaUsage:
        """Who has how many pages, at one moment."""
        with self._lock:
            kv, weights = self._pages.kv(), self._pages.weights()
            total, free = self._pages.total, self._pages.free
        return ArenaUsage(total, free, sum(kv.values()), sum(weights.values()), kv, weights)

    def add_weights(self, name: str, nbytes: int) -> WeightRange:
        """Reserves a range for a model's weights; no page is resident. ValueError if the name has a range already."""
        with self._lock:
            self._check_open()
            if name in self._ranges:
                raise ValueError(f"{name} already has a weight range in this arena")
            added = WeightRange(self, self._memory, name, nbytes)
            self._pages.add_weights(name)
            self._ranges[name] = added
        return added

    def take_kv(self, owner: str, n: int) -> list[int]:
        """Takes n free pages for an instance's KV blocks and returns their numbers. OutOfPages, with nothing taken."""
        with self._lock:
            self._check_open()
            return self._pages.take_kv(owner, n)

    def give_kv(self, owner: str, pages: Sequence[int]) -> None:
        """Gives pages back. ValueError, with nothing given, where one of them is not the owner's."""
        with self._lock:
            self._check_open()
            self._pages.give_kv(owner, pages)

    def keep_kv(self, owner: str, n: int) -> None:
        """Tells the others that an instance keeps n of the KV pages it has, whether or not it needs them."""
        with self._lock:
            if n:
                self._kept[owner] = n
            else:
                self._kept.pop(owner, None)

    def kv_within_reach(self, owner: str) -> int:
        """Pages that an instance would have if all others gave back what they may, and no weights went."""
        with self._lock:
            kept = sum(n for other, n in self._kept.items() if other != owner)
            return self._pages.total - sum(self._pages.weights().values()) - kept

    def kv_view(self, dtype: torch.dtype) -> torch.Tensor:
        """All pages as one 1-D tensor: page p is at elements [p * n, (p + 1) * n), where n = page_bytes / itemsize.

        Use only pages that were taken. The view keeps the memory alive, so drop it with the instance.
        """
        self._check_open()
        return self._memory.kv_range.view(dtype)

    def check(self) -> None:
        """Raises AssertionError unless every page has exactly one owner and free = total - owned."""
        with self._lock:
            self._pages.check()

    def close(self) -> None:
        """Removes every weight range and gives the memory back. Closing twice is closing once."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            ranges = list(self._ranges.values())
        for weights in ranges:
            weights.remove()
        self._memory.close()

    def _check_open(self) -> None:
        if self._closed:
            raise ArenaClosed("the arena is closed")

    def _take_weight_pages(self, name: str, n: int) -> list[int]:
        with self._lock:
            self._check_open()
            return self._pages.grow_weights(name, n)

    def _give_weight_pages(self, name: str, keep: int) -> None:
        with self._lock:
            self._pages.shrink_weights(name, keep)

    def _forget_weights(self, name: str) -> None:
        with self._lock:
            self._pages.remove_weights(name)
            del self._ranges[name]


class WeightRange:
    """The addresses of one model's weights, of which the first `resident_pages` pages have memory behind them.

    Growing and shrinking happen at the end of that prefix. Nobody may be computing with the pages that are taken away:
    on a GPU, whoever takes them has seen to it that the kernels that use them have ended.
    """

    def __init__(self, arena: Arena, memory: Memory, name: str, nbytes: int) -> None:
        self.name = name
        self._arena = arena
        self._memory = memory
        self._addresses = memory.reserve(nbytes)
        self._resident = 0
        self._removed = False
        self._lock = threading.RLock()

    @property
    def num_pages(self) -> int:
        """Pages of the whole model."""
        return self._addresses.num_pages

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        return self._memory.page_bytes

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._memory.device

    @property
    def resident_pages(self) -> int:
        """How many pages, counted from the first, are mapped; those that `append` put there hold their data."""
        return self._resident

    def grow(self, n: int) -> None:
        """Maps n free pages behind the resident ones; their content is undefined. OutOfPages, with nothing done."""
        with self._lock:
            self._extend(n)
            self._resident += n

    def append(self, fill: Callable[[int, torch.Tensor], None]) -> None:
        """Maps one free page and has `fill(index, page)` write it (uint8, page_bytes); then it is resident.

        When fill returns or raises, nothing writes to the page any more, on a GPU neither. Where fill raises, the page
        is given back and the exception goes on to the caller. Meanwhile the page cannot be taken away: shrink waits.
        OutOfPages, with nothing done, where none is free.
        """
        with self._lock:
            index = self._resident
            self._extend(1)
            try:
                fill(index, self._page(index))
            except BaseException:
                self._cut(index, 1)
                raise
            self._resident = index + 1

    def shrink(self, keep: int) -> None:
        """Unmaps and frees pages from the end until `keep` are resident; nothing where no more are resident."""
        if keep < 0:
            raise ValueError(f"{self.name} cannot keep {keep} pages")
        with self._lock:
            self._check_present()
            count = self._resident - keep
            if count > 0:
                self._resident = keep
                self._cut(keep, count)

    def tensor(self, dtype: torch.dtype, shape: Sequence[int], offset: int) -> torch.Tensor:
        """A tensor over the range, made once: it shows the right data whenever its pages are resident.

        `offset` is in bytes. Touching it while one of its pages is not resident is a fault that ends the process.
        """
        with self._lock:
            self._check_present()
            return self._addresses.tensor(dtype, shape, offset)

    def page_view(self, index: int) -> torch.Tensor:
        """A resident page as uint8, page_bytes long. IndexError where it is not resident."""
        with self._lock:
            self._check_present()
            if not 0 <= index < self._resident:
                raise IndexError(f"page {index} of {self.name} is not resident; {self._resident} pages are")
            return self._page(index)

    def remove(self) -> None:
        """Gives all pages back and frees the range; its tensors must not be used any more. Twice is once."""
        with self._lock:
            if self._removed:
                return
            self._removed = True
            self._resident = 0
            # Unmapped before any page is free for another owner.
            self._memory.release(self._addresses)
            self._arena._forget_weights(self.name)

    def _extend(self, n: int) -> None:
        self._check_present()
        if n < 0 or self._resident + n > self.num_pages:
            raise ValueError(f"{self.name} has {self._resident} of {self.num_pages} pages and cannot grow by {n}")
        pages = self._arena._take_weight_pages(self.name, n)
        try:
            self._memory.map(self._addresses, self._resident, pages)
        except BaseException:
            self._cut(self._resident, n)
            raise

    def _cut(self, first: int, count: int) -> None:
        # Unmapped before any page is free for another owner.
        self._memory.unmap(self._addresses, first, count)
        self._arena._give_weight_pages(self.name, first)

    def _page(self, index: int) -> torch.Tensor:
        return self._addresses.tensor(torch.uint8, (self.page_bytes,), index * self.page_bytes)

    def _check_present(self) -> None:
        if self._removed:
            raise ArenaClosed(f"the weight range of {self.name} was removed")
