"""A step as integers, read back token by token; and the shapes that steps are padded to."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from services.gpu_agent.engine.cuda.pack import LEAST_KEYS, MAX_PREFILLS, Ladder, StepShape, cut, pack
from services.gpu_agent.engine.sampling_batch import Row
from services.gpu_agent.engine.sampling_params import SamplingParams
from services.gpu_agent.engine.step import Part

BLOCK = 4
TILE = 8
MAX_BATCH = 40
MAX_TOKENS = 300
SPARE = 5
LADDER = Ladder(MAX_BATCH, MAX_TOKENS, TILE, SPARE)


@st.composite
def steps(draw: st.DrawFn) -> list[Part]:
    """What the scheduler may give: up to MAX_BATCH parts and MAX_TOKENS tokens, of up to MAX_PREFILLS prompts."""
    prefills = draw(st.integers(0, MAX_PREFILLS))
    lengths = [draw(st.integers(2, 40)) for _ in range(prefills)]
    while sum(lengths) > MAX_TOKENS:
        lengths.pop()
    room = min(MAX_BATCH - len(lengths), MAX_TOKENS - sum(lengths))
    lengths += [1] * draw(st.integers(0 if lengths else 1, room))
    sampling = draw(st.sampled_from([0.5, 1.0]))
    rng = random.Random(draw(st.integers(0, 1 << 30)))
    rng.shuffle(lengths)
    parts = []
    for length, slot in zip(lengths, rng.sample(range(MAX_BATCH), len(lengths)), strict=True):
        start = rng.randrange(50)
        blocks = rng.choices(range(1 << 20), k=-(-(start + length) // BLOCK) + rng.randrange(2))
        unknown = length == 1 and rng.random() < 0.5
        ids = [] if unknown else rng.choices(range(1 << 18), k=length)
        parts.append(Part(slot, blocks, start, ids, samples=unknown or rng.random() < sampling))
    return parts


@dataclass
class Packed:
    """A step's buffer as a graph reads it."""

    shape: StepShape
    facts: NDArray[np.int32]

    def __getitem__(self, name: str) -> list[int]:
        facts: list[int] = self.facts[self.shape.sections[name]].tolist()
        return facts

    @property
    def pieces(self) -> list[list[int]]:
        """All of them that are not padding."""
        rows = [self["pieces"][i : i + 5] for i in range(0, 5 * self.shape.pieces, 5)]
        pieces = [row for row in rows if row[1]]
        assert rows == pieces + [[0] * 5] * (len(rows) - len(pieces))
        return pieces

    @property
    def tiles(self) -> list[list[int]]:
        return [self["tiles"][i : i + 4] for i in range(0, 4 * self.shape.tiles, 4)]


def rows_of(parts: list[Part]) -> list[Row]:
    """Greedy ones and drawn ones; in some steps one with a bias."""
    rows = [
        Row(SamplingParams(9, temperature=part.slot % 3 / 2, top_k=part.slot, top_p=0.9, min_p=0.1, seed=part.slot), 4)
        for part in parts
        if part.samples
    ]
    if rows and parts[0].slot % 4 == 0:
        rows[-1] = Row(SamplingParams(9, logit_bias={3: 1.0}), 4)
    return rows


def packed(parts: list[Part], shape: StepShape) -> Packed:
    """Packed over the remains of another step."""
    buffer = np.full(1 << 14, 123_456_789, np.int32)
    rows = rows_of(parts)
    used = pack(parts, rows if all(row.is_plain for row in rows) else (), shape, BLOCK, TILE, buffer)
    assert used == shape.sections["blocks"].start + sum(len(part.blocks) for part in parts)
    assert (buffer[used:] == 123_456_789).all()
    return Packed(shape, buffer[:used])


def place(part: Part, position: int) -> int:
    return part.blocks[position // BLOCK] * BLOCK + position % BLOCK


@settings(max_examples=150, deadline=None)
@given(steps())
def test_each_token_is_where_it_belongs(parts: list[Part]) -> None:
    step = packed(parts, LADDER.fitting(parts))
    tokens = [
        (token, place(part, part.start + i), part.start + i)
        for part in parts
        for i, token in enumerate(part.token_ids or [-1 - part.slot])
    ]
    assert list(zip(step["ids"], step["slots"], step["positions"], strict=True))[: len(tokens)] == tokens
    padding = step.shape.tokens - len(tokens)
    # Token 0 is in any vocabulary; its key goes nowhere, and nobody looks at it.
    assert step["ids"][len(tokens) :] == step["positions"][len(tokens) :] == [0] * padding
    assert step["slots"][len(tokens) :] == [-1] * padding


@settings(max_examples=150, deadline=None)
@given(steps())
def test_attention_finds_each_query_once_and_its_keys(parts: list[Part]) -> None:
    step = packed(parts, LADDER.fitting(parts))
    blocks = step["blocks"]
    queries: dict[int, tuple[int, list[int]]] = {}  # row -> its position, the places of the keys up to it

    def add(row: int, position: int, listed: int) -> None:
        assert row not in queries
        keys = range(position + 1)
        queries[row] = position, [blocks[listed + at // BLOCK] * BLOCK + at % BLOCK for at in keys]

    for row, keys, listed, number, count in step.pieces:
        if number == 0:
            add(row, keys - 1, listed)
            of_one = [[row, keys, listed, i, count] for i in range(count)]
            begin = step.pieces.index(of_one[0])
            assert step.pieces[begin : begin + count] == of_one
    for first, count, position, listed in step.tiles:
        assert count <= TILE
        for i in range(count):
            add(first + i, position + i, listed)
    rows = [(part, position) for part in parts for position in range(part.start, part.start + part.length)]
    assert queries == {
        row: (position, [place(part, at) for at in range(position + 1)]) for row, (part, position) in enumerate(rows)
    }
    assert sum(number == 0 for _, _, _, number, _ in step.pieces) == sum(part.length == 1 for part in parts)


@settings(max_examples=150, deadline=None)
@given(steps())
def test_logits_are_taken_behind_the_parts_that_sample(parts: list[Part]) -> None:
    shape = LADDER.fitting(parts)
    step = packed(parts, shape)
    last = -1
    wanted = []
    for part in parts:
        last += part.length
        if part.samples:
            wanted.append((last, part.slot))
    assert list(zip(step["rows"], step["row_slots"], strict=True))[: len(wanted)] == wanted
    said = np.array(step["settings"], np.int32).view(np.float64).reshape(-1, 5)
    rows = rows_of(parts)
    if all(row.is_plain for row in rows):
        assert said[: len(rows)].tolist() == [list(row.settings) for row in rows]
        said = said[len(rows) :]
    assert (said[:, 0] == -1).all()
    assert all(0 <= row < shape.tokens for row in step["rows"])
    if not shape.tiles:
        # Then the model computes the logits of all tokens, and those of the first rows are looked at.
        assert step["rows"][: len(wanted)] == list(range(len(wanted)))


@settings(max_examples=150, deadline=None)
@given(steps())
def test_the_smallest_shape_that_holds_it(parts: list[Part]) -> None:
    tokens = sum(part.length for part in parts)

    def holds(shape: StepShape) -> bool:
        return (
            shape.tokens >= tokens
            and shape.decodes >= sum(part.length == 1 for part in parts)
            and shape.tiles >= sum(-(-part.length // TILE) for part in parts if part.length > 1)
            and shape.rows >= sum(part.samples for part in parts)
            and (shape.tiles > 0 or all(part.samples for part in parts))
        )

    chosen = LADDER.fitting(parts)
    assert holds(chosen)
    assert chosen.tokens == min(
        shape.tokens for shape in LADDER.shapes if holds(shape) and bool(shape.tiles) == bool(chosen.tiles)
    )
    assert bool(chosen.tiles) == (not all(part.length == 1 and part.samples for part in parts))
    if all(part.length > 1 for part in parts):  # a few prompts by themselves need not pass what decodes
        assert (chosen.decodes == 0) == (chosen.tokens <= 1024 and len(parts) <= 4)


def part(length: int, slot: int, samples: bool = True) -> Part:
    return Part(slot, list(range(length // BLOCK + 1)), 0, [7] * length, samples)


def test_the_fullest_steps_fit() -> None:
    """All slots decode; as many prompts as may be, each with a tile that is nearly empty; both at once."""
    for parts in (
        [part(1, slot) for slot in range(MAX_BATCH)],
        [part(TILE * 2 + 1, slot) for slot in range(MAX_PREFILLS)],
        [part(2, slot) for slot in range(MAX_PREFILLS)] + [part(1, slot) for slot in range(MAX_PREFILLS, MAX_BATCH)],
        [part(MAX_TOKENS - MAX_BATCH + 1, 0), *(part(1, slot) for slot in range(1, MAX_BATCH))],
        [part(MAX_TOKENS, 0)],
    ):
        packed(parts, LADDER.fitting(parts))


def test_a_prompts_one_token_in_the_middle_is_not_taken_for_decoding() -> None:
    """The budget may leave a single token for a prompt whose logits nobody wants; behind it another decodes."""
    parts = [part(1, 3), part(1, 5, samples=False), part(1, 4)]
    step = packed(parts, LADDER.fitting(parts))
    assert step.shape.tiles > 0  # only then are the logits of chosen rows computed
    assert step["rows"][:2] == [0, 2]
    assert step["row_slots"][:2] == [3, 4]


def test_more_tokens_than_the_ladder_has_are_an_error() -> None:
    with pytest.raises(IndexError):
        LADDER.fitting([part(MAX_TOKENS + 1, 0)])


@pytest.mark.parametrize(
    ("max_batch", "max_tokens"), [(1, 1), (1, 2048), (3, 50), (64, 512), (256, 4096), (2000, 5000)]
)
def test_a_ladder_ends_with_the_most_and_has_each_shape_once(max_batch: int, max_tokens: int) -> None:
    ladder = Ladder(max_batch, max_tokens, 128, SPARE, whole=True)
    assert ladder.decode[0].tokens == 1
    assert ladder.decode[-1].tokens == max_batch
    assert ladder.mixed[-1].tokens == max_tokens
    for rungs in (ladder.decode, ladder.alone, ladder.mixed):
        sizes = [shape.tokens for shape in rungs]
        assert sizes == sorted(set(sizes))
    assert len(set(ladder.shapes)) == len(ladder.shapes)
    assert set(ladder.shapes) == {*ladder.decode, *ladder.alone, *ladder.mixed, *ladder.whole}
    assert bool(ladder.whole) == (max_tokens > 1024)
    assert not ladder.whole or ladder.whole[-1].tokens == max_tokens


def test_a_long_prompt_by_itself_has_shapes_of_its_own() -> None:
    """From its first token on, whether all of it or a first chunk; not behind what is there, nor beside others."""
    ladder = Ladder(4, 4096, 128, SPARE, whole=True)
    for length, rung in ((1025, 1280), (4096, 4096)):
        for chunk in (part(length, 0), part(length, 0, samples=False)):
            assert ladder.whole_for([chunk]) == StepShape(tokens=rung, decodes=0, pieces=0, tiles=0, rows=1)
            assert Ladder(4, 4096, 128, SPARE).whole_for([chunk]) is None
    behind = Part(0, range(400), 16, [7] * 1200, True)
    for parts in ([part(1024, 0)], [behind], [part(1200, 0), part(1, 1)], [part(1200, 0), part(900, 1)]):
        assert ladder.whole_for(parts) is None
    shape = ladder.whole_for([part(1100, 0)])
    assert shape is not None
    whole = packed([part(1100, 0)], shape)
    assert whole["rows"] == [1099]
    assert whole["slots"] == [*range(1100), *[-1] * 180]
    assert whole.tiles == whole.pieces == []


@given(st.lists(st.integers(1, 100_000), min_size=1, max_size=80), st.integers(1, 128))
def test_contexts_are_cut_to_fill_the_room_there_is(keys: list[int], spare: int) -> None:
    cuts = cut(keys, spare)
    assert all(pieces >= 1 for pieces in cuts)
    assert sum(cuts) <= len(keys) + spare
    # Nobody's pieces are longer than one and a half equal shares of the room, or too short to be worth it.
    share = max(LEAST_KEYS, sum(keys) / spare + LEAST_KEYS)
    assert all(n / pieces <= 1.5 * share for n, pieces in zip(keys, cuts, strict=True))
    assert all(pieces == 1 or n / pieces > LEAST_KEYS / 2 for n, pieces in zip(keys, cuts, strict=True))


def test_one_context_has_all_the_room_and_many_equal_ones_are_whole() -> None:
    assert cut([33 * LEAST_KEYS], 33) == [33]
    assert cut([1000] * 64, 33) == [1] * 64
    assert cut([500] * 63 + [32_000], 33) == [1] * 63 + [16]
    assert cut([], 33) == []


def test_sections_begin_where_vectors_are_loaded() -> None:
    for shape in LADDER.shapes:
        sections = list(shape.sections.values())
        assert all(section.start % 4 == 0 for section in sections)
        assert all(a.stop <= b.start for a, b in pairwise(sections))
