"""KV blocks of one instance: which slots of which arena pages are taken, shared, or kept for a common prefix."""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Many

from services.gpu_agent.arena.arena import Arena
from services.gpu_agent.arena.pages import OutOfPages
from services.gpu_agent.engine.kv_spec import KvSpec
from services.gpu_agent.engine.lending import promised_pages
from services.gpu_agent.engine.prefix import PrefixCache


class KvCache:
    """The blocks of one instance, in pages of the arena. Used by the engine's thread alone.

    A block is numbered page * slots_per_page + slot. What sequences of a common prefix need is held once. Pages are
    taken from the arena when no slot is free. Beyond those reserved, a page is given back when no sequence holds a
    slot of it any more, as soon as no step under way can touch it; in the pages that stay, blocks of ended sequences
    are kept for prompts that begin alike, until their room is needed.
    """

    def __init__(self, arena: Arena, owner: str, spec: KvSpec, clear: Callable[[int], None] | None = None) -> None:
        """`clear(page)` is called for each page taken, if its old content must not be seen."""
        self.owner = owner
        self.spec = spec
        self.slots_per_page = spec.slots_per_page(arena.page_bytes)
        self._arena = arena
        self._clear = clear
        self._prefixes = PrefixCache()
        self._holders: Counter[int] = Counter()  # block -> sequences that hold it
        self._free: dict[int, set[int]] = {}  # page -> its slots that hold nothing; pages without one are left out
        self._free_slots = 0
        self._held_slots: dict[int, int] = {}  # page -> its blocks that sequences hold
        self._unheld: OrderedDict[int, None] = OrderedDict()  # pages of which none is held, longest unheld first
        self._leaving: deque[tuple[int, int]] = deque()  # (last step that may touch it, page)
        self._reserved = 0
        self._launched = 0
        self._settled = 0
        self._load: tuple[int, int, int, float] | None = None  # that the promise was made for
        self._closed = False

    @property
    def pages_in_use(self) -> int:
        """Pages held, those that are only reserved included."""
        return len(self._held_slots)

    @property
    def blocks_in_use(self) -> int:
        """Blocks that sequences hold, shared ones counted once."""
        return len(self._holders)

    @property
    def blocks_kept(self) -> int:
        """Blocks of ended sequences that are kept for prompts that begin alike."""
        return self._prefixes.num_idle

    def reserve(self, pages: int) -> None:
        """Takes pages until `pages` are held, and from now on keeps as many. OutOfPages, with nothing changed."""
        self._take(max(0, pages - self.pages_in_use))
        self._reserved = pages
        self._arena.keep_kv(self.owner, pages)
        self._give_unheld()

    def expect(self, running: int, max_batch: int, expected: float) -> None:
        """Has prewarming leave what `running` sequences of at most max_batch need, and what `expected` ones would.

        See promised_pages. It takes no pages.
        """
        load = running, max_batch, -(-self.blocks_in_use // self.slots_per_page), expected
        if load != self._load:
            self._load = load
            total = self._arena.kv_share(self.owner)
            self._arena.promise_kv(self.owner, promised_pages(total, running, max_batch, load[2], expected))

    def try_alloc(self, count: int) -> list[int] | None:
        """`count` blocks, their content undefined; None, with nothing taken, where memory is short."""
        missing = count - self._free_slots - self._prefixes.num_idle
        if missing > 0:
            try:
                self._take(-(-missing // self.slots_per_page))
            except OutOfPages:
                return None
        while self._free_slots < count:
            self._add_free(self._prefixes.forget())
        blocks: list[int] = []
        while len(blocks) < count:
            page, slots = next(iter(self._free.items()))
            taken = min(count - len(blocks), len(slots))
            blocks += [page * self.slots_per_page + slots.pop() for _ in range(taken)]
            self._held_slots[page] += taken
            self._unheld.pop(page, None)
            if not slots:
                del self._free[page]
        self._free_slots -= count
        dict.update(self._holders, dict.fromkeys(blocks, 1))
        return blocks

    @property
    def knows_prefixes(self) -> bool:
        """Whether `share` could find anything."""
        return self._prefixes.num_known > 0

    def share(self, digests: Many[bytes]) -> list[int]:
        """The blocks of the longest prefix that is here, held from now on (see prefix.extend_digests)."""
        blocks = self._prefixes.find(digests)
        for block in blocks:
            self._prefixes.take(block)
        self._hold(blocks)
        return blocks

    def remember(self, blocks: Iterable[int], digests: Iterable[bytes]) -> None:
        """Says what blocks that a sequence holds contain, or will before a later step reads them; full ones only."""
        for block, digest in zip(blocks, digests, strict=True):
            self._prefixes.add(block, digest)

    def free(self, blocks: Many[int]) -> None:
        """A sequence holds these, in order of position, no more. ValueError where nobody held one."""
        for block in reversed(blocks):  # so that the end of a prefix is forgotten before what it builds upon
            if block not in self._holders:
                raise ValueError(f"KV block {block} is not allocated in {self.owner}")
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            del self._holders[block]
            if not self._prefixes.release(block):
                self._add_free(block)
            page = block // self.slots_per_page
            self._held_slots[page] -= 1
            if not self._held_slots[page]:
                self._unheld[page] = None
        self._give_unheld()

    def launched(self) -> None:
        """A step was begun that uses blocks as they are held now."""
        self._launched += 1

    def settled(self, steps: int) -> None:
        """The first `steps` steps have ended: pages that only they could touch go back to the arena."""
        self._settled = steps
        going = []
        while self._leaving and self._leaving[0][0] <= steps:
            going.append(self._leaving.popleft()[1])
        if going:
            self._arena.give_kv(self.owner, going)

    def limit_blocks(self) -> int:
        """Blocks there would be if all other instances ran nothing: they keep what they have reserved."""
        return self._arena.kv_within_reach(self.owner) * self.slots_per_page

    def close(self) -> None:
        """Gives all pages back; no step may be under way. The cache cannot be used any more. Twice is once."""
        if not self._closed:
            self._closed = True
            self._arena.keep_kv(self.owner, 0)
            self._arena.promise_kv(self.owner, 0)
            self._arena.give_kv(self.owner, sorted([*self._held_slots, *(page for _, page in self._leaving)]))
            self._held_slots.clear()
            self._leaving.clear()
            self._holders.clear()
            self._free.clear()
            self._free_slots = 0

    def _hold(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            self._holders[block] += 1
            if self._holders[block] == 1:
                page = block // self.slots_per_page
                self._held_slots[page] += 1
                self._unheld.pop(page, None)

    def _add_free(self, block: int) -> None:
        page, slot = divmod(block, self.slots_per_page)
        self._free.setdefault(page, set()).add(slot)
        self._free_slots += 1

    def _take(self, pages: int) -> None:
        # Those on their way back are still ours.
        back = [self._leaving.pop()[1] for _ in range(min(pages, len(self._leaving)))]
        try:
            taken = self._arena.take_kv(self.owner, pages - len(back))
        except OutOfPages:
            self._leaving.extend((self._launched, page) for page in reversed(back))
            raise
        for page in (*back, *taken):
            if self._clear is not None:
                self._clear(page)
            self._held_slots[page] = 0
            self._unheld[page] = None
            self._free[page] = set(range(self.slots_per_page))
            self._free_slots += self.slots_per_page

    def _give_unheld(self) -> None:
        while self._unheld and self.pages_in_use > self._reserved:
            page, _ = self._unheld.popitem(last=False)
            del self._held_slots[page]
            for block in range(page * self.slots_per_page, (page + 1) * self.slots_per_page):
                if self._prefixes.is_idle(block):
                    self._add_free(self._prefixes.forget(block))
            self._free_slots -= len(self._free.pop(page))
            self._leaving.append((self._launched, page))
        self.settled(self._settled)
