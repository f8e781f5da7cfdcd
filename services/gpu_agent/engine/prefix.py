"""Which KV blocks hold which tokens, so that prompts with a common beginning share them. Pure."""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable
from collections.abc import Sequence as Many

_DIGEST_BYTES = 16


def extend_digests(digests: list[bytes], token_ids: Many[int], block_tokens: int) -> None:
    """Appends the digests of the full blocks of `token_ids` that `digests` lacks.

    A block's digest covers its tokens and all before them: equal digests, equal keys and values.
    """
    begin = len(digests) * block_tokens
    tokens = array("q", token_ids[begin : len(token_ids) - len(token_ids) % block_tokens])
    raw, size = tokens.tobytes(), tokens.itemsize * block_tokens
    for first in range(0, len(raw), size):
        before = digests[-1] if digests else b""
        digests.append(hashlib.blake2b(before + raw[first : first + size], digest_size=_DIGEST_BYTES).digest())


class PrefixCache:
    """Blocks whose content is known by digest. Those that no sequence holds any more are idle, and may be forgotten."""

    def __init__(self) -> None:
        self._blocks: dict[bytes, int] = {}
        self._digests: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def num_known(self) -> int:
        """Blocks whose content is known."""
        return len(self._blocks)

    @property
    def num_idle(self) -> int:
        """Blocks that no sequence holds."""
        return len(self._idle)

    def find(self, digests: Iterable[bytes]) -> list[int]:
        """The blocks of the longest known prefix."""
        found = []
        for digest in digests:
            block = self._blocks.get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def add(self, block: int, digest: bytes) -> None:
        """Says what a block holds that a sequence holds. Nothing where another block is known to hold the same."""
        if digest not in self._blocks and block not in self._digests:
            self._blocks[digest] = block
            self._digests[block] = digest

    def take(self, block: int) -> None:
        """A sequence holds the block again."""
        self._idle.pop(block, None)

    def release(self, block: int) -> bool:
        """No sequence holds the block any more; False where its content is not known, so that it is simply free."""
        if block not in self._digests:
            return False
        self._idle[block] = None
        return True

    def is_idle(self, block: int) -> bool:
        """Whether the block is known and held by no sequence."""
        return block in self._idle

    def forget(self, block: int | None = None) -> int:
        """Forgets an idle block, by default the least recently used one, and returns it. KeyError where it is none."""
        if block is None:
            block, _ = self._idle.popitem(last=False)
        else:
            del self._idle[block]
        del self._blocks[self._digests.pop(block)]
        return block
