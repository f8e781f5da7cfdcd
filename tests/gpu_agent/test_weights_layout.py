"""Layouts: every tensor has a place of its own, in layer order."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from services.gpu_agent.weights.errors import CheckpointError, Problem
from services.gpu_agent.weights.layout import ALIGNMENT, SERVING_DTYPES, ImageLayout, check_fits, plan_layout

SHAPES = st.dictionaries(
    st.builds(lambda layer, part: f"model.layers.{layer}.{part}", st.integers(0, 12), st.sampled_from("abc"))
    | st.sampled_from(["model.embed.weight", "model.norm.weight", "lm_head.weight"]),
    st.lists(st.integers(1, 50), max_size=3).map(tuple),
    min_size=1,
)


@given(SHAPES, st.sampled_from(list(SERVING_DTYPES.values())), st.sampled_from([4096, 16384]))
def test_places_are_aligned_apart_and_within_whole_pages(
    shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, page_bytes: int
) -> None:
    layout = plan_layout(shapes, {}, dtype, page_bytes)
    assert {place.name: place.shape for place in layout.tensors} == shapes
    end = 0
    for place in layout.tensors:
        assert place.offset % ALIGNMENT == 0
        assert end <= place.offset < end + ALIGNMENT
        assert place.nbytes == math.prod(place.shape) * dtype.itemsize
        assert layout.place(place.name) is place
        end = place.offset + place.nbytes
    assert layout.total_bytes == layout.num_pages * page_bytes
    assert end <= layout.total_bytes < end + page_bytes


@given(SHAPES, st.sampled_from(list(SERVING_DTYPES.values())))
def test_json_gives_the_layout_back(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> None:
    layout = plan_layout(shapes, {"lm_head.alias": next(iter(shapes))}, dtype, 4096)
    assert ImageLayout.from_json(json.loads(json.dumps(layout.to_json()))) == layout


def test_layers_come_in_order_between_what_is_before_and_behind_them() -> None:
    names = [
        "m.embed",
        "m.layers.0.a",
        "m.layers.10.a",
        "m.layers.2.a",
        "m.layers.0.b",
        "m.layers.2.b",
        "m.norm",
        "head",
    ]
    layout = plan_layout(dict.fromkeys(names, (4,)), {}, torch.float32, 4096)
    assert [place.name for place in layout.tensors] == [
        "m.embed",
        *("m.layers.0.a", "m.layers.0.b", "m.layers.2.a", "m.layers.2.b", "m.layers.10.a"),
        *("m.norm", "head"),
    ]


def test_a_tied_name_leads_to_the_tensor_it_shares() -> None:
    layout = plan_layout({"embed": (4, 4)}, {"head": "embed"}, torch.bfloat16, 4096)
    assert layout.place("head") is layout.place("embed")
    assert len(layout.tensors) == 1
    with pytest.raises(KeyError):
        layout.place("nothing")


def test_a_model_larger_than_the_arena_is_refused_with_the_numbers() -> None:
    layout = plan_layout({"embed": (3, 1024)}, {}, torch.float32, 4096)
    check_fits(layout, 4)
    with pytest.raises(
        CheckpointError, match=r"needs 3 pages .*at least 1 for its KV cache, but the arena has 3 "
    ) as caught:
        check_fits(layout, 3)
    assert caught.value.kind is Problem.TOO_LARGE
