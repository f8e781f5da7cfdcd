"""Rotary embeddings of a transformers model: their tables in one kernel, and the rotation left to the KV write.

As in rewrite.py, what is replaced is proved first, by running it.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from services.gpu_agent.engine.cuda.fused import cosines_and_sines
from services.gpu_agent.engine.cuda.stand_in import stand_in

_ROPE = "apply_rotary_pos_emb"


@dataclass
class PendingRope:
    """Queries and keys whose rotation is left to the attention function, which stores the keys in the same kernel."""

    width: float = 1.0  # of cos and sin, relative to the head size
    query: torch.Tensor | None = None
    key: torch.Tensor | None = None
    cos: torch.Tensor | None = None
    sin: torch.Tensor | None = None

    def defer(self, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        """Stands for transformers' apply_rotary_pos_emb."""
        self.query, self.key, self.cos, self.sin = query, key, cos, sin
        return query, key

    def take(self, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(cos, sin) still to be applied to these; None where nothing is.

        RuntimeError where the model changed them after what should have been their rotation.
        """
        if self.cos is None or self.sin is None:
            return None
        if query is not self.query or key is not self.key:
            raise RuntimeError("the model changes queries or keys behind their rotary embedding")
        if self.cos.shape[-1] != int(self.width * query.shape[-1]):
            raise RuntimeError("the model rotates a part of each head only")
        rope = self.cos, self.sin
        self.query = self.key = self.cos = self.sin = None
        return rope


def defer_rotation(part: nn.Module, rope: PendingRope) -> bool:
    """Has an attention module leave the rotation of its queries and keys to `rope`, where that computes the same."""
    own = type(part).forward
    if not isinstance(own, FunctionType) or _ROPE not in own.__code__.co_names or hasattr(own, "__wrapped__"):
        return False
    width = rotation_width(own.__globals__.get(_ROPE))
    parameters = getattr(getattr(part, "config", None), "rope_parameters", None) or {}
    partial = [
        value.get("partial_rotary_factor", 1.0)
        for value in (parameters, *parameters.values())
        if isinstance(value, dict)
    ]
    if width is None or any(factor != 1.0 for factor in partial):
        return False
    rope.width = width
    # The same code, seeing one other function: no other model's class or module is touched.
    seen = {**own.__globals__, _ROPE: rope.defer}
    forward = FunctionType(own.__code__, seen, own.__name__, own.__defaults__, own.__closure__)
    forward.__kwdefaults__ = own.__kwdefaults__
    part.forward = MethodType(forward, part)
    return True


def rotation_width(apply: Any) -> float | None:
    """How wide the cosines of a rotary embedding are, relative to the head: 1, or 0.5 where each is given once.

    None unless it turns element i together with element i + size / 2, over the whole size.
    """
    if not callable(apply):
        return None
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 2, 3, 8, generator=generator), torch.randn(1, 1, 3, 8, generator=generator)
    angles = torch.randn(1, 3, 4, generator=generator)

    def turned(x: torch.Tensor) -> torch.Tensor:
        low, high = x.chunk(2, dim=-1)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)

    for width, given in ((1.0, torch.cat((angles, angles), dim=-1)), (0.5, angles)):
        try:
            turned_q, turned_k = apply(q, k, given.cos(), given.sin())
        except Exception:  # foreign code: it wants the other form, or is something else
            continue
        if torch.allclose(turned_q, turned(q), atol=1e-6) and torch.allclose(turned_k, turned(k), atol=1e-6):
            return width
    return None


def replace_tables(part: nn.Module) -> bool:
    """Has a module that makes the cosines and sines of positions do so in one kernel, if that is all that it does."""
    tables = rotary_tables(part)
    if not tables:
        return False
    own = part.forward

    def forward(x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None) -> Any:
        if position_ids.dim() != 2:  # several positions of one token, of which nothing was proved
            return own(x, position_ids, **({} if layer_type is None else {"layer_type": layer_type}))
        table = tables[layer_type]
        frequencies: torch.Tensor = getattr(part, table.frequencies)
        scaling = float(getattr(part, table.scaling))
        dtype = x.dtype if table.rounds else torch.float32
        return cosines_and_sines(position_ids, frequencies, scaling, table.copies, dtype)

    part.forward = forward
    return True


@dataclass(frozen=True)
class RotaryTable:
    """Cosines and sines of positions times fixed frequencies, times a factor."""

    frequencies: str
    """The attribute of the module that holds them, (n) float32."""
    scaling: str
    """The attribute that holds the factor."""
    copies: int
    """How often each row of the result holds them, one copy behind the other."""
    rounds: bool
    """Whether the result has the dtype of the hidden states; float32 where not."""


def rotary_tables(part: nn.Module) -> dict[str | None, RotaryTable]:
    """What a module computes from positions, by the type of layer that it is called with; None: it is called without.

    Empty where it is no rotary embedding, or one whose result depends on anything but position, frequency and factor:
    as where the frequencies change with the longest sequence (see model.py, which keeps those of short ones).
    """
    kinds = getattr(part, "rope_type", None)
    if isinstance(kinds, dict):
        tables = {kind: _table(part, f"{kind}_", {"layer_type": kind}) for kind in kinds}
    else:
        tables = {None: _table(part, "", {})}
    proved = {kind: table for kind, table in tables.items() if table is not None}
    return proved if len(proved) == len(tables) else {}


# Among them one that is behind any sequence, and such as half precision has no number for.
_POSITIONS = (0, 1, 2, 77, 1_001, 1 << 22)


def _table(part: nn.Module, prefix: str, layer_type: dict[str, str]) -> RotaryTable | None:
    names = f"{prefix}inv_freq", f"{prefix}attention_scaling"
    scaling = getattr(part, names[1], None)
    if names[0] not in part._buffers or not isinstance(scaling, int | float):
        return None
    generator = torch.Generator().manual_seed(0)
    positions = torch.tensor(_POSITIONS)
    given = torch.rand(part.get_buffer(names[0]).shape, generator=generator)
    if given.dim() != 1:
        return None
    angles = positions[:, None].float() * given
    twin = stand_in(part)
    setattr(twin, names[0], given)
    setattr(twin, names[1], 1.25)
    results: list[object] = []
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(1, len(positions), 8, generator=generator).to(dtype)
        try:
            with torch.no_grad():
                cos, sin = type(part).forward(twin, x, positions[None], **layer_type)
        except Exception:  # foreign code: whatever it raises, it is another kind of module
            return None
        results += cos, sin
    for table in (RotaryTable(*names, copies, rounds) for copies in (1, 2) for rounds in (True, False)):
        repeated = torch.cat([angles] * table.copies, dim=-1)[None]
        wide = [repeated.cos() * 1.25, repeated.sin() * 1.25]
        rounded = [numbers.bfloat16() for numbers in wide] if table.rounds else wide
        if all(_close(a, b) for a, b in zip(results, [*wide, *rounded], strict=True)):
            return table
    return None


def _close(found: object, expected: torch.Tensor) -> bool:
    """Whether it is such a tensor, but for a rounding or two."""
    return (
        isinstance(found, torch.Tensor)
        and (found.shape, found.dtype) == (expected.shape, expected.dtype)
        and torch.allclose(found, expected, rtol=0, atol=4 * torch.finfo(expected.dtype).eps)
    )
