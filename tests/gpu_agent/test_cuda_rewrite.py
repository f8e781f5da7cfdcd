"""What is replaced in a transformers model, what is left alone, and that the logits stay transformers' own.

The GPU's whole forward pass (packing, rewritten model, kernels) runs here too: in Triton's interpreter, uncaptured.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from services.gpu_agent.engine.cuda import attention
from services.gpu_agent.engine.cuda import model as model_module
from services.gpu_agent.engine.cuda import pack as pack_module
from services.gpu_agent.engine.cuda.attention import TILE
from services.gpu_agent.engine.cuda.attention import Workspace as Partials
from services.gpu_agent.engine.cuda.model import CudaModel
from services.gpu_agent.engine.cuda.pack import pack
from services.gpu_agent.engine.cuda.rehearsal import rehearse_choice
from services.gpu_agent.engine.cuda.rewrite import gated_activation, norm_style, prenorm_layer
from services.gpu_agent.engine.cuda.rotary import (
    PendingRope,
    RotaryTable,
    replace_tables,
    rotary_tables,
    rotation_width,
)
from services.gpu_agent.engine.cuda.workspace import Workspace
from services.gpu_agent.engine.model import _fix_frequencies, build_model
from services.gpu_agent.engine.sampling_batch import Row
from services.gpu_agent.engine.sampling_params import SamplingParams
from services.gpu_agent.engine.step import Part
from services.gpu_agent.weights.loader import load
from tests.gpu_agent.checkpoints import CONFIGS, FAMILIES
from tests.gpu_agent.serving import arena, prompt, serve_files

interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="is for Triton's interpreter, which is used where there is no GPU"
)
ROUNDED, UNROUNDED, OFFSET = (False, True), (False, False), (True, False)  # offset, rounds

# Of each family: how its norms compute; which MLPs are gated and by what; the width of its rotary tables, where queries
# and keys are turned whole; whether its layers are h += attention(norm(h)); h += mlp(norm(h)).
EXPECTED: dict[str, tuple[tuple[bool, bool], str | None, float | None, bool]] = {
    "llama": (ROUNDED, "silu", 1.0, True),
    "mistral": (ROUNDED, "silu", 1.0, True),
    "qwen2": (ROUNDED, "silu", 1.0, True),
    "qwen3": (ROUNDED, "silu", 1.0, True),
    "gemma2": (OFFSET, "gelu_tanh", 1.0, False),
    "gemma3": (OFFSET, "gelu_tanh", 1.0, False),
    "phi3": (ROUNDED, "silu", None, True),
    "olmo2": (UNROUNDED, "silu", 1.0, False),
    "gpt_oss": (UNROUNDED, None, 0.5, False),
    "qwen3_moe": (ROUNDED, "silu", 1.0, True),
    "mixtral": (ROUNDED, None, 1.0, True),
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def on_meta(family: str) -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(CONFIGS[family]())
    return model.eval()


def stand_ins(mlp: nn.Module) -> dict[str, nn.Linear] | None:
    """Projections as `rewrite` gives them to a gated feed-forward's own forward; None where it is none."""
    names = set(mlp._modules)
    if {"gate_up_proj", "down_proj"} <= names:
        return {"gate_up_proj": nn.Linear(8, 24), "down_proj": nn.Linear(12, 8)}
    if {"gate_proj", "up_proj", "down_proj"} <= names:
        return {"gate_proj": nn.Linear(8, 12), "up_proj": nn.Linear(8, 12), "down_proj": nn.Linear(12, 8)}
    return None


@pytest.mark.parametrize("family", CONFIGS)
def test_parts_are_recognised(family: str) -> None:
    """Each of a family's norms, feed-forwards and layers, and no other module; all without their weights."""
    norm, gated, _, prenorm = EXPECTED[family]
    model = on_meta(family)
    for name, part in model.named_modules():
        style = norm_style(part)
        assert (style is not None) == name.endswith("norm"), name
        assert style is None or (style.offset, style.rounds) == norm
        assert style is None or style.eps == model.config.rms_norm_eps
        is_layer = name.rpartition(".")[0].endswith("layers")
        assert prenorm_layer(part) == (is_layer and prenorm), name
        children = stand_ins(part)
        if children is not None:
            assert gated_activation(part, children) == gated, name


# Norms


class Rms(nn.Module):
    """Root mean square normalisation as Llama's, with one thing changed."""

    def __init__(self, change: str = "", size: int = 32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.variance_epsilon = 1e-5
        self.change = change
        if change == "child":
            self.inner = nn.Identity()
        if change == "matrix":
            self.weight = nn.Parameter(torch.zeros(size, size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        unit = x.float()
        if self.change == "centred":
            unit = unit - unit.mean(-1, keepdim=True)
        power = unit.abs() if self.change == "mean" else unit.pow(2)
        axis = 0 if self.change == "axis" else -1
        unit = unit * torch.rsqrt(power.mean(axis, keepdim=True) + self.variance_epsilon)
        if self.change == "offset, rounded":
            return (1 + self.weight) * unit.to(x.dtype)
        out = self.weight * unit.to(x.dtype)
        return out * 1.01 if self.change == "scaled" else out


def test_norms_of_others_are_told_by_what_they_compute() -> None:
    style = norm_style(Rms())
    assert style is not None
    assert (style.eps, style.offset, style.rounds) == (1e-5, False, True)


@pytest.mark.parametrize(
    "other",
    [
        *(Rms(change) for change in ("centred", "mean", "axis", "offset, rounded", "scaled", "child", "matrix")),
        nn.LayerNorm(64),
        nn.LayerNorm(32, bias=False),
        nn.Linear(64, 64, bias=False),
        nn.BatchNorm1d(64),
        nn.BatchNorm2d(64),
        nn.GroupNorm(4, 64),
        nn.PReLU(64),
        nn.Identity(),
    ],
    ids=lambda module: getattr(module, "change", type(module).__name__),
)
def test_what_is_no_such_norm_is_left_alone(other: nn.Module) -> None:
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    assert norm_style(other.eval()) is None
    after = other.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


# Feed-forwards


class Mlp(nn.Module):
    """A gated feed-forward, its formula given."""

    def __init__(self, formula: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(4, 6), nn.Linear(4, 6)
        self.down_proj = nn.Linear(6, 4)
        self.formula = formula

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.formula(self, x)


FORMULAS: dict[str, tuple[Callable[[Any, torch.Tensor], torch.Tensor], str | None]] = {
    "silu": (lambda m, x: m.down_proj(m.up_proj(x) * F.silu(m.gate_proj(x))), "silu"),
    "tanh": (lambda m, x: m.down_proj(F.gelu(m.gate_proj(x), approximate="tanh") * m.up_proj(x)), "gelu_tanh"),
    "exact gelu": (lambda m, x: m.down_proj(F.gelu(m.gate_proj(x)) * m.up_proj(x)), None),
    "quick gelu": (lambda m, x: m.down_proj(m.gate_proj(x) * (1.702 * m.gate_proj(x)).sigmoid() * m.up_proj(x)), None),
    "relu": (lambda m, x: m.down_proj(F.relu(m.gate_proj(x)) * m.up_proj(x)), None),
    "other order": (lambda m, x: m.down_proj(F.silu(m.up_proj(x)) * m.gate_proj(x)), None),
    "clamped": (lambda m, x: m.down_proj(F.silu(m.gate_proj(x)).clamp(max=0.1) * m.up_proj(x)), None),
    "one more": (lambda m, x: m.down_proj(F.silu(m.gate_proj(x)) * (m.up_proj(x) + 1)), None),
    "scaled": (lambda m, x: m.down_proj(F.silu(m.gate_proj(x)) * m.up_proj(x)) * 0.9, None),
    "residual": (lambda m, x: x + m.down_proj(F.silu(m.gate_proj(x)) * m.up_proj(x)), None),
    "a pair": (lambda m, x: (m.down_proj(F.silu(m.gate_proj(x)) * m.up_proj(x)), None), None),  # type: ignore[dict-item, return-value]
}


@pytest.mark.parametrize("formula", FORMULAS)
def test_a_gated_feed_forward_is_told_by_what_it_computes(formula: str) -> None:
    """However the stand-ins' random weights fall."""
    compute, expected = FORMULAS[formula]
    mlp = Mlp(compute)
    for seed in range(40):
        torch.manual_seed(seed)
        assert gated_activation(mlp, stand_ins(mlp) or {}) == expected
    assert mlp.gate_proj.in_features == 4  # its own are untouched


# Rotary embeddings


def rotated(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As most families do it."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)

    def turned(x: torch.Tensor) -> torch.Tensor:
        low, high = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-high, low), dim=-1) * sin

    return turned(q), turned(k)


def interleaved(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
    def turned(x: torch.Tensor) -> torch.Tensor:
        c, s = (t[..., : x.shape[-1] // 2].unsqueeze(1) for t in (cos, sin))
        even, odd = x[..., ::2], x[..., 1::2]
        return torch.stack((even * c - odd * s, odd * c + even * s), dim=-1).flatten(-2)

    return turned(q), turned(k)


@pytest.mark.parametrize("family", CONFIGS)
def test_rotary_embeddings_of_families(family: str) -> None:
    model = on_meta(family)
    part = next(part for name, part in model.named_modules() if name.endswith("self_attn"))
    apply = type(part).forward.__globals__["apply_rotary_pos_emb"]
    expected = EXPECTED[family][2]
    # Phi-3's turns whole heads where the tables are whole; that they are not is in its config.
    assert rotation_width(apply) == (1.0 if family == "phi3" else expected)


@pytest.mark.parametrize(
    ("apply", "width"),
    [
        (rotated, 1.0),
        (interleaved, None),
        (lambda q, k, cos, sin: rotated(q, k, cos, -sin), None),  # backwards
        (lambda q, k, cos, sin: (rotated(q, k, cos, sin)[0], k), None),  # queries only
        (lambda q, k, cos, sin: rotated(q * 1.01, k, cos, sin), None),
        (lambda q, k, cos, sin, positions: rotated(q, k, cos, sin), None),  # wants more
        (lambda q, cos, sin: q, None),
        (lambda q, k, cos, sin: rotated(q, k, cos, sin)[0], None),
        (None, None),
    ],
)
def test_a_rotary_embedding_is_told_by_what_it_computes(apply: Any, width: float | None) -> None:
    assert rotation_width(apply) == width


def test_a_rotation_left_to_the_attention_is_taken_once() -> None:
    q, k, cos = torch.zeros(1, 2, 3, 8), torch.zeros(1, 1, 3, 8), torch.ones(1, 3, 8)
    rope = PendingRope()
    assert rope.take(q, k) is None  # a model that rotates by itself
    assert rope.defer(q, k, cos, cos * 2) == (q, k)
    taken = rope.take(q, k)
    assert taken is not None
    assert taken[0] is cos
    assert rope.take(q, k) is None


def test_queries_changed_behind_their_rotation_are_an_error() -> None:
    q, k, cos = torch.zeros(1, 2, 3, 8), torch.zeros(1, 1, 3, 8), torch.ones(1, 3, 8)
    for changed in ((q * 1, k), (q, k * 1)):
        rope = PendingRope()
        rope.defer(q, k, cos, cos)
        with pytest.raises(RuntimeError, match="behind their rotary embedding"):
            rope.take(*changed)


TABLE = RotaryTable("inv_freq", "attention_scaling", 2, rounds=True)


def rotary_modules(model: nn.Module) -> list[nn.Module]:
    return [part for name, part in model.named_modules() if name.endswith("rotary_emb")]


@pytest.mark.parametrize("family", CONFIGS)
def test_the_tables_of_families(family: str) -> None:
    """Found in each, and in no other module of it."""
    model = on_meta(family)
    rotary = rotary_modules(model)
    assert len(rotary) == 1
    assert [part for part in model.modules() if rotary_tables(part)] == rotary
    expected: dict[str | None, RotaryTable] = {None: TABLE}
    if family == "olmo2":
        expected = {None: replace(TABLE, rounds=False)}
    if family == "gpt_oss":
        expected = {None: replace(TABLE, copies=1)}
    if family == "gemma3":
        expected = {
            f"{kind}_attention": replace(
                TABLE, frequencies=f"{kind}_attention_inv_freq", scaling=f"{kind}_attention_attention_scaling"
            )
            for kind in ("full", "sliding")
        }
    assert rotary_tables(rotary[0]) == expected


@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3", "dynamic", "longrope"])
def test_tables_of_frequencies_that_change_with_the_length_are_left(kind: str) -> None:
    """Unless the model was bound, which keeps those of short sequences."""
    options: dict[str, dict[str, Any]] = {
        "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
        "longrope": {
            "long_factor": [2.0] * 8,
            "short_factor": [1.1] * 8,
            "original_max_position_embeddings": 64,
        },
    }
    parameters = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0, **options.get(kind, {})}
    with torch.device("cpu"):
        config = CONFIGS["llama"](rope_parameters=parameters, max_position_embeddings=1 << 17)
        model = AutoModelForCausalLM.from_config(config).eval()
    (part,) = rotary_modules(model)
    before = {name: buffer.clone() for name, buffer in part.named_buffers()}
    facts = {name: value for name, value in vars(part).items() if not name.startswith("_")}
    changes = kind in ("dynamic", "longrope")
    assert rotary_tables(part) == ({} if changes else {None: TABLE})
    _fix_frequencies(model)
    assert rotary_tables(part) == {None: TABLE}
    # The judged one was a copy.
    assert {name: value for name, value in vars(part).items() if not name.startswith("_")} == {
        **facts,
        **({"rope_type": "default"} if changes else {}),
    }
    assert dict(part.named_buffers()).keys() == before.keys()
    assert all(torch.equal(buffer, before[name]) for name, buffer in part.named_buffers())


class Rotary(nn.Module):
    """Tables as Llama's, with one thing changed."""

    def __init__(self, change: str = "") -> None:
        super().__init__()
        self.inv_freq = nn.Buffer(torch.tensor([1.0, 0.1, 0.01]))
        self.attention_scaling: Any = 0.5
        self.change = change
        if change == "no factor":
            del self.attention_scaling
        if change == "a learned factor":
            self.attention_scaling = nn.Parameter(torch.ones(()))
        if change == "learned frequencies":
            del self.inv_freq
            self.register_parameter("inv_freq", nn.Parameter(torch.ones(3)))

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        positions = position_ids[..., None].to(x.dtype if self.change == "half precision" else torch.float32)
        if self.change == "of the longest":
            positions = positions / position_ids.max()
        if self.change == "from 1":
            positions = positions + 1
        angles = positions * self.inv_freq
        if self.change == "half precision":
            angles = angles.to(x.dtype)
        if self.change == "interleaved":
            angles = angles.repeat_interleave(2, dim=-1)
        else:
            angles = torch.cat((angles,) * (3 if self.change == "three copies" else 2), dim=-1)
        scaling = 1.0 if self.change == "unscaled" else getattr(self, "attention_scaling", 1.0)
        cos, sin = angles.cos() * scaling, angles.sin() * scaling
        if self.change == "of the states":
            cos = cos * x.float().mean()
        if self.change == "backwards":
            sin = -sin
        if self.change == "float32":
            return cos, sin
        if self.change == "float16":
            return cos.half(), sin.half()
        if self.change == "one tensor":
            return torch.stack((cos, sin)).to(x.dtype)[0]
        return cos.to(x.dtype), sin.to(x.dtype)


OTHER_TABLES = [
    *("of the longest", "from 1", "half precision", "interleaved", "three copies", "unscaled", "of the states"),
    *("backwards", "float16", "one tensor", "no factor", "a learned factor", "learned frequencies"),
]


def test_tables_of_others_are_told_by_what_they_compute() -> None:
    assert rotary_tables(Rotary()) == {None: TABLE}
    assert rotary_tables(Rotary("float32")) == {None: replace(TABLE, rounds=False)}


@pytest.mark.parametrize("change", OTHER_TABLES)
def test_what_makes_no_such_tables_is_left_alone(change: str) -> None:
    part = Rotary(change)
    assert rotary_tables(part) == {}
    assert not replace_tables(part)
    assert "forward" not in vars(part)


@interpreted
@pytest.mark.parametrize("change", ["", "float32"])
@pytest.mark.parametrize("by_name", [False, True])
def test_replaced_tables_are_those_of_before(by_name: bool, change: str) -> None:
    """With the module's own factor and frequencies, as they are when it is called."""
    part, own = Rotary(change), Rotary(change)
    assert replace_tables(part)
    own.inv_freq[1] = part.inv_freq[1] = 0.3
    x, positions = torch.zeros(1, 4, 6, dtype=torch.float16), torch.tensor([[5, 0, 1, 300]], dtype=torch.int32)
    found = part(x, position_ids=positions) if by_name else part(x, positions)
    for table, expected in zip(found, own(x, positions), strict=True):
        torch.testing.assert_close(table, expected, rtol=1e-3 if table.dtype == torch.float16 else 0, atol=1e-6)
    # Of positions with other dimensions nothing was proved: the module's own forward computes.
    sections = positions.expand(3, 1, 4)
    assert all(torch.equal(a, b) for a, b in zip(part(x, sections), own(x, sections), strict=True))


@pytest.mark.parametrize(("width", "given"), [(1.0, 4), (0.5, 8), (0.5, 2)])
def test_a_part_of_the_head_turned_is_an_error(width: float, given: int) -> None:
    q, k, cos = torch.zeros(1, 2, 3, 8), torch.zeros(1, 1, 3, 8), torch.ones(1, 3, given)
    rope = PendingRope(width)
    rope.defer(q, k, cos, cos)
    with pytest.raises(RuntimeError, match="a part of each head"):
        rope.take(q, k)


# Layers


class Layer(nn.Module):
    """A decoder layer, its formula given."""

    def __init__(self, formula: Callable[[Any, torch.Tensor], Any]) -> None:
        super().__init__()
        self.input_layernorm = self.self_attn = self.post_attention_layernorm = self.mlp = nn.Identity()
        self.formula = formula

    def forward(self, hidden_states: torch.Tensor) -> Any:
        return self.formula(self, hidden_states)


def _usual(m: Any, h: torch.Tensor) -> torch.Tensor:
    h = h + m.self_attn(hidden_states=m.input_layernorm(h))[0]
    return cast(torch.Tensor, h + m.mlp(m.post_attention_layernorm(h)))


def _parallel(m: Any, h: torch.Tensor) -> torch.Tensor:
    return cast(torch.Tensor, h + m.self_attn(hidden_states=m.input_layernorm(h))[0] + m.mlp(m.input_layernorm(h)))


def _normed_behind(m: Any, h: torch.Tensor) -> torch.Tensor:
    h = h + m.post_attention_layernorm(m.self_attn(hidden_states=m.input_layernorm(h))[0])
    return cast(torch.Tensor, h + m.mlp(h))


def _normed_residual(m: Any, h: torch.Tensor) -> torch.Tensor:
    h = m.input_layernorm(h)
    h = h + m.self_attn(hidden_states=h)[0]
    return cast(torch.Tensor, h + m.mlp(m.post_attention_layernorm(h)))


@pytest.mark.parametrize(
    ("formula", "expected"),
    [
        (_usual, True),
        (_parallel, False),
        (_normed_behind, False),
        (_normed_residual, False),
        (lambda m, h: 1.5 * _usual(m, h), False),
        (lambda m, h: (_usual(m, h),), False),
        (lambda m, h: h, False),
    ],
    ids=["usual", "parallel", "normed behind", "normed residual", "scaled", "tuple", "nothing"],
)
def test_a_layer_is_told_by_what_it_computes(formula: Callable[[Any, torch.Tensor], Any], expected: bool) -> None:
    layer = Layer(formula)
    assert prenorm_layer(layer) == expected
    assert isinstance(layer.mlp, nn.Identity)


def test_a_layer_with_dropout_is_judged_as_it_serves() -> None:
    layer = Layer(lambda m, h: F.dropout(_usual(m, h), 0.5, m.training))
    assert prenorm_layer(layer)
    assert layer.training  # the judged one is a copy


# The whole forward pass


class Buffers:
    """A Workspace in host memory."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.facts = torch.zeros(1 << 13, dtype=torch.int32)
        self.partials = Partials(Partials.lanes_for(4, 8, 1), 64, "cpu")
        self._logits = torch.empty(4 * 512)
        self._outcome = torch.zeros(2 * 4, dtype=torch.int64)

    def logits(self, rows: int, vocabulary: int, dtype: torch.dtype) -> torch.Tensor:
        assert dtype == torch.float32
        return self._logits[: rows * vocabulary].view(rows, vocabulary)

    def outcome(self, rows: int) -> torch.Tensor:
        return self._outcome[: 2 * rows].view(2, rows)


# What is replaced in the tiny checkpoints: projections in one, rotary embeddings, feed-forwards, norms, residual sums;
# and in each the one module that makes cosines and sines. Biases of 32 numbers have gaps between them, so that qwen2's
# and gpt_oss's projections stay apart; see below.
REPLACED = {
    "llama": (2, 2, 2, 5, 4),
    "mistral": (4, 4, 4, 9, 8),
    "qwen2": (0, 2, 2, 5, 4),
    "qwen3": (3, 3, 3, 13, 6),
    "gemma2": (3, 3, 3, 13, 0),
    "gemma3": (3, 3, 3, 19, 0),
    "phi3": (0, 0, 2, 5, 4),
    "olmo2": (2, 2, 2, 9, 0),
    "gpt_oss": (0, 2, 0, 5, 0),
    "qwen3_moe": (2, 2, 1, 9, 4),
    "mixtral": (2, 2, 0, 5, 4),
}
KINDS = [
    "query, key and value projections in one",
    "rotary embedding with the KV write",
    "gated feed-forward",
    "normalisation",
    "residual sum with the normalisation behind it",
]


# Those whose layers all attend to everything before a token, and to nothing else.
WHOLE = ["llama", "qwen2", "qwen3", "phi3", "olmo2", "qwen3_moe", "mixtral"]


@interpreted
@pytest.mark.parametrize(("family", "wide"), [*((family, False) for family in CONFIGS), ("qwen2", True)])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of padding that is not used
def test_logits_are_those_of_transformers(
    family: str, wide: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt in chunks, mixed with decoding, and decoding alone, of the rewritten model over paged KV."""
    monkeypatch.setattr(attention, "_RESIDENT", 1)  # the interpreter's programs run one after another
    monkeypatch.setattr(model_module, "_CUBLASLT_TOKENS", ())  # torch's CPU build has none
    # A prompt of 40 tokens is long, and float32 as good as half precision for torch's attention on a CPU.
    monkeypatch.setattr(pack_module, "_MOST_ALONE", 32)
    monkeypatch.setattr(
        model_module, "takes_whole", lambda layers, _, *rest: attention.takes_whole(layers, torch.bfloat16, *rest)
    )
    make: Callable[..., PreTrainedModel] = FAMILIES[family]
    if wide:  # biases of 64 numbers, which lie one behind the other
        from tests.gpu_agent.checkpoints import save

        config = CONFIGS[family](hidden_size=128, num_attention_heads=4, num_key_value_heads=2)
        make = lambda folder, dtype: save(config, folder, dtype=dtype)  # noqa: E731
    memory = arena(60)
    files, weights, reference = serve_files(memory, make, tmp_path, family, torch.float32)
    assert load(files.image, weights, cancel=threading.Event(), progress=lambda _: None).complete
    bound = build_model(files.checkpoint.model_config, files.layout, weights)
    buffers = Buffers()
    model = CudaModel(bound, files.layout, weights, memory, cast(Workspace, buffers), max_batch=4, max_tokens=64)
    assert bool(model.ladder.whole) == (family in WHOLE)
    expected = (2, *REPLACED[family][1:]) if wide else REPLACED[family]
    assert tuple(model.rewritten.get(kind, 0) for kind in KINDS) == expected
    assert model.rewritten["cosines and sines"] == 1
    slots = bound.kv_spec.slots_per_page(memory.page_bytes)
    memory.kv_view(torch.float32).view(60, -1)[memory.take_kv("x", 1)[0]] = torch.nan
    model.last_tokens[:] = torch.arange(4)
    # In the middle of serving, where a graph could not be captured before.
    rehearse_choice(buffers.logits(1, bound.vocab_size, torch.float32), model.last_tokens)
    assert model.last_tokens.tolist() == [0, 1, 2, 3]
    blocks = [page * slots for page in memory.take_kv("x", 6)][::-1]
    first, second, third = prompt(13), prompt(24), prompt(3)

    def compute(*parts: Part) -> list[torch.Tensor]:
        shape = model.ladder.whole_for(parts) or model.ladder.fitting(parts)
        sampling = [part for part in parts if part.samples]
        pack(
            parts,
            [Row(SamplingParams(9, temperature=0.0), 0) for _ in sampling],
            shape,
            16,
            TILE,
            buffers.facts.numpy(),
        )
        model.run(shape, buffers.facts)
        logits = model.logits(shape)[: len(sampling)].clone()
        likeliest = logits.argmax(dim=-1).tolist()
        assert buffers.outcome(shape.rows)[:, : len(sampling)].tolist() == [likeliest, [1] * len(sampling)]
        assert model.last_tokens[[part.slot for part in sampling]].tolist() == likeliest
        return list(logits)

    def of(token_ids: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            logits: torch.Tensor = reference(torch.tensor([token_ids])).logits[0, -1]
        return logits

    one, two, three = blocks[:1], blocks[1:3], blocks[3:4]
    found = compute(Part(0, one, 0, first, True), Part(2, two, 0, second[:10], False))
    model.last_tokens[0] = 9  # what a sampler would have chosen
    found += compute(Part(0, one, 13, [], True), Part(2, two, 10, second[10:], True), Part(1, three, 0, third, True))
    model.last_tokens[2] = 11
    found += compute(Part(2, two, 24, [], True), Part(0, one, 14, [5], True))
    wanted = [of(first), of([*first, 9]), of(second), of(third), of([*second, 11]), of([*first, 9, 5])]
    if family in WHOLE:
        whole, four = prompt(40), blocks[3:6]
        found += compute(Part(3, four, 0, whole, True))
        model.last_tokens[3] = 7
        found += compute(Part(3, four, 40, [], True))
        wanted += [of(whole), of([*whole, 7])]
    if family == "llama" or family not in WHOLE:
        chunks = prompt(60)  # of which each is alone in its step
        for begin, end in ((0, 20), (20, 37), (37, 60)):
            found += compute(Part(1, blocks[:4], begin, chunks[begin:end], end == 60))
        wanted += [of(chunks)]
    for logits, reference_logits in zip(found, wanted, strict=True):
        torch.testing.assert_close(logits, reference_logits, rtol=1e-4, atol=1e-4)
    memory.close()
