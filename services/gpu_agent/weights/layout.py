"""Where each tensor of a model lies in its image and in the arena. Pure: no file and no memory is touched."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from services.gpu_agent.weights.errors import CheckpointError, Problem

ALIGNMENT = 256  # bytes; what CUDA kernels like for vector loads
SERVING_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class TensorPlace:
    """A tensor's place; offset and nbytes in bytes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes without padding."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class ImageLayout:
    """The places of a model's tensors in layer order, so that a resident prefix of pages is a prefix of the layers.

    Within a layer the matrices come first, in the order of the modules, then the vectors (biases, norms): the weights
    of siblings such as q, k and v lie side by side, and so do their biases (see `fused`). `dtype` is what the model is
    served in; a few tensors that would lose too much in it have float32 places. `aliases` leads from a tied tensor's
    other names to the one that has a place.
    """

    page_bytes: int
    dtype: torch.dtype
    tensors: tuple[TensorPlace, ...]
    aliases: Mapping[str, str]

    @property
    def num_pages(self) -> int:
        """Whole pages that hold it all."""
        last = self.tensors[-1]
        return -(-(last.offset + last.nbytes) // self.page_bytes)

    @property
    def total_bytes(self) -> int:
        """Bytes of the image, padded to whole pages."""
        return self.num_pages * self.page_bytes

    @cached_property
    def _by_name(self) -> dict[str, TensorPlace]:
        return {place.name: place for place in self.tensors}

    def place(self, name: str) -> TensorPlace:
        """The place of a tensor by any of its names. KeyError where the model has no such tensor."""
        return self._by_name[self.aliases.get(name, name)]

    def to_json(self) -> dict[str, Any]:
        """The layout as JSON values; from_json gives it back."""
        return {
            "page_bytes": self.page_bytes,
            "dtype": _dtype_name(self.dtype),
            "tensors": [
                [place.name, _dtype_name(place.dtype), list(place.shape), place.offset] for place in self.tensors
            ],
            "aliases": dict(self.aliases),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ImageLayout:
        """Reads what to_json wrote. ValueError, KeyError or TypeError where it is something else."""
        dtype = SERVING_DTYPES[value["dtype"]]
        places = tuple(
            TensorPlace(name, SERVING_DTYPES[own_dtype], tuple(shape), offset)
            for name, own_dtype, shape, offset in value["tensors"]
        )
        return cls(value["page_bytes"], dtype, places, dict(value["aliases"]))


def plan_layout(
    shapes: Mapping[str, tuple[int, ...]],
    aliases: Mapping[str, str],
    dtype: torch.dtype,
    page_bytes: int,
    float32: Collection[str] = (),
) -> ImageLayout:
    """Places tensors, given in the order of the model's modules; those named in `float32` keep that dtype.

    First what comes before the layers, then layer by layer, then what comes after them; each begins at a multiple of
    ALIGNMENT bytes.
    """
    if not shapes:
        raise ValueError("a model without tensors has no layout")
    places = []
    offset = 0
    for name in _layer_order(shapes):
        place = TensorPlace(name, torch.float32 if name in float32 else dtype, tuple(shapes[name]), offset)
        places.append(place)
        offset = -(-(offset + place.nbytes) // ALIGNMENT) * ALIGNMENT
    return ImageLayout(page_bytes, dtype, tuple(places), dict(aliases))


def fused(places: Sequence[TensorPlace]) -> TensorPlace | None:
    """One place over the rows of several, in their order, named by their names joined with "+".

    For projections that read the same input: their weights (rows, columns) become one matrix, their biases (rows,) one
    vector, without a copy. None where they do not follow one another without a gap, differ in dtype or columns, or
    have no rows.
    """
    if not places or not places[0].shape:
        return None
    first = places[0]
    end = first.offset
    for place in places:
        if (place.dtype, len(place.shape), place.shape[1:], place.offset) != (
            first.dtype,
            len(first.shape),
            first.shape[1:],
            end,
        ):
            return None
        end += place.nbytes
    rows = sum(place.shape[0] for place in places)
    return TensorPlace("+".join(place.name for place in places), first.dtype, (rows, *first.shape[1:]), first.offset)


def check_fits(layout: ImageLayout, num_pages: int) -> None:
    """Raises CheckpointError (too_large) where the weights and one page of KV cache need more than `num_pages`."""
    if layout.num_pages + 1 > num_pages:
        page_mib = layout.page_bytes / 2**20
        raise CheckpointError(
            Problem.TOO_LARGE,
            f"the model needs {layout.num_pages} pages for its weights ({layout.num_pages * page_mib:.1f} MiB in "
            f"{_dtype_name(layout.dtype)}) and at least 1 for its KV cache, but the arena has {num_pages} "
            f"({num_pages * page_mib:.1f} MiB); enlarge the arena or serve in a smaller dtype",
        )


def _layer_order(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    ordered = list(shapes)
    layers = {name: layer for name in ordered if (layer := _layer(name)) is not None}
    first = next((i for i, name in enumerate(ordered) if name in layers), len(ordered))
    before = [name for name in ordered[:first] if name not in layers]
    after = [name for name in ordered[first:] if name not in layers]
    return before + sorted(layers, key=lambda name: (layers[name], len(shapes[name]) < 2)) + after


def _layer(name: str) -> int | None:
    """The layer in a name such as model.layers.7.mlp.up_proj.weight: its first part that is a number."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
