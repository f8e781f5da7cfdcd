"""KV blocks of one instance: which slots of which arena pages are taken."""

from __future__ import annotations

from collections.abc import Iterable

from services.gpu_agent.arena.arena import Arena
from services.gpu_agent.arena.pages import OutOfPages
from services.gpu_agent.engine.kv_spec import KvSpec
from services.gpu_agent.engine.kv_tensors import KvTensors

__all__ = ["KvCache", "KvSpec"]


class KvCache:
    """The blocks of one instance, in pages of the arena. Used by the engine's thread alone.

    A block is numbered page * slots_per_page + slot. Pages are taken from the arena when no slot is free, and given
    back as soon as all their slots are, except for those reserved.
    """

    def __init__(self, arena: Arena, owner: str, spec: KvSpec) -> None:
        self.owner = owner
        self.spec = spec
        self.slots_per_page = spec.slots_per_page(arena.page_bytes)
        self.tensors = KvTensors(arena.kv_view(spec.dtype), arena.page_bytes, self.slots_per_page, spec)
        self._arena = arena
        self._free: dict[int, set[int]] = {}  # page -> its free slots; pages without one are left out
        self._free_slots = 0
        self._pages: set[int] = set()
        self._reserved = 0
        self._closed = False

    @property
    def pages_in_use(self) -> int:
        """Pages held, those that are only reserved included."""
        return len(self._pages)

    @property
    def blocks_in_use(self) -> int:
        """Blocks that sequences hold."""
        return len(self._pages) * self.slots_per_page - self._free_slots

    def reserve(self, pages: int) -> None:
        """Takes pages until `pages` are held, and from now on keeps as many. OutOfPages, with nothing changed."""
        self._take(max(0, pages - len(self._pages)))
        self._reserved = pages
        self._give_empty()

    def try_alloc(self, count: int) -> list[int] | None:
        """`count` blocks, their content undefined but finite; None, with nothing taken, where memory is short."""
        missing = count - self._free_slots
        if missing > 0:
            try:
                self._take(-(-missing // self.slots_per_page))
            except OutOfPages:
                return None
        blocks = []
        for _ in range(count):
            page, slots = next(iter(self._free.items()))
            blocks.append(page * self.slots_per_page + slots.pop())
            if not slots:
                del self._free[page]
        self._free_slots -= count
        return blocks

    def free(self, blocks: Iterable[int]) -> None:
        """Takes blocks back. ValueError where one is not allocated."""
        for block in blocks:
            page, slot = divmod(block, self.slots_per_page)
            if page not in self._pages or slot in self._free.get(page, ()):
                raise ValueError(f"KV block {block} is not allocated in {self.owner}")
            self._free.setdefault(page, set()).add(slot)
            self._free_slots += 1
        self._give_empty()

    def limit_blocks(self) -> int:
        """Blocks there would be if every page that holds no weights now were this instance's."""
        usage = self._arena.usage()
        return (usage.free + usage.kv) * self.slots_per_page

    def close(self) -> None:
        """Gives all pages back; the cache cannot be used any more. Closing twice is closing once."""
        if not self._closed:
            self._closed = True
            self._arena.give_kv(self.owner, sorted(self._pages))
            self._pages.clear()
            self._free.clear()
            self._free_slots = 0
            del self.tensors  # its views keep the arena's memory alive

    def _take(self, pages: int) -> None:
        for page in self._arena.take_kv(self.owner, pages):
            # Unused places of a block are masked but still multiplied, and what another owner left could be NaN.
            self.tensors.clear(page)
            self._pages.add(page)
            self._free[page] = set(range(self.slots_per_page))
            self._free_slots += self.slots_per_page

    def _give_empty(self) -> None:
        spare = len(self._pages) - self._reserved
        if spare <= 0:
            return
        empty = [page for page, slots in self._free.items() if len(slots) == self.slots_per_page][:spare]
        if empty:
            self._arena.give_kv(self.owner, empty)
            for page in empty:
                self._pages.remove(page)
                del self._free[page]
            self._free_slots -= len(empty) * self.slots_per_page
