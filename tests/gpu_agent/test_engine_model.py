"""Which architectures are served: those that compute what transformers does, and no other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from transformers import AutoModelForCausalLM, PreTrainedModel

from services.gpu_agent.engine.attention import LayerAttention
from services.gpu_agent.engine.model import UnsupportedArchitecture, inspect_attention, inspect_model
from tests.gpu_agent.serving import arena, generate, greedy, prompt, run, serve, tokens_of

SMALL = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "head_dim": 8}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# One of each kind: learned positions and tied weights; rotary embeddings on a part of the head; fused projections;
# layers with and without a window, each kind with its own frequencies, and scaled embeddings; scaled frequencies;
# scaled logits.
SERVED: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: tf.GPT2Config(vocab_size=128, n_embd=32, n_layer=3, n_head=4, n_positions=128),
    "stablelm": lambda: tf.StableLmConfig(**SMALL, num_attention_heads=4, num_key_value_heads=2),
    "phi3": lambda: tf.Phi3Config(**SMALL, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0),
    "gemma3": lambda: tf.Gemma3TextConfig(
        **SMALL,
        **HEADS,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "llama3_rope": lambda: tf.LlamaConfig(**SMALL, **HEADS, rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True),
    "gemma2": lambda: tf.Gemma2Config(**SMALL, **HEADS, sliding_window=6, attn_logit_softcapping=2.0),
    "gpt_oss": lambda: tf.GptOssConfig(**SMALL, **HEADS, sliding_window=6, num_local_experts=4, num_experts_per_tok=2),
    "granite": lambda: tf.GraniteConfig(**SMALL, num_attention_heads=4, num_key_value_heads=2, logits_scaling=3.0),
}


def save(config: Any) -> Callable[[Path], PreTrainedModel]:
    def make(folder: Path) -> PreTrainedModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() > 1:
                        parameter.normal_(std=0.2)
        model.eval().save_pretrained(folder)
        return model

    return make


@pytest.mark.parametrize("kind", SERVED)
def test_other_architectures_give_the_same_tokens(kind: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    memory = arena(30)
    served, reference = serve(memory, save(SERVED[kind]()), tmp_path, kind)
    served.load()
    instance = served.instance(token_budget=9, max_batch=4, context_tokens=128)
    prompts = {f"p{n}": prompt(n, vocabulary=128) for n in (2, 13, 30)}
    for name, ids in prompts.items():
        instance.add(greedy(name, ids, 16))
    outputs = run(instance)
    assert {n: tokens_of(outputs, n) for n in prompts} == {n: generate(reference, p, 16) for n, p in prompts.items()}
    memory.close()


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (tf.MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2), "recurrent state"),
        (tf.BertConfig(**SMALL, num_attention_heads=4), "not causal|logits of chosen tokens"),
        (tf.FalconConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2, num_attention_heads=4), "cannot build"),
        (tf.T5Config(), "cannot build"),
        (tf.LlamaConfig(**SMALL, **HEADS, is_causal=False), "is_causal"),
        (tf.Lfm2Config(**SMALL, layer_types=["conv", "full_attention", "conv"]), r"kinds \['conv'\]"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_what_would_be_computed_wrongly_is_refused(config: Any, reason: str) -> None:
    with pytest.raises(UnsupportedArchitecture, match=reason):
        inspect_model(config, torch.float32)


def test_a_window_that_only_the_mask_knows_is_refused() -> None:
    """Llama's class ignores sliding windows: this config says what the class does not do."""
    config = tf.LlamaConfig(**SMALL, **HEADS, sliding_window=4)
    with pytest.raises(UnsupportedArchitecture, match="sliding window"):
        inspect_model(config, torch.float32)


def test_facts_of_the_kv_cache() -> None:
    spec = inspect_model(tf.LlamaConfig(**SMALL, **HEADS), torch.bfloat16)
    assert (spec.layers, spec.kv_heads, spec.head_dim, spec.dtype) == (3, 2, 8, torch.bfloat16)
    assert spec.bytes_per_token == 2 * 3 * 2 * 8 * 2
    assert spec.block_bytes == 16 * spec.bytes_per_token


def test_facts_of_the_attention() -> None:
    gemma2 = tf.Gemma2Config(**SMALL, **HEADS, sliding_window=6, attn_logit_softcapping=30.0, query_pre_attn_scalar=16)
    sliding, full, _ = inspect_attention(gemma2)
    assert sliding == LayerAttention(0, 4, 2, 8, window=6, softcap=30.0, sinks=False, scaling=0.25)
    assert full == LayerAttention(1, 4, 2, 8, window=None, softcap=30.0, sinks=False, scaling=0.25)
    first = inspect_attention(tf.GptOssConfig(**SMALL, **HEADS, sliding_window=6))[0]
    assert first == LayerAttention(0, 4, 2, 8, window=6, softcap=None, sinks=True, scaling=8**-0.5)


def test_inspecting_does_not_change_the_config() -> None:
    config = tf.LlamaConfig(**SMALL, **HEADS)
    before = config.to_dict(), config._attn_implementation
    inspect_model(config, torch.bfloat16)
    assert (config.to_dict(), config._attn_implementation) == before


def test_inspecting_leaves_the_default_dtype_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """It belongs to the whole process, so to the engine's thread too."""

    def refuse(dtype: torch.dtype) -> None:
        raise AssertionError(f"the default dtype was set to {dtype}")

    monkeypatch.setattr(torch, "set_default_dtype", refuse)
    config = tf.LlamaConfig(**SMALL, **HEADS, dtype="bfloat16")
    assert inspect_model(config, torch.bfloat16).dtype == torch.bfloat16
