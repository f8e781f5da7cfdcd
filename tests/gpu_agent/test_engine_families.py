"""What model families bring along: scaled positions, biases, ties, experts, and their places in an image."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from services.gpu_agent.engine.attention import LayerAttention, PagedStep, Span, _attention, _sees, attending
from services.gpu_agent.engine.kv_tensors import KvTensors
from services.gpu_agent.engine.model import UnsupportedArchitecture, build_model, inspect_attention, inspect_model
from services.gpu_agent.weights.building import prepare_image
from services.gpu_agent.weights.checkpoint import Checkpoint
from services.gpu_agent.weights.errors import CheckpointError
from services.gpu_agent.weights.image import Image, open_image
from services.gpu_agent.weights.layout import fused, plan_layout
from services.gpu_agent.weights.loader import load
from tests.gpu_agent.checkpoints import CONFIGS, FAMILIES, HIDDEN, save
from tests.gpu_agent.serving import arena, generate, greedy, prompt, run, serve, tokens_of

torch.set_num_threads(1)

llama = CONFIGS["llama"]
THETA = {"rope_theta": 10000.0}
OTHER = {
    "vocab_size": 512,
    "hidden_size": HIDDEN,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


def scaled(rope_type: str, **parameters: Any) -> Callable[[], Any]:
    return lambda: llama(rope_parameters={"rope_type": rope_type, **THETA, **parameters})


def longrope(family: str = "phi3") -> Any:
    """Frequencies of their own for contexts up to 64 tokens, and others beyond."""
    return CONFIGS[family](
        rope_parameters={
            "rope_type": "longrope",
            **THETA,
            "short_factor": [1.0 + 0.1 * i for i in range(8)],
            "long_factor": [2.0 + 0.5 * i for i in range(8)],
        },
        original_max_position_embeddings=64,
    )


# What no family of CONFIGS has.
VARIANTS: dict[str, Callable[[], Any]] = {
    "linear rope": scaled("linear", factor=4.0),
    "dynamic rope": scaled("dynamic", factor=4.0),
    "llama3 rope": scaled(
        "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
    ),
    "yarn rope": scaled("yarn", factor=4.0, original_max_position_embeddings=64),
    "longrope": longrope,
    "biases": lambda: llama(attention_bias=True, mlp_bias=True),
    # Learned positions, and one projection for q, k and v with its columns and rows exchanged.
    "gpt2": lambda: tf.GPT2Config(vocab_size=512, n_embd=32, n_layer=3, n_head=4, n_positions=128),
    # Layer norms with biases, rotary embeddings on a part of the head.
    "stablelm": lambda: tf.StableLmConfig(**OTHER),
    # Scaled embeddings, residuals and logits.
    "granite": lambda: tf.GraniteConfig(**OTHER, embedding_multiplier=2.0, residual_multiplier=0.5, logits_scaling=3.0),
    # Experts that are one tensor on disk too, under other names than in the model.
    "granite_moe": lambda: tf.GraniteMoeConfig(**OTHER, **EXPERTS),
    # A shared expert beside the others.
    "qwen2_moe": lambda: tf.Qwen2MoeConfig(
        **OTHER, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32
    ),
    "olmoe": lambda: tf.OlmoeConfig(**OTHER, num_experts=4, num_experts_per_tok=2),
}


def assert_same_tokens(config: Any, folder: Path) -> None:
    """Prompts of different lengths, in chunks and in a batch, against generate."""
    memory = arena(50)
    served, reference = serve(memory, lambda target: save(config, target), folder, "model")
    served.load()
    # 30 + 30 tokens are within longrope's 64.
    instance = served.instance(token_budget=9, max_batch=4, context_tokens=64)
    prompts = {f"p{n}": prompt(n) for n in (2, 13, 30)}
    for name, ids in prompts.items():
        instance.add(greedy(name, ids, 30))
    outputs = run(instance)
    expected = {name: generate(reference, ids, 30) for name, ids in prompts.items()}
    assert {name: tokens_of(outputs, name) for name in prompts} == expected
    memory.close()


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_give_the_same_tokens(variant: str, tmp_path: Path) -> None:
    assert_same_tokens(VARIANTS[variant](), tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_tied_families_give_the_same_tokens(family: str, tmp_path: Path) -> None:
    """Untied they are tested in test_engine_identity."""
    assert_same_tokens(CONFIGS[family](tie_word_embeddings=True), tmp_path)


def test_the_variants_matter(tmp_path: Path) -> None:
    """Else the tests above would pass for an engine that ignored what makes a variant."""
    plain = save(llama(), tmp_path / "plain")
    expected = generate(plain, prompt(30), 30)
    for variant in ("linear rope", "llama3 rope", "yarn rope", "biases"):
        assert generate(save(VARIANTS[variant](), tmp_path / variant), prompt(30), 30) != expected, variant


def test_longrope_is_served_up_to_where_it_changes() -> None:
    config = longrope()
    with pytest.raises(
        UnsupportedArchitecture, match=r"exceeds 64 tokens; set limits.max_context_tokens to at most 64"
    ):
        inspect_model(config, torch.float32)
    with pytest.raises(UnsupportedArchitecture, match="longrope"):
        inspect_model(config, torch.float32, context_tokens=65)
    assert inspect_model(config, torch.float32, context_tokens=64).layers == 2


def test_facts_of_the_attention() -> None:
    sliding, full, last = inspect_attention(CONFIGS["gemma2"]())
    assert sliding == LayerAttention(0, 4, 2, 16, window=8, softcap=2.0, sinks=False, scaling=24**-0.5)
    assert full == LayerAttention(1, 4, 2, 16, window=None, softcap=2.0, sinks=False, scaling=24**-0.5)
    assert (last.layer, last.window) == (2, 8)
    first, second = inspect_attention(CONFIGS["gpt_oss"]())
    assert first == LayerAttention(0, 4, 2, 16, window=8, softcap=None, sinks=True, scaling=0.25)
    assert (second.window, second.sinks) == (None, True)
    assert inspect_attention(llama())[0] == LayerAttention(0, 4, 2, 16, None, None, sinks=False, scaling=0.25)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "phi3"])  # whose projections are one already
def test_projections_that_read_the_same_can_be_fused(family: str, tmp_path: Path) -> None:
    memory = arena(50)
    served, reference = serve(memory, FAMILIES[family], tmp_path, family)
    served.load()
    layout = served.image.layout
    groups = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["mlp.gate_proj", "mlp.up_proj"]]
    state = reference.state_dict()
    for group in groups:
        names = [f"model.layers.0.{part}.weight" for part in group]
        if not all(name in state for name in names):
            assert family in ("gpt_oss", "mixtral")  # experts in place of an MLP
            continue
        place = fused([layout.place(name) for name in names])
        assert place is not None
        whole = served.weights.tensor(place.dtype, place.shape, place.offset)
        assert torch.equal(whole, torch.cat([state[name] for name in names]))
    memory.close()


def test_experts_run_as_one_grouped_product(tmp_path: Path) -> None:
    """A loop over the experts that are hit would wait for the GPU and could not be captured."""
    memory = arena(50)
    served, _ = serve(memory, FAMILIES["qwen3_moe"], tmp_path, "qwen3_moe")
    assert served.model.module.config._experts_implementation == "grouped_mm"
    memory.close()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_computes_what_transformers_does(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """The same tensors in the same dtypes: what the class keeps in float32 (GPT-OSS's norms in float16) included."""
    FAMILIES[family](tmp_path / "m")
    checkpoint = Checkpoint.open(tmp_path / "m", [tmp_path])
    page_bytes = 1 << 16
    layout = plan_layout(checkpoint.shapes, checkpoint.aliases, dtype, page_bytes, checkpoint.delicate[dtype])
    reference: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", dtype=dtype, attn_implementation="eager"
    )
    assert {name: tensor.dtype for name, tensor in reference.named_parameters()} == {
        place.name: place.dtype for place in layout.tensors
    }
    assert family != "gpt_oss" or (torch.float32 in {p.dtype for p in layout.tensors}) == (dtype is torch.float16)
    memory = arena(layout.num_pages + 2, page_bytes)
    weights = memory.add_weights("m", layout.total_bytes)
    model = build_model(checkpoint.model_config, layout, weights)
    with open_image(prepare_image(checkpoint, layout, tmp_path / "images", lambda done, total: None)) as image:
        load(image, weights, cancel=threading.Event(), progress=lambda _: None)
    ids = prompt(20)
    spec = model.kv_spec
    slots = spec.slots_per_page(page_bytes)
    kv = KvTensors(memory.kv_view(dtype), page_bytes, slots, spec)
    (page,) = memory.take_kv("i", 1)
    blocks = [page * slots + slot for slot in range(spec.blocks_for(len(ids)))]
    assert len(blocks) <= slots
    with torch.inference_mode():
        with attending(PagedStep(kv, spec.block_tokens, [Span(blocks, 0, len(ids))])):
            positions = torch.arange(len(ids))[None]
            got = model.module(input_ids=torch.tensor([ids]), position_ids=positions, use_cache=False).logits
        expected = reference(torch.tensor([ids])).logits
    tolerance = 0.02 if dtype is torch.float16 else 0.15  # logits are about 4
    torch.testing.assert_close(got, expected, rtol=0.0, atol=tolerance)
    memory.close()


class PlainRange:
    """A weight range over plain memory of any device, with an image in it."""

    def __init__(self, image: Image, device: str) -> None:
        self._memory = torch.empty(image.layout.total_bytes, dtype=torch.uint8)
        for index, page in enumerate(self._memory.split(image.layout.page_bytes)):
            image.read_page(index, page)
        self._memory = self._memory.to(device)

    def tensor(self, dtype: torch.dtype, shape: tuple[int, ...], offset: int) -> torch.Tensor:
        return self._memory[offset : offset + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)


def attend(
    layer: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    window: int | None,
    extra: dict[str, Any],
) -> torch.Tensor:
    """Attention of one sequence to itself, on any device."""
    positions = torch.arange(query.shape[2], device=query.device)
    mask = _sees(positions[:, None], positions[None, :], window)
    sinks = extra.get("s_aux")
    sinks = None if sinks is None else sinks.view(1, -1, 1, 1)
    return _attention(query, key, value, mask, scaling, extra.get("softcap"), sinks).transpose(1, 2)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_built_model_is_wholly_on_its_weights_device_and_can_be_captured(
    family: str, device: str, tmp_path: Path
) -> None:
    """With logits of chosen tokens only, as the engine asks for them."""
    FAMILIES[family](tmp_path / "m")
    checkpoint = Checkpoint.open(tmp_path / "m", [tmp_path])
    layout = plan_layout(checkpoint.shapes, checkpoint.aliases, torch.bfloat16, 1 << 16)
    with open_image(prepare_image(checkpoint, layout, tmp_path / "images", lambda done, total: None)) as image:
        model = build_model(checkpoint.model_config, layout, PlainRange(image, device))  # type: ignore[arg-type]
    tensors = [*model.module.parameters(), *model.module.buffers()]
    assert {tensor.device.type for tensor in tensors} == {device}

    ids = torch.tensor([prompt(24)], device=device)
    positions = torch.arange(24, device=device)[None]
    rows = torch.tensor([0, 7, 20, 23], device=device)

    def forward() -> torch.Tensor:
        logits: torch.Tensor = model.module(
            input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=rows
        ).logits
        return logits

    with torch.inference_mode(), attending(attend):
        got = forward()
        if device == "cuda":
            expected_first = got.clone()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                got = forward()
            graph.replay()
            assert torch.equal(got, expected_first)
            ids.copy_(torch.tensor([prompt(24, seed=1)]))
            graph.replay()
        reference = AutoModelForCausalLM.from_pretrained(
            tmp_path / "m", dtype=torch.bfloat16, attn_implementation="eager"
        ).to(device)
        expected = reference(ids).logits[:, rows]
    # A router that is nearly undecided may choose another expert after the least difference, for one token or another.
    errors = (got - expected).abs().amax(dim=-1).flatten()
    assert errors.median() < 0.15  # logits are about 4


def test_experts_that_do_not_fit_the_config_are_refused(tmp_path: Path) -> None:
    FAMILIES["qwen3_moe"](tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    tensors = load_file(file)
    gate = "model.layers.1.mlp.experts.{}.gate_proj.weight"
    down = "model.layers.1.mlp.experts.11.down_proj.weight"

    def refused(changed: dict[str, torch.Tensor], reason: str) -> None:
        save_file(changed, file)
        with pytest.raises(CheckpointError, match=reason) as caught:
            Checkpoint.open(tmp_path / "m", [tmp_path])
        assert "\n" not in caught.value.message

    without = {name: tensor for name, tensor in tensors.items() if name != gate.format(3)}
    refused(without, r"experts.gate_up_proj cannot be put together from the 23 tensors stored for it")
    refused({**tensors, gate.format(3): torch.zeros(32, 63)}, "rows differ in length")
    fewer = {name: tensor for name, tensor in tensors.items() if name != down}
    refused(fewer, r"experts.down_proj has shape \[11, 64, 32\] and not \[12, 64, 32\]")
