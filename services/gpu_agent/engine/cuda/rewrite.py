"""Makes a transformers model cheaper to run, without another model class: forwards of its parts are replaced.

Each replacement is proved before it is made: the part's own forward is run on the CPU with small stand-ins for its
children, and must give what the replacement would compute. A part that differs is left as transformers wrote it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import MethodType
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F

from services.gpu_agent.arena.weight_range import WeightRange
from services.gpu_agent.engine.cuda.fused import gate, rms_norm
from services.gpu_agent.engine.cuda.rotary import PendingRope, defer_rotation, replace_tables
from services.gpu_agent.engine.cuda.stand_in import stand_in
from services.gpu_agent.weights.layout import ImageLayout, fused

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@dataclass
class Rewritten:
    """What was replaced: the kinds of parts and how many of each."""

    rope: PendingRope = field(default_factory=PendingRope)
    parts: Counter[str] = field(default_factory=Counter)
    norms: list[_NormForward] = field(default_factory=list)

    def unfinished(self) -> None:
        """A pass has ended between two layers: what one had computed for the next is let go of."""
        for norm in self.norms:
            norm.drop()


@dataclass(frozen=True)
class _NormStyle:
    eps: float
    offset: bool
    rounds: bool


def rewrite(module: nn.Module, layout: ImageLayout, weights: WeightRange) -> Rewritten:
    """Replaces what it can in a model bound to `weights`."""
    done = Rewritten()
    names = {part: name for name, part in module.named_modules()}
    for part, name in names.items():
        if _fuse_siblings(part, ("q_proj", "k_proj", "v_proj"), name, layout, weights):
            done.parts["query, key and value projections in one"] += 1
        if defer_rotation(part, done.rope):
            done.parts["rotary embedding with the KV write"] += 1
        if replace_tables(part):
            done.parts["cosines and sines"] += 1
        if _fuse_gated(part, name, layout, weights):
            done.parts["gated feed-forward"] += 1
    norms = {part: style for part in names if (style := norm_style(part)) is not None}
    for norm, style in norms.items():
        norm.forward = _NormForward(norm, style)
        done.norms.append(norm.forward)
        done.parts["normalisation"] += 1
    done.parts["residual sum with the normalisation behind it"] += _chain(module, norms)
    return done


# Norms


class _NormForward:
    """An RMS norm's forward; or, within a chain of layers, what the layer before has computed already."""

    def __init__(self, norm: nn.Module, style: _NormStyle) -> None:
        self._norm = norm
        self._style = style
        self._sum: torch.Tensor | None = None
        self._normed: torch.Tensor | None = None

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self._sum is not None and hidden_states is self._sum:
            normed, self._sum, self._normed = self._normed, None, None
            assert normed is not None
            return normed
        return self._compute(hidden_states, None)

    def add(self, hidden_states: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """The norm of the sum; residual becomes the sum."""
        return self._compute(hidden_states, residual)

    def ahead(self, hidden_states: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Returns the sum, and keeps its norm for the call with it."""
        self._normed = self._compute(hidden_states, residual)
        self._sum = residual
        return residual

    def drop(self) -> None:
        """Nobody calls with what was kept."""
        self._sum = self._normed = None

    def _compute(self, hidden_states: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        style = self._style
        weight: torch.Tensor = self._norm.weight  # type: ignore[assignment]
        return rms_norm(hidden_states, weight, style.eps, offset=style.offset, rounds=style.rounds, residual=residual)


def norm_style(part: nn.Module) -> _NormStyle | None:
    """How a module normalises, if it is an RMS norm over its last dimension with a weight."""
    weight, eps = getattr(part, "weight", None), getattr(part, "variance_epsilon", getattr(part, "eps", None))
    if not isinstance(weight, torch.Tensor) or weight.dim() != 1 or not isinstance(eps, float) or part._modules:
        return None
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    scale = torch.linspace(-0.5, 1.5, 64).bfloat16()
    twin = stand_in(part)
    twin._parameters["weight"] = nn.Parameter(scale, requires_grad=False)
    try:
        with torch.no_grad():
            found = type(part).forward(twin, x)
    except Exception:  # foreign code: whatever it raises, it is another kind of module
        return None
    unit = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    formulas = {
        _NormStyle(eps, offset=False, rounds=True): scale * unit.bfloat16(),
        _NormStyle(eps, offset=False, rounds=False): (scale.float() * unit).bfloat16(),
        _NormStyle(eps, offset=True, rounds=False): ((1.0 + scale.float()) * unit).bfloat16(),
    }
    for style, expected in formulas.items():
        if isinstance(found, torch.Tensor) and torch.equal(found, expected):
            return style
    return None


# Projections


class _Siblings:
    """Linear layers of one input, computed at once by a matrix that lies over all of theirs."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, sizes: list[int]) -> None:
        self._weight = weight
        self._bias = bias
        self._sizes = sizes
        self._input: torch.Tensor | None = None
        self._parts: list[torch.Tensor] = []

    def forward_of(self, index: int) -> Callable[[torch.Tensor], torch.Tensor]:
        return self._first if index == 0 else lambda x: self._later(index, x)

    def _first(self, x: torch.Tensor) -> torch.Tensor:
        self._input = x
        self._parts = list(F.linear(x, self._weight, self._bias).split(self._sizes, dim=-1))  # type: ignore[no-untyped-call]
        return self._parts[0]

    def _later(self, index: int, x: torch.Tensor) -> torch.Tensor:
        if x is not self._input:
            raise RuntimeError("the model computes the projections of one layer from different inputs")
        part = self._parts[index]
        if index == len(self._sizes) - 1:
            self._input, self._parts = None, []
        return part


def _fuse_siblings(
    part: nn.Module, children: tuple[str, ...], name: str, layout: ImageLayout, weights: WeightRange
) -> bool:
    linears = [linear for child in children if type(linear := getattr(part, child, None)) is nn.Linear]
    if len(linears) != len(children):
        return False
    over = _over(linears, [f"{name}.{child}" for child in children], layout, weights)
    if over is None:
        return False
    siblings = _Siblings(*over, [linear.out_features for linear in linears])
    for index, linear in enumerate(linears):
        linear.forward = siblings.forward_of(index)  # type: ignore[assignment, method-assign]
    return True


def _over(
    linears: list[nn.Linear], names: list[str], layout: ImageLayout, weights: WeightRange
) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """One weight and one bias over those of several linear layers, where they lie one behind the other."""
    biased = {linear.bias is not None for linear in linears}
    if len(biased) != 1:
        return None
    kinds = ["weight", "bias"] if biased.pop() else ["weight"]
    views = []
    for kind in kinds:
        place = fused([layout.place(f"{name}.{kind}") for name in names])
        if place is None:
            return None
        views.append(weights.tensor(place.dtype, place.shape, place.offset))
    return views[0], views[1] if len(views) > 1 else None


def _fuse_gated(part: nn.Module, name: str, layout: ImageLayout, weights: WeightRange) -> bool:
    """down(act(gate(x)) * up(x)), with gate and up apart or already one."""
    down = getattr(part, "down_proj", None)
    if type(down) is not nn.Linear:
        return False
    if type(getattr(part, "gate_up_proj", None)) is nn.Linear:
        activation = gated_activation(part, {"gate_up_proj": nn.Linear(8, 24), "down_proj": nn.Linear(12, 8)})
        both: nn.Linear = part.gate_up_proj  # type: ignore[assignment]
        over: tuple[torch.Tensor, torch.Tensor | None] | None = (both.weight, both.bias)
    elif all(type(getattr(part, child, None)) is nn.Linear for child in ("gate_proj", "up_proj")):
        activation = gated_activation(
            part, {"gate_proj": nn.Linear(8, 12), "up_proj": nn.Linear(8, 12), "down_proj": nn.Linear(12, 8)}
        )
        pair: list[nn.Linear] = [part.gate_proj, part.up_proj]  # type: ignore[list-item]
        over = _over(pair, [f"{name}.gate_proj", f"{name}.up_proj"], layout, weights)
    else:
        return False
    if activation is None or over is None:
        return False
    weight, bias = over

    def forward(x: torch.Tensor) -> torch.Tensor:
        return F.linear(gate(F.linear(x, weight, bias), activation), down.weight, down.bias)

    part.forward = forward
    return True


def gated_activation(part: nn.Module, children: dict[str, nn.Linear]) -> str | None:
    """Which activation a gated feed-forward uses, if it is one; `children` stand in for its projections."""
    twin = stand_in(part)
    twin._modules.update(children)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        try:
            found = type(part).forward(twin, x)
        except Exception:  # foreign code: whatever it raises, it is another kind of module
            return None
        if not isinstance(found, torch.Tensor):
            return None
        if "gate_up_proj" in children:
            gated, up = children["gate_up_proj"](x).chunk(2, dim=-1)
        else:
            gated, up = children["gate_proj"](x), children["up_proj"](x)
        for activation, compute in _ACTIVATIONS.items():
            if torch.allclose(found, children["down_proj"](compute(gated) * up), atol=1e-6, rtol=1e-5):
                return activation
    return None


def write_logits(head: nn.Module, place: Callable[[int], torch.Tensor]) -> None:
    """Has an output projection write its logits, which are large, to where they are wanted.

    `place` gives that, (rows, vocabulary) of the weight's type, for so many rows. Another kind of head stays as it is.
    """
    if type(head) is not nn.Linear or head.bias is not None:
        return

    def forward(hidden_states: torch.Tensor) -> torch.Tensor:
        rows = hidden_states.flatten(0, -2)
        into = place(len(rows))
        torch.mm(rows, head.weight.t(), out=into)
        return into.view(*hidden_states.shape[:-1], -1)

    head.forward = forward


# Layers


def _chain(module: nn.Module, norms: dict[nn.Module, _NormStyle]) -> int:
    """Has each layer's residual sums made by the norms behind them; returns how many sums."""
    sums = 0
    for layers, last in _stacks(module):
        usable = all(
            prenorm_layer(layer) and layer.input_layernorm in norms and layer.post_attention_layernorm in norms
            for layer in layers
        )
        if not usable or last not in norms:
            continue
        following = [layer.input_layernorm for layer in layers[1:]] + [last]
        for layer, behind in zip(layers, following, strict=True):
            layer.forward = MethodType(_prenorm_forward(cast(Any, behind).forward), layer)
            sums += 2
    return sums


def _stacks(module: nn.Module) -> Iterator[tuple[list[nn.Module], nn.Module | None]]:
    """Stacks of layers, each with the norm that follows it in the module that holds both."""
    for part in module.modules():
        layers, norm = getattr(part, "layers", None), getattr(part, "norm", None)
        if isinstance(layers, nn.ModuleList) and isinstance(norm, nn.Module):
            yield list(layers), norm


def _prenorm_forward(behind: _NormForward) -> Callable[..., torch.Tensor]:
    def forward(self: Any, hidden_states: torch.Tensor, **facts: Any) -> torch.Tensor:
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **facts)
        normed = self.post_attention_layernorm.forward.add(attended, hidden_states)
        return behind.ahead(self.mlp(normed), hidden_states)

    return forward


class _Tanh(nn.Module):
    def forward(self, hidden_states: torch.Tensor, **facts: Any) -> tuple[torch.Tensor, None]:
        return hidden_states.tanh(), None


class _Apply(nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.forward = function


def prenorm_layer(layer: nn.Module) -> bool:
    """Whether a layer computes h += attention(norm(h)); h += mlp(norm(h)), and returns h."""
    names = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
    if not all(isinstance(getattr(layer, name, None), nn.Module) for name in names):
        return False
    twin = stand_in(layer).eval()
    twin._modules.update(
        input_layernorm=_Apply(lambda x: x * 0.5 + 1),
        self_attn=_Tanh(),
        post_attention_layernorm=_Apply(lambda x: x * 2 - 0.5),
        mlp=_Apply(torch.sin),
    )
    x = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad():
            found = type(layer).forward(twin, x)
    except Exception:  # foreign code: it wants other arguments, or an mlp of two results
        return False
    middle = x + (x * 0.5 + 1).tanh()
    expected = middle + (middle * 2 - 0.5).sin()
    return isinstance(found, torch.Tensor) and torch.allclose(found, expected)
