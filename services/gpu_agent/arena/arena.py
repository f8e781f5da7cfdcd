"""The arena: an agent's pages, their owners, and the address ranges over them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from services.gpu_agent.arena.memory import Memory
from services.gpu_agent.arena.pages import OutOfPages, Pages


class ArenaClosed(RuntimeError):
    """The arena, or the weight range, has been closed and cannot be used any more."""


@dataclass(frozen=True)
class ArenaUsage:
    """What the pages are used for, in pages; free + kv + weights = total."""

    total: int
    free: int
    kv: int
    weights: int
    """Those that are being written included."""
    lent: int
    """Of those of weights, which KV may take back at any time."""
    promised: int
    """Of the free ones, those that prewarming leaves to instances."""
    kv_by_instance: dict[str, int]
    weights_by_model: dict[str, int]
    """Those that hold their data."""


class Arena:
    """Pages of one agent's memory. Thread-safe: the engine's and the loader's threads both call it.

    Only the accounting is done under the arena's lock. Mapping, which takes longer, is done under the lock of the
    weight range concerned, so that the engine waits for it only where it takes pages back from that very range.

    KV that finds no free page takes pages back from the weights that were offered for that (WeightRange.offer), the
    least valuable first, from their end.
    """

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._pages = Pages(memory.num_pages)
        self._lock = threading.Lock()
        self._ranges: dict[str, WeightRange] = {}
        self._kept: dict[str, int] = {}  # KV pages that each instance never gives back as long as it lives
        self._promised: dict[str, int] = {}  # KV pages that prewarming leaves to each instance, those it has included
        self._closed = False
        self.on_taken_back: Callable[[str, int, str], None] = lambda model, pages, owner: None
        """Called with a model, the pages it has lost, and who took them: an instance for KV, or a model that wakes."""

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

    @property
    def free_for_prewarming(self) -> int:
        """Pages that nobody owns and no instance was promised."""
        with self._lock:
            return max(0, self._pages.free - self._promised_free())

    def usage(self) -> ArenaUsage:
        """Who has how many pages, at one moment."""
        with self._lock:
            kv, weights = self._pages.kv(), self._pages.weights()
            total, free, filling = self._pages.total, self._pages.free, self._pages.filling
            lent = self._lendable()
            promised = min(free, self._promised_free())
        in_weights = sum(weights.values()) + filling
        return ArenaUsage(total, free, sum(kv.values()), in_weights, lent, promised, kv, weights)

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
        """Takes n pages for an instance's KV blocks and returns their numbers: free ones, else some that were lent.

        OutOfPages, with nothing kept, where there are not as many.
        """
        with self._lock:
            self._check_open()
            free = self._pages.free
            if n > free and n > free + self._lendable():
                raise OutOfPages(f"the KV cache of {owner}", n, free, self._pages.total)
            taken = self._pages.take_kv(owner, min(n, free))
        while len(taken) < n:
            lender = self._least_valuable()
            back = lender.take_back(n - len(taken), owner) if lender is not None else []
            if lender is None:  # what was lent a moment ago is needed now by those who had it
                self.give_kv(owner, taken)
                with self._lock:
                    raise OutOfPages(f"the KV cache of {owner}", n, self._pages.free, self._pages.total)
            taken += back
            if back:
                self.on_taken_back(lender.name, len(back), owner)
        return taken

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

    def promise_kv(self, owner: str, n: int) -> None:
        """Has prewarming leave free what an instance lacks of n KV pages; 0 promises nothing any more."""
        with self._lock:
            if n:
                self._promised[owner] = n
            else:
                self._promised.pop(owner, None)

    def kv_within_reach(self, owner: str) -> int:
        """Pages that an instance would have if all others gave back what they may, weights that were lent included."""
        with self._lock:
            kept = sum(n for other, n in self._kept.items() if other != owner)
            held = sum(self._pages.weights().values()) + self._pages.filling - self._lendable()
            return self._pages.total - held - kept

    def kv_share(self, owner: str) -> int:
        """Pages that an instance would have if all of them shared equally what weights in use leave."""
        with self._lock:
            held = sum(self._pages.weights().values()) + self._pages.filling - self._lendable()
            return max(0, self._pages.total - held) // len({owner, *self._promised})

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

    def _promised_free(self) -> int:
        held = self._pages.kv()
        return sum(max(0, n - held.get(owner, 0)) for owner, n in self._promised.items())

    def _lendable(self) -> int:
        weights = self._pages.weights()
        return sum(weights[name] for name, offered in self._ranges.items() if offered.is_lendable)

    def _least_valuable(self) -> WeightRange | None:
        with self._lock:
            weights = self._pages.weights()
            lenders = [offered for name, offered in self._ranges.items() if offered.is_lendable and weights[name]]
            return min(lenders, key=lambda offered: offered.value, default=None)

    def _take_weight_pages(self, weights: WeightRange, n: int) -> list[int]:
        """Free pages, for prewarming only what was promised to nobody; a wake takes back what was lent, as KV does."""
        while True:
            with self._lock:
                self._check_open()
                waking, free = not weights.is_lendable, self._pages.free
                if not waking:
                    free = max(0, free - self._promised_free())
                if n <= free:
                    return self._pages.begin_filling(weights.name, n)
                if not waking or n > free + self._lendable():
                    raise OutOfPages(f"the weights of {weights.name}", n, free, self._pages.total)
            lender = self._least_valuable()
            if lender is not None and (given := lender.give_up(n - free)):
                self.on_taken_back(lender.name, given, weights.name)

    def _settle_weight_page(self, name: str) -> None:
        with self._lock:
            self._pages.end_filling(name)

    def _drop_weight_pages(self, name: str) -> None:
        with self._lock:
            self._pages.drop_filling(name)

    def _give_weight_pages(self, name: str, keep: int) -> None:
        with self._lock:
            self._pages.shrink_weights(name, keep)

    def _lend_weight_pages(self, name: str, n: int, owner: str) -> list[int]:
        with self._lock:
            return self._pages.lend_weights(name, n, owner)

    def _forget_weights(self, name: str) -> None:
        with self._lock:
            self._pages.remove_weights(name)
            del self._ranges[name]


Value = tuple[float, float]
"""What resident weights are worth: the score of the placer's last order, then when they were last used."""


class WeightRange:
    """The addresses of one model's weights, of which the first `resident_pages` pages have memory behind them.

    Growing and shrinking happen at the end of that prefix. Nobody may be computing with the pages that are taken away:
    on a GPU, whoever takes them has seen to it that the kernels that use them have ended; whoever offers them has too.
    """

    def __init__(self, arena: Arena, memory: Memory, name: str, nbytes: int) -> None:
        self.name = name
        self._arena = arena
        self._memory = memory
        self._addresses = memory.reserve(nbytes)
        self._resident = 0
        self._removed = False
        self._lock = threading.RLock()
        self._filling: Filling | None = None
        self._filled = threading.Condition(self._lock)
        self._value: Value | None = None  # None: not offered
        self._uses = 0

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
        """How many pages, counted from the first, are mapped; those that were filled hold their data."""
        return self._resident

    @property
    def complete(self) -> bool:
        """Whether all pages are resident."""
        return self._resident == self.num_pages

    # Lending

    def offer(self, value: Value) -> None:
        """From now on KV may take pages from the end, and prewarming leaves instances what they were promised."""
        with self._lock:
            self._value = value

    def withhold(self) -> int:
        """From now on nobody takes pages; returns how many are resident."""
        with self._lock:
            self._value = None
            return self._resident

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Within it nobody takes pages, offered or not."""
        with self._lock:
            self._uses += 1
        try:
            yield
        finally:
            with self._lock:
                self._uses -= 1

    @property
    def is_lendable(self) -> bool:
        """Whether KV may take pages now."""
        return self._value is not None and not self._uses

    @property
    def value(self) -> Value:
        """What was said when it was offered."""
        return self._value or (0.0, 0.0)

    def take_back(self, n: int, owner: str) -> list[int]:
        """Up to n of the last resident pages become KV of `owner`; none where they are not offered any more."""
        with self._lock:
            count = min(n, self._resident) if self.is_lendable and not self._removed else 0
            if not count:
                return []
            self._resident -= count
            # Unmapped before another owner has them.
            self._memory.unmap(self._addresses, self._resident, count)
            return self._arena._lend_weight_pages(self.name, count, owner)

    def give_up(self, n: int) -> int:
        """Frees up to n of the last resident pages, and returns how many: none where they are not offered any more."""
        with self._lock:
            count = min(n, self._resident) if self.is_lendable and not self._removed else 0
            if count:
                self._resident -= count
                # Unmapped before another owner has them.
                self._memory.unmap(self._addresses, self._resident, count)
                self._arena._give_weight_pages(self.name, self._resident)
            return count

    # Growing and shrinking

    def grow(self, n: int) -> None:
        """Maps n free pages behind the resident ones; their content is undefined. OutOfPages, with nothing done."""
        with self._lock, self.filling() as filling:
            filling.map(n)
            for _ in range(n):
                filling.done()

    @contextmanager
    def filling(self) -> Iterator[Filling]:
        """Maps and writes pages behind the resident ones, within the block, by one at a time; shrink waits for its end.

        When the block ends, nothing writes to the pages any more, on a GPU neither; those not done are given back.
        """
        with self._lock:
            self._check_present()
            self._filled.wait_for(lambda: self._filling is None)
            self._check_present()
            filling = self._filling = Filling(self, self._resident)
        try:
            yield filling
        finally:
            with self._lock:
                self._filling = None
                filling._drop()
                self._filled.notify_all()

    def append(self, fill: Callable[[int, torch.Tensor], None]) -> None:
        """Maps one free page and has `fill(index, page)` write it (uint8, page_bytes); then it is resident.

        When fill returns or raises, nothing writes to the page any more. Where fill raises, the page is given back and
        the exception goes on to the caller. OutOfPages, with nothing done, where none is free.
        """
        with self.filling() as filling:
            (page,) = filling.map(1)
            fill(filling.first, page)
            filling.done()

    def shrink(self, keep: int) -> None:
        """Unmaps and frees pages from the end until `keep` are resident; nothing where no more are resident."""
        if keep < 0:
            raise ValueError(f"{self.name} cannot keep {keep} pages")
        with self._lock:
            self._check_present()
            self._filled.wait_for(lambda: self._filling is None)
            self._check_present()
            count = self._resident - keep
            if count > 0:
                self._resident = keep
                # Unmapped before any page is free for another owner.
                self._memory.unmap(self._addresses, keep, count)
                self._arena._give_weight_pages(self.name, keep)

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
            self._filled.wait_for(lambda: self._filling is None)
            if self._removed:
                return
            self._removed = True
            self._resident = 0
            # Unmapped before any page is free for another owner.
            self._memory.release(self._addresses)
            self._arena._forget_weights(self.name)

    def _page(self, index: int) -> torch.Tensor:
        return self._addresses.tensor(torch.uint8, (self.page_bytes,), index * self.page_bytes)

    def _check_present(self) -> None:
        if self._removed:
            raise ArenaClosed(f"the weight range of {self.name} was removed")


class Filling:
    """Pages of a weight range that are being written (see WeightRange.filling). Used by one thread.

    Meanwhile KV may take resident pages before them, if they are offered. Then the pages here are of no use any more.
    """

    def __init__(self, weights: WeightRange, first: int) -> None:
        self.first = first
        """Index of the first page."""
        self._weights = weights
        self._claimed: list[int] = []  # pages that are ours, but not mapped yet
        self._mapped = first  # index behind the last page mapped
        self._done = first  # index behind the last page that is resident

    @property
    def overtaken(self) -> bool:
        """Whether pages before these were taken."""
        return self._weights._resident != self._done

    def claim(self) -> None:
        """Takes all pages that the model lacks, so that nobody else does. OutOfPages, with nothing done."""
        weights = self._weights
        with weights._lock:
            weights._check_present()
            missing = weights.num_pages - self._mapped - len(self._claimed)
            self._claimed += weights._arena._take_weight_pages(weights, missing)

    def map(self, n: int) -> list[torch.Tensor]:
        """Maps n more free pages, to be written: uint8, page_bytes each. OutOfPages, with nothing done."""
        weights = self._weights
        with weights._lock:
            weights._check_present()
            if n < 0 or self._mapped + n > weights.num_pages:
                raise ValueError(
                    f"{weights.name} has {self._mapped} of {weights.num_pages} pages and cannot grow by {n}"
                )
            if n > len(self._claimed):
                self._claimed += weights._arena._take_weight_pages(weights, n - len(self._claimed))
            weights._memory.map(weights._addresses, self._mapped, self._claimed[:n])
            del self._claimed[:n]
            self._mapped += n
            return [weights._page(index) for index in range(self._mapped - n, self._mapped)]

    def done(self) -> bool:
        """The next page holds its data and is resident; False where pages before it were taken, so that it is not."""
        weights = self._weights
        with weights._lock:
            if self.overtaken:
                return False
            weights._arena._settle_weight_page(weights.name)
            self._done += 1
            weights._resident = self._done
            return True

    def _drop(self) -> None:
        """Gives back what is not done."""
        weights = self._weights
        weights._memory.unmap(weights._addresses, self._done, self._mapped - self._done)
        weights._arena._drop_weight_pages(weights.name)
