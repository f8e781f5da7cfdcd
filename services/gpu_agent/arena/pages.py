"""Who owns each page of an arena. Pure accounting: no memory is touched and no lock is taken here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


class OutOfPages(Exception):
    """More pages were asked for than are free. Nothing was taken."""

    def __init__(self, owner: str, wanted: int, free: int, total: int) -> None:
        super().__init__(f"{owner} asked for {wanted} pages, but only {free} of {total} are free")
        self.wanted = wanted
        self.free = free
        self.total = total


class ArenaClosed(RuntimeError):
    """The arena, or the weight range, has been closed and cannot be used any more."""


@dataclass(frozen=True, slots=True)
class WeightsOwner:
    """The page holds part `index` (counted in pages) of a model's weights."""

    model: str
    index: int


@dataclass(frozen=True, slots=True)
class FillingOwner:
    """The page is being written, and will be a part of a model's weights when it holds its data."""

    model: str


@dataclass(frozen=True, slots=True)
class KvOwner:
    """The page holds KV blocks of an instance."""

    instance: str


Owner = WeightsOwner | FillingOwner | KvOwner


class Pages:
    """The accounting of `total` pages: each is free, a part of one model's weights or to become one, or KV.

    A model's pages are a list whose position is the part; it grows and shrinks at its end only.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self._owners: list[Owner | None] = [None] * total
        self._free = list(range(total - 1, -1, -1))  # a stack; the lowest number is on top at first
        self._weights: dict[str, list[int]] = {}
        self._filling: dict[str, list[int]] = {}  # in the order in which they were taken
        self._kv: dict[str, set[int]] = {}

    @property
    def free(self) -> int:
        """Pages that nobody owns."""
        return len(self._free)

    def weights(self) -> dict[str, int]:
        """Pages of each model's weights; models that have none resident are in it, with 0."""
        return {model: len(pages) for model, pages in self._weights.items()}

    def filling(self) -> dict[str, int]:
        """Pages that are being written for each model's weights, of those that have any."""
        return {model: len(pages) for model, pages in self._filling.items()}

    def kv(self) -> dict[str, int]:
        """Pages of each instance that has any."""
        return {instance: len(pages) for instance, pages in self._kv.items()}

    def owner(self, page: int) -> Owner | None:
        """The page's owner; None where it is free."""
        return self._owners[page]

    def add_weights(self, model: str) -> None:
        """Makes a model known, with no page. ValueError if it is known already."""
        if model in self._weights:
            raise ValueError(f"{model} already has a weight range in this arena")
        self._weights[model] = []

    def remove_weights(self, model: str) -> None:
        """Forgets a model and frees its pages. KeyError if it is not known."""
        self.shrink_weights(model, 0)
        self.drop_filling(model)
        del self._weights[model]

    def begin_filling(self, model: str, count: int) -> list[int]:
        """Takes `count` free pages to be written for a model's weights. Raises OutOfPages before taking any."""
        if model not in self._weights:
            raise KeyError(model)
        taken = self._take(f"the weights of {model}", count)
        for page in taken:
            self._owners[page] = FillingOwner(model)
        if taken:
            self._filling.setdefault(model, []).extend(taken)
        return taken

    def end_filling(self, model: str, count: int) -> None:
        """The `count` pages that have been written longest become the model's next part."""
        held, filling = self._weights[model], self._filling[model]
        written, left = filling[:count], filling[count:]
        if left:
            self._filling[model] = left
        else:
            del self._filling[model]
        for page in written:
            self._owners[page] = WeightsOwner(model, len(held))
            held.append(page)

    def drop_filling(self, model: str) -> None:
        """Frees the pages that are being written for a model; nobody writes to them any more."""
        self._give(self._filling.pop(model, []))

    def lend_weights(self, model: str, count: int, instance: str) -> list[int]:
        """The last `count` pages of a model's weights become KV of an instance, without having been free.

        ValueError, with nothing changed, if the model has not as many.
        """
        held = self._weights[model]
        if not 0 <= count <= len(held):
            raise ValueError(f"{model} has {len(held)} pages and cannot give {count}")
        given = held[len(held) - count :]
        del held[len(held) - count :]
        self._set_kv(instance, given)
        return given

    def shrink_weights(self, model: str, keep: int) -> list[int]:
        """Frees the model's pages from its end until `keep` are left; returns them in order of their parts."""
        held = self._weights[model]
        if not 0 <= keep <= len(held):
            raise ValueError(f"{model} has {len(held)} pages and cannot keep {keep}")
        freed = held[keep:]
        del held[keep:]
        self._give(freed)
        return freed

    def take_kv(self, instance: str, count: int) -> list[int]:
        """Takes `count` free pages for an instance's KV. Raises OutOfPages before taking any."""
        taken = self._take(f"the KV cache of {instance}", count)
        self._set_kv(instance, taken)
        return taken

    def give_kv(self, instance: str, pages: Iterable[int]) -> None:
        """Frees pages of an instance. ValueError, with nothing freed, if one is not its own or is given twice."""
        given = list(pages)
        held = self._kv.get(instance, set())
        foreign = sorted(set(given) - held)
        if foreign or len(set(given)) != len(given):
            raise ValueError(f"{instance} cannot give back {given}: not its own: {foreign}, or given twice")
        held.difference_update(given)
        if not held:
            self._kv.pop(instance, None)
        self._give(given)

    def check(self) -> None:
        """Raises AssertionError unless each page has exactly one owner and free = total - owned."""
        expected: list[Owner | None] = [None] * self.total
        claims: list[tuple[int, Owner]] = [
            (page, WeightsOwner(model, i)) for model, pages in self._weights.items() for i, page in enumerate(pages)
        ]
        claims += [(page, FillingOwner(model)) for model, pages in self._filling.items() for page in pages]
        claims += [(page, KvOwner(instance)) for instance, pages in self._kv.items() for page in pages]
        for page, owner in claims:
            if expected[page] is not None:
                raise AssertionError(f"page {page} is owned by {expected[page]} and by {owner}")
            expected[page] = owner
        if expected != self._owners:
            wrong = [page for page in range(self.total) if expected[page] != self._owners[page]]
            raise AssertionError(f"the owners recorded for pages {wrong} are not those that claim them")
        free = self.total - len(claims)
        if len(self._free) != free or len(set(self._free)) != free:
            raise AssertionError(f"{len(self._free)} pages are listed as free, but {free} should be")
        if any(self._owners[page] is not None for page in self._free):
            raise AssertionError("a page listed as free has an owner")

    def _take(self, owner: str, count: int) -> list[int]:
        if count < 0:
            raise ValueError(f"{owner} cannot take {count} pages")
        if count > len(self._free):
            raise OutOfPages(owner, count, len(self._free), self.total)
        return [self._free.pop() for _ in range(count)]

    def _set_kv(self, instance: str, pages: list[int]) -> None:
        for page in pages:
            self._owners[page] = KvOwner(instance)
        if pages:
            self._kv.setdefault(instance, set()).update(pages)

    def _give(self, pages: list[int]) -> None:
        for page in reversed(pages):
            self._owners[page] = None
            self._free.append(page)
