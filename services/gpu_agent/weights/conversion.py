"""From the tensors that a checkpoint stores to those that the model has, by transformers' own conversion rules.

Checkpoints of mixtures of experts hold a tensor per expert where the model has one tensor for all; others name their
tensors differently. transformers knows how to rename and put them together, but only for tensors in memory. Here its
operations run on the numbers of the rows instead of the rows: what comes out says which rows, of which stored tensors,
one after the other, make up the model's tensor. So an image can be written from the files without holding anything.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    Interleave,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from services.gpu_agent.weights.safetensors_files import StoredTensor, read_pieces, rows_of

# Those that leave the numbers of a row together.
_ROW_OPERATIONS = (Chunk, Concatenate, Interleave, MergeModulelist)


@dataclass(frozen=True)
class TensorSource:
    """Where one of the model's tensors comes from: it is its parts, one after the other."""

    shape: tuple[int, ...]
    parts: tuple[StoredTensor, ...]  # stored tensors, or some rows of them

    def read(self) -> Iterator[torch.Tensor]:
        """Its numbers in order, as 1-D tensors of at most 16 MiB, each in the dtype it is stored in."""
        for part in self.parts:
            yield from read_pieces(part)


@dataclass(frozen=True)
class Sources:
    """What `find_sources` found: sources by the model's names, stored tensors without use, and what does not fit."""

    found: dict[str, TensorSource]
    unused: list[str]
    faults: list[str]


def find_sources(model: PreTrainedModel, stored: Mapping[str, StoredTensor]) -> Sources:
    """Finds where each of a model's tensors comes from; those that are missing are not in `found`.

    The rules are those by which transformers' from_pretrained loads this class.
    """
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    converter_of = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state = model.state_dict()
    result = Sources({}, [], [])
    conversions: dict[str, _Conversion] = {}
    for name in sorted(stored, key=dot_natural_key):  # experts in the order of their numbers
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if target not in state and name in state:
            target, pattern = name, None
        if target not in state:
            result.unused.append(name)
        elif pattern is not None:
            if target not in conversions:
                conversions[target] = _Conversion(copy.deepcopy(converter_of[pattern]))
            conversions[target].add(target, stored[name], pattern)
        elif target in result.found:
            result.faults.append(f"{name} and {result.found[target].parts[0].name} are both {target}")
        else:
            result.found[target] = TensorSource(stored[name].shape, (stored[name],))
    for target, conversion in conversions.items():
        try:
            result.found.update(conversion.run(target, model))
        except Exception as error:  # foreign code: whatever it raises means that the parts do not fit together
            reason = str(error).strip().split("\n")[0]
            parts = len(conversion.sources)
            result.faults.append(f"{target} cannot be put together from the {parts} tensors stored for it: {reason}")
    return result


class _Conversion:
    """One of transformers' converters, run on the numbers of the sources' rows."""

    def __init__(self, converter: Any) -> None:
        self._converter = converter
        self._begins: list[int] = []  # the number of each source's first row
        self._rows = 0
        self.sources: list[StoredTensor] = []

    def add(self, target: str, source: StoredTensor, pattern: str) -> None:
        """The next source, whose name matched `pattern`."""
        begin = self._rows
        self._begins.append(begin)
        self._rows += math.prod(source.shape[:-1])
        self.sources.append(source)
        self._converter.add_tensor(target, source.name, pattern, _numbers(begin, source.shape))

    def run(self, target: str, model: PreTrainedModel) -> dict[str, TensorSource]:
        """The tensors that come out, by name. Raises ValueError, or what transformers raises."""
        strange = [type(op).__name__ for op in self._converter.operations if not isinstance(op, _ROW_OPERATIONS)]
        if strange:
            raise ValueError(f"the operations {strange} are not supported")
        if len({source.shape[-1:] for source in self.sources}) > 1:
            raise ValueError(f"their rows differ in length: {sorted({source.shape[-1:] for source in self.sources})}")
        converted = self._converter.convert(target, model=model, config=model.config)
        return {name: self._source(rows) for name, rows in converted.items()}

    def _source(self, rows: torch.Tensor) -> TensorSource:
        """The tensor that these rows are, where rows that follow one another in one source are one part."""
        flat = rows.flatten()
        owners = torch.bucketize(flat, torch.tensor(self._begins), right=True) - 1
        breaks = ((flat.diff() != 1) | (owners.diff() != 0)).nonzero().flatten() + 1
        begins = [0, *breaks.tolist()]
        ends = [*begins[1:], len(flat)]
        parts = []
        for begin, end in zip(begins, ends, strict=True):
            owner = int(owners[begin])
            first = int(flat[begin]) - self._begins[owner]
            parts.append(rows_of(self.sources[owner], first, first + end - begin))
        width = self.sources[0].shape[-1]
        return TensorSource((*rows.shape[:-1], rows.shape[-1] * width), tuple(parts))


def _numbers(begin: int, shape: tuple[int, ...]) -> Callable[[], torch.Tensor]:
    """A tensor of this shape with, in place of each row, its number. As a function: so transformers takes them."""
    return lambda: torch.arange(begin, begin + math.prod(shape[:-1])).view(*shape[:-1], 1)
