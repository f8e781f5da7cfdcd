"""Architectures that the engine would compute wrongly are refused, with the reason; what inspecting says and leaves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf

from services.gpu_agent.engine.model import UnsupportedArchitecture, inspect_model

SMALL = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "head_dim": 8}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (tf.MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2), "recurrent state"),
        (tf.BertConfig(**SMALL, num_attention_heads=4), "not causal|logits of chosen tokens"),
        (tf.FalconConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2, num_attention_heads=4), "cannot build"),
        (tf.T5Config(), "cannot build"),
        (tf.LlamaConfig(**SMALL, **HEADS, is_causal=False), "is_causal"),
        (tf.DogeConfig(**SMALL, num_attention_heads=4), "attention mask of its own"),
        (tf.BartConfig(), "takes no positions from outside"),
        (tf.DeepseekV3Config(), "keys and values must be alike"),
        (tf.Gemma4TextConfig(), r"different KV heads: \[\(4, 256\), \(4, 512\)\]"),
        (tf.Qwen3NextConfig(), "recurrent state"),
        (tf.AriaTextConfig(), "depends on the numbers"),
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
