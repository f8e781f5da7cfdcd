"""Layouts: every tensor has a place of its own, in layer order."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from services.gpu_agent.weights.errors import CheckpointError, Problem
from services.gpu_agent.weights.layout import ALIGNMENT, SERVING_DTYPES, ImageLayout, check_fits, fused, plan_layout

SHAPES = st.dictionaries(
    st.builds(lambda layer, part: f"model.layers.{layer}.{part}", st.integers(0, 12), st.sampled_from("abc"))
    | st.sampled_from(["model.embed.weight", "model.norm.weight", "lm_head.weight"]),
    st.lists(st.integers(1, 50), max_size=3).map(tuple),
    min_size=1,
)


@given(st.data(), SHAPES, st.sampled_from(list(SERVING_DTYPES.values())), st.sampled_from([4096, 16384]))
def test_places_are_aligned_apart_and_within_whole_pages(
    data: st.DataObject, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, page_bytes: int
) -> None:
    float32 = data.draw(st.sets(st.sampled_from(sorted(shapes))))
    layout = plan_layout(shapes, {}, dtype, page_bytes, float32)
    assert {place.name: place.shape for place in layout.tensors} == shapes
    end = 0
    for place in layout.tensors:
        assert place.offset % ALIGNMENT == 0
        assert end <= place.offset < end + ALIGNMENT
        assert place.dtype == (torch.float32 if place.name in float32 else dtype)
        assert place.nbytes == math.prod(place.shape) * place.dtype.itemsize
        assert layout.place(place.name) is place
        end = place.offset + place.nbytes
    assert layout.total_bytes == layout.num_pages * page_bytes
    assert end <= layout.total_bytes < end + page_bytes


@given(SHAPES, st.sampled_from(list(SERVING_DTYPES.values())))
def test_json_gives_the_layout_back(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> None:
    first = next(iter(shapes))
    layout = plan_layout(shapes, {"lm_head.alias": first}, dtype, 4096, float32=[first])
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


PROJECTIONS = {
    "m.layers.0.norm.weight": (64,),
    "m.layers.0.attn.q.weight": (128, 64),
    "m.layers.0.attn.q.bias": (128,),
    "m.layers.0.attn.k.weight": (64, 64),
    "m.layers.0.attn.k.bias": (64,),
    "m.layers.0.attn.v.weight": (64, 64),
    "m.layers.0.attn.v.bias": (64,),
    "m.layers.0.attn.o.weight": (64, 128),
    "m.layers.1.attn.q.weight": (128, 64),
}


def test_weights_of_siblings_lie_side_by_side_and_so_do_their_biases() -> None:
    layout = plan_layout(PROJECTIONS, {}, torch.float32, 4096)
    memory = torch.arange(layout.total_bytes // 4)
    for kind in ("weight", "bias"):
        parts = [layout.place(f"m.layers.0.attn.{part}.{kind}") for part in "qkv"]
        whole = fused(parts)
        assert whole is not None
        assert (whole.shape[0], whole.offset) == (256, parts[0].offset)
        numbers = [memory[p.offset // 4 : (p.offset + p.nbytes) // 4].view(p.shape) for p in (*parts, whole)]
        assert torch.equal(numbers.pop(), torch.cat(numbers))


def test_what_does_not_lie_side_by_side_is_not_fused() -> None:
    layout = plan_layout(PROJECTIONS, {}, torch.bfloat16, 4096)
    q, k, v, o = (layout.place(f"m.layers.0.attn.{part}.weight") for part in "qkvo")
    assert fused([q]) is not None
    for places in ([], [k, q], [q, v], [q, k, v, o], [q, layout.place("m.layers.1.attn.q.weight")]):
        assert fused(places) is None
    kept = plan_layout(PROJECTIONS, {}, torch.bfloat16, 4096, float32=[k.name])
    assert fused([kept.place(place.name) for place in (q, k)]) is None
    # 100 rows of 1 number leave a gap to the next multiple of ALIGNMENT.
    padded = plan_layout({"m.0.a": (100, 1), "m.0.b": (100, 1)}, {}, torch.bfloat16, 4096)
    assert fused(padded.tensors) is None
    scalars = plan_layout({"m.0.a": (), "m.0.b": ()}, {}, torch.bfloat16, 4096)
    assert fused(scalars.tensors) is None


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
