"""A step as integers: which shapes steps are padded to, and where each fact lies in the buffer that a graph reads."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence as Many
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from services.gpu_agent.engine.sampling_batch import Row
from services.gpu_agent.engine.step import Part

LEAST_KEYS = 64
"""Of a piece of a context (see `cut`)."""
MAX_PREFILLS = 16  # sequences with more than one token in a step
_MOST_PROMPTS_ALONE = 4  # of them in one without decodes: each may leave a tile that the attention visits for nothing
_DECODE_LADDER = (1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 56, 64, 80, 96, 128, 160, 192, 256, 320, 384, 512, 768, 1024)
_MIXED_LADDER = (32, 64, 128, 192, 256, 384, 512, 768, 1024, 1280, 1536, 1792, 2048, 3072, 4096)
_MOST_ALONE = 1024  # tokens of prompts alone; beyond, what others that are not there cost is nothing


@dataclass(frozen=True)
class StepShape:
    """Capacities of a graph: tokens; one-token parts, and pieces of their contexts; query tiles of longer parts; rows
    of logits.

    With neither of the two kinds of parts it is for one prompt, from its first token on.

    The buffer of a step is its sections one after another, as int32, and behind them the block numbers of all parts.
    """

    tokens: int
    decodes: int
    pieces: int
    tiles: int
    rows: int

    @cached_property
    def sections(self) -> dict[str, slice]:
        """Where each fact lies."""
        sizes = {
            "ids": self.tokens,
            "slots": self.tokens,
            "positions": self.tokens,
            "pieces": 5 * self.pieces,
            "tiles": 4 * self.tiles,
            "rows": self.rows,
            "row_slots": self.rows,
            "settings": 2 * 5 * self.rows,
        }
        sections = {}
        begin = 0
        for name, size in sizes.items():
            sections[name] = slice(begin, begin + size)
            begin += -(-size // 4) * 4  # 16 bytes, for vector loads
        sections["blocks"] = slice(begin, None)
        return sections


class Ladder:
    """The shapes that a model is captured for: decoding only, by sequences; prompts alone and both, by tokens; and for
    one long prompt from its first token on."""

    def __init__(self, max_batch: int, max_tokens: int, tile: int, spare_pieces: int, whole: bool = False) -> None:
        """`tile` is the number of queries in a tile of the attention; max_tokens bounds the tokens of one step.

        spare_pieces: see attention.py; whole: whether a long prompt by itself has shapes of its own.
        """
        self.decode = [
            StepShape(tokens=n, decodes=n, pieces=n + spare_pieces, tiles=0, rows=n)
            for n in _rungs(_DECODE_LADDER, max_batch)
        ]
        few = _MOST_PROMPTS_ALONE
        self.alone = [
            StepShape(tokens=n, decodes=0, pieces=0, tiles=-(-n // tile) + few - 1, rows=min(max_batch, few))
            for n in _rungs(_MIXED_LADDER, max_tokens)
            if n <= _MOST_ALONE
        ]
        self.whole = [
            StepShape(tokens=n, decodes=0, pieces=0, tiles=0, rows=1)
            for n in _rungs(_MIXED_LADDER, max_tokens)
            if whole and n > _MOST_ALONE
        ]
        self.mixed = [
            StepShape(
                tokens=n,
                decodes=max_batch,
                pieces=max_batch + spare_pieces,
                tiles=-(-n // tile) + MAX_PREFILLS,
                rows=max_batch,
            )
            for n in _rungs(_MIXED_LADDER, max_tokens)
        ]

    @property
    def shapes(self) -> list[StepShape]:
        """All of them, those first that a first request needs."""
        return [*self.decode[:1], *self.alone, *self.decode[1:], *self.mixed, *self.whole]

    def whole_for(self, parts: Many[Part]) -> StepShape | None:
        """The smallest shape for one long prompt, where a step is that."""
        if not self.whole or len(parts) > 1 or parts[0].start > 0 or parts[0].length <= _MOST_ALONE:
            return None
        return _smallest(self.whole, parts[0].length)

    def fitting(self, parts: Many[Part]) -> StepShape:
        """The smallest shape that holds a step, whatever it is."""
        tokens = sum(part.length for part in parts)
        # In a decoding step the logits' rows are the tokens, so all parts must want theirs. The last token that the
        # budget left for a prompt may be one by itself and not the prompt's last.
        if tokens == len(parts) and all(part.samples for part in parts):
            rungs = self.decode
        elif self._fits_alone(tokens, parts):
            rungs = self.alone
        else:
            rungs = self.mixed
        return _smallest(rungs, tokens)

    def _fits_alone(self, tokens: int, parts: Many[Part]) -> bool:
        fits = bool(self.alone) and tokens <= self.alone[-1].tokens and len(parts) <= _MOST_PROMPTS_ALONE
        return fits and all(part.length > 1 for part in parts)


def _smallest(rungs: Many[StepShape], tokens: int) -> StepShape:
    return rungs[bisect_left(rungs, tokens, key=lambda shape: shape.tokens)]


def _rungs(ladder: Many[int], last: int) -> list[int]:
    return [n for n in ladder if n < last] + [last]


def cut(keys: Many[int], spare: int) -> list[int]:
    """Into how many pieces each context is cut, of so many keys: all together at most `spare` more than there are.

    Pieces are as long as that asks, and at least LEAST_KEYS, whosever they are: few contexts fill the GPU, and one much
    longer than the others is not left running alone.
    """
    if not keys:
        return []
    piece = max(1, -(-sum(keys) // (spare * LEAST_KEYS))) * LEAST_KEYS
    return [max(1, (n + piece // 2) // piece) for n in keys]


def pack(
    parts: Many[Part], rows: Many[Row], shape: StepShape, block_tokens: int, tile: int, into: NDArray[np.int32]
) -> int:
    """Writes a step into a buffer laid out for `shape`; returns how many of its integers count.

    Facts that a graph reads (see StepTensors): ids (-1 - slot: what that slot chose last), slots of the new keys and
    values (-1: none, padding), pieces without keys and tiles without queries for padding; rows of the logits wanted,
    the slots of those they are for, and how `rows` choose (SamplingBatch.settings). That is one for each of them; or
    none, where the step is not to choose: then, and in padding, the temperature is -1.
    """
    at = shape.sections
    used = at["blocks"].start
    into[:used] = 0
    into[at["slots"]] = -1
    ids, slots, positions = into[at["ids"]], into[at["slots"]], into[at["positions"]]
    wanted, row_slots = into[at["rows"]], into[at["row_slots"]]
    tiles = into[at["tiles"]].reshape(-1, 4)
    cuts = iter(cut([part.start + 1 for part in parts if part.length == 1], shape.pieces - shape.decodes))
    pieces: list[int] = []
    row = num_tiles = num_rows = listed = 0
    for part in parts:
        length, start = part.length, part.start
        blocks = np.asarray(part.blocks, dtype=np.int32)
        into[used + listed : used + listed + len(blocks)] = blocks
        if length == 1:
            ids[row] = part.token_ids[0] if part.token_ids else -1 - part.slot
            positions[row] = start
            slots[row] = blocks[start // block_tokens] * block_tokens + start % block_tokens
            count = next(cuts)
            for number in range(count):
                pieces += row, start + 1, listed, number, count
        else:
            ids[row : row + length] = part.token_ids
            where = np.arange(start, start + length, dtype=np.int32)
            positions[row : row + length] = where
            slots[row : row + length] = blocks[where // block_tokens] * block_tokens + where % block_tokens
            first = np.arange(0, length if shape.tiles else 0, tile, dtype=np.int32)
            of_part = tiles[num_tiles : num_tiles + len(first)]
            of_part[:, 0], of_part[:, 1] = row + first, np.minimum(tile, length - first)
            of_part[:, 2], of_part[:, 3] = start + first, listed
            num_tiles += len(first)
        row += length
        if part.samples:
            wanted[num_rows] = row - 1
            row_slots[num_rows] = part.slot
            num_rows += 1
        listed += len(blocks)
    into[at["pieces"]][: len(pieces)] = pieces
    settings = into[at["settings"]].view(np.float64).reshape(-1, 5)
    settings[:, 0] = -1
    if rows:
        settings[: len(rows)] = [row.settings for row in rows]
    return int(used + listed)
