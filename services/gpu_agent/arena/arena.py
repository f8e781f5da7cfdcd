"""The arena: an agent's pages and their owners. The address ranges over them are in memory.py and weight_range.py."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from services.gpu_agent.arena.memory import Memory
from services.gpu_agent.arena.pages import ArenaClosed, OutOfPages, Pages
from services.gpu_agent.arena.turns import Turns
from services.gpu_agent.arena.weight_range import WeightRange


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
    def turns(self) -> Turns:
        """What is taken to launch a step, so that it does not wait for the driver again and again (see Memory)."""
        return self._memory.turns

    @property
    def free_pages(self) -> int:
        """Pages that nobody owns."""
        with self._lock:
            return self._pages.free

    def usage(self) -> ArenaUsage:
        """Who has how many pages, at one moment."""
        with self._lock:
            kv, weights = self._pages.kv(), self._pages.weights()
            total, free, filling = self._pages.total, self._pages.free, sum(self._pages.filling().values())
            lent = self._lendable()
            promised = min(free, self._promised_free())
        in_weights = sum(weights.values()) + filling
        return ArenaUsage(total, free, sum(kv.values()), in_weights, lent, promised, kv)

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
        taken: list[int] = []
        while True:
            with self._lock:
                self._check_open()
                # Anew each time: lent pages may have been freed meanwhile, or be needed by those who had them.
                free, lacking = self._pages.free, n - len(taken)
                if lacking > free and lacking > free + self._lendable():
                    self._pages.give_kv(owner, taken)
                    raise OutOfPages(f"the KV cache of {owner}", n, self._pages.free, self._pages.total)
                taken += self._pages.take_kv(owner, min(lacking, free))
            if len(taken) == n:
                return taken
            lender = self._least_valuable()
            if lender is not None and (back := lender.take_back(n - len(taken), owner)):
                taken += back
                self.on_taken_back(lender.name, len(back), owner)

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
            return self._pages.total - self._withheld() - kept

    def kv_share(self, owner: str) -> int:
        """Pages that an instance would have if all of them shared equally what weights in use leave."""
        with self._lock:
            return max(0, self._pages.total - self._withheld()) // len({owner, *self._promised})

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

    # What weight ranges need (see weight_range.Accounts)

    def take_weight_pages(self, weights: WeightRange, n: int) -> list[int]:
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

    def settle_weight_pages(self, name: str, n: int) -> None:
        """See Accounts."""
        with self._lock:
            self._pages.end_filling(name, n)

    def drop_weight_pages(self, name: str) -> None:
        """See Accounts."""
        with self._lock:
            self._pages.drop_filling(name)

    def give_weight_pages(self, name: str, keep: int) -> None:
        """See Accounts."""
        with self._lock:
            self._pages.shrink_weights(name, keep)

    def lend_weight_pages(self, name: str, n: int, owner: str) -> list[int]:
        """See Accounts."""
        with self._lock:
            return self._pages.lend_weights(name, n, owner)

    def forget_weights(self, name: str) -> None:
        """See Accounts."""
        with self._lock:
            self._pages.remove_weights(name)
            del self._ranges[name]

    def _check_open(self) -> None:
        if self._closed:
            raise ArenaClosed("the arena is closed")

    def _promised_free(self) -> int:
        held = self._pages.kv()
        return sum(max(0, n - held.get(owner, 0)) for owner, n in self._promised.items())

    def _lendable(self) -> int:
        weights = self._pages.weights()
        return sum(weights[name] for name, offered in self._ranges.items() if offered.is_lendable)

    def _withheld(self) -> int:
        """Pages of weights that KV cannot have: what is written to be lent can be had when it holds its data."""
        weights, filling = self._pages.weights(), self._pages.filling()
        return sum(weights[name] + filling.get(name, 0) for name, r in self._ranges.items() if not r.is_lendable)

    def _least_valuable(self) -> WeightRange | None:
        with self._lock:
            weights = self._pages.weights()
            lenders = [offered for name, offered in self._ranges.items() if offered.is_lendable and weights[name]]
            return min(lenders, key=lambda offered: offered.value, default=None)
