"""The addresses of a model's weights: which of its pages are resident, being written, or lent."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch

from services.gpu_agent.arena.memory import Memory
from services.gpu_agent.arena.pages import ArenaClosed

Value = tuple[float, float]
"""What resident weights are worth: the score of the placer's last order, then when they were last used."""


class Accounts(Protocol):
    """Who has which page, as a range of weights needs to know it and tells it. The arena keeps them; thread-safe."""

    def take_weight_pages(self, weights: WeightRange, n: int) -> list[int]:
        """n pages to be written, from now on being filled for this model. OutOfPages, with nothing taken."""
        ...

    def settle_weight_pages(self, name: str, n: int) -> None:
        """The n pages that have been filled longest hold their data."""
        ...

    def drop_weight_pages(self, name: str) -> None:
        """Those that are being filled are free."""
        ...

    def give_weight_pages(self, name: str, keep: int) -> None:
        """All but the first `keep` pages of the model are free."""
        ...

    def lend_weight_pages(self, name: str, n: int, owner: str) -> list[int]:
        """The last n pages of the model are KV of `owner`; returns their numbers."""
        ...

    def forget_weights(self, name: str) -> None:
        """The model has no range any more, and its pages are free."""
        ...


class WeightRange:
    """The addresses of one model's weights, of which the first `resident_pages` pages have memory behind them.

    Growing and shrinking happen at the end of that prefix. Nobody may be computing with the pages that are taken away:
    on a GPU, whoever takes them has seen to it that the kernels that use them have ended; whoever offers them has too.
    """

    def __init__(self, accounts: Accounts, memory: Memory, name: str, nbytes: int) -> None:
        self.name = name
        self._accounts = accounts
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
            return self._accounts.lend_weight_pages(self.name, count, owner)

    def give_up(self, n: int) -> int:
        """Frees up to n of the last resident pages, and returns how many: none where they are not offered any more."""
        with self._lock:
            count = min(n, self._resident) if self.is_lendable and not self._removed else 0
            if count:
                self._resident -= count
                # Unmapped before another owner has them.
                self._memory.unmap(self._addresses, self._resident, count)
                self._accounts.give_weight_pages(self.name, self._resident)
            return count

    # Growing and shrinking

    def grow(self, n: int) -> None:
        """Maps n free pages behind the resident ones; their content is undefined. OutOfPages, with nothing done."""
        with self._lock, self.filling() as filling:
            if n:
                filling.map(n)
                filling.done(n)

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
                self._accounts.give_weight_pages(self.name, keep)

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
            return self._pages(index, 1)[0]

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
            self._accounts.forget_weights(self.name)

    def _pages(self, first: int, n: int) -> torch.Tensor:
        return self._addresses.tensor(torch.uint8, (n, self.page_bytes), first * self.page_bytes)

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
            self._claimed += weights._accounts.take_weight_pages(weights, missing)

    def map(self, n: int) -> torch.Tensor:
        """Maps n more free pages, to be written: uint8, (n, page_bytes). OutOfPages, with nothing done."""
        weights = self._weights
        with weights._lock:
            weights._check_present()
            if n < 1 or self._mapped + n > weights.num_pages:
                raise ValueError(
                    f"{weights.name} has {self._mapped} of {weights.num_pages} pages and cannot grow by {n}"
                )
            if n > len(self._claimed):
                self._claimed += weights._accounts.take_weight_pages(weights, n - len(self._claimed))
            weights._memory.map(weights._addresses, self._mapped, self._claimed[:n])
            del self._claimed[:n]
            first = self._mapped
            self._mapped += n
            return weights._pages(first, n)

    def done(self, n: int = 1) -> bool:
        """The next n pages hold their data and are resident; False where pages before them were taken: they are not."""
        weights = self._weights
        with weights._lock:
            if self.overtaken:
                return False
            weights._accounts.settle_weight_pages(weights.name, n)
            self._done += n
            weights._resident = self._done
            return True

    def _drop(self) -> None:
        """Gives back what is not done."""
        weights = self._weights
        weights._memory.unmap(weights._addresses, self._done, self._mapped - self._done)
        weights._accounts.drop_weight_pages(weights.name)
