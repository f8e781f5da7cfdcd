"""The accounting of pages: one owner each, nothing half taken."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from services.gpu_agent.arena.pages import KvOwner, OutOfPages, Pages, WeightsOwner

TOTAL = 12
NAMES = st.sampled_from(["a", "b", "c"])
COUNTS = st.integers(0, TOTAL + 2)


def grow(pages: Pages, name: str, count: int) -> list[int]:
    """Takes pages and says that all are written."""
    taken = pages.begin_filling(name, count)
    for _ in taken:
        pages.end_filling(name, 1)
    return taken


class Accounting(RuleBasedStateMachine):
    """Any sequence of orders, against a model that only counts."""

    def __init__(self) -> None:
        super().__init__()
        self.pages = Pages(TOTAL)
        self.weights: dict[str, list[int]] = {}
        self.kv: dict[str, list[int]] = {}

    def free(self) -> int:
        return TOTAL - sum(map(len, self.weights.values())) - sum(map(len, self.kv.values()))

    @rule(name=NAMES)
    def add(self, name: str) -> None:
        if name in self.weights:
            with pytest.raises(ValueError, match="already"):
                self.pages.add_weights(name)
        else:
            self.pages.add_weights(name)
            self.weights[name] = []

    @rule(name=NAMES)
    def remove(self, name: str) -> None:
        if name in self.weights:
            self.pages.remove_weights(name)
            del self.weights[name]
        else:
            with pytest.raises(KeyError):
                self.pages.remove_weights(name)

    @rule(name=NAMES, n=COUNTS)
    def grow(self, name: str, n: int) -> None:
        if name not in self.weights:
            return
        if n > self.free():
            with pytest.raises(OutOfPages) as caught:
                grow(self.pages, name, n)
            assert (caught.value.wanted, caught.value.free, caught.value.total) == (n, self.free(), TOTAL)
        else:
            self.weights[name] += grow(self.pages, name, n)

    @rule(name=NAMES, keep=COUNTS)
    def shrink(self, name: str, keep: int) -> None:
        held = self.weights.get(name, [])
        if keep <= len(held) and name in self.weights:
            assert self.pages.shrink_weights(name, keep) == held[keep:]
            del held[keep:]

    @rule(name=NAMES, n=COUNTS)
    def take_kv(self, name: str, n: int) -> None:
        if n > self.free():
            with pytest.raises(OutOfPages):
                self.pages.take_kv(name, n)
        else:
            self.kv.setdefault(name, []).extend(self.pages.take_kv(name, n))

    @rule(name=NAMES, data=st.data())
    def give_kv(self, name: str, data: st.DataObject) -> None:
        held = self.kv.get(name, [])
        given = data.draw(st.lists(st.sampled_from(held), unique=True) if held else st.just([]))
        self.pages.give_kv(name, given)
        self.kv[name] = [page for page in held if page not in given]

    @rule(name=NAMES, page=st.integers(0, TOTAL - 1))
    def give_foreign(self, name: str, page: int) -> None:
        held = self.kv.get(name, [])
        if page not in held:
            with pytest.raises(ValueError, match="not its own"):
                self.pages.give_kv(name, [*held, page])

    @invariant()
    def every_page_has_the_owner_that_was_told(self) -> None:
        self.pages.check()
        assert self.pages.free == self.free()
        assert self.pages.weights() == {name: len(held) for name, held in self.weights.items()}
        assert self.pages.kv() == {name: len(held) for name, held in self.kv.items() if held}
        owners = {page: WeightsOwner(name, i) for name, held in self.weights.items() for i, page in enumerate(held)}
        kv_owners = {page: KvOwner(name) for name, held in self.kv.items() for page in held}
        assert not owners.keys() & kv_owners.keys()
        for page in range(TOTAL):
            assert self.pages.owner(page) == (owners.get(page) or kv_owners.get(page))


Accounting.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestAccounting = Accounting.TestCase


def test_out_of_pages_says_who_asked_and_how_many_are_free() -> None:
    pages = Pages(3)
    pages.take_kv("i1", 2)
    with pytest.raises(OutOfPages, match=r"the KV cache of i2 asked for 2 pages, but only 1 of 3 are free"):
        pages.take_kv("i2", 2)


def test_a_page_given_twice_in_one_call_frees_nothing() -> None:
    pages = Pages(3)
    (page,) = pages.take_kv("i", 1)
    with pytest.raises(ValueError, match="given twice"):
        pages.give_kv("i", [page, page])
    assert pages.free == 2


def test_check_finds_a_page_with_two_owners() -> None:
    pages = Pages(3)
    pages.add_weights("m")
    (page,) = grow(pages, "m", 1)
    pages._kv["i"] = {page}
    with pytest.raises(AssertionError, match="owned by"):
        pages.check()


def test_check_finds_a_page_that_was_lost() -> None:
    pages = Pages(3)
    pages._free.pop()
    with pytest.raises(AssertionError, match="listed as free"):
        pages.check()
