"""Small random-weight checkpoints, made with transformers' own `save_pretrained`, for tests of weights and engine."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from transformers import AutoModelForCausalLM, PreTrainedModel

VOCAB = 512
HIDDEN = 64
SLIDING_WINDOW = 8

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ALTERNATING = ["sliding_attention", "full_attention"]


def _config(cls: type, layers: int, **options: Any) -> Callable[..., Any]:
    def make(**changes: Any) -> Any:
        return cls(**{**_COMMON, "num_hidden_layers": layers, **options, **changes})

    return make


# Every family that is served, by name; each takes changes to its config.
CONFIGS: dict[str, Callable[..., Any]] = {
    "llama": _config(tf.LlamaConfig, 2),
    # A sliding window in every layer; one KV head for all query heads.
    "mistral": _config(tf.MistralConfig, 4, num_key_value_heads=1, sliding_window=SLIDING_WINDOW),
    # Biases on q, k and v.
    "qwen2": _config(tf.Qwen2Config, 2),
    # Head size unequal to hidden / heads, norms on q and k.
    "qwen3": _config(tf.Qwen3Config, 3, intermediate_size=96, head_dim=32),
    # Soft-capped scores and logits, windows in every other layer, scaled embeddings, norms behind attention and MLP.
    "gemma2": _config(
        tf.Gemma2Config,
        3,
        head_dim=16,
        query_pre_attn_scalar=24,
        sliding_window=SLIDING_WINDOW,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=10.0,
        layer_types=[*_ALTERNATING, "sliding_attention"],
    ),
    # Frequencies of their own for layers with a window.
    "gemma3": _config(
        tf.Gemma3TextConfig,
        3,
        head_dim=16,
        sliding_window=SLIDING_WINDOW,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    ),
    # q, k, v in one projection, gate and up in another; rotary embeddings on a part of the head.
    "phi3": _config(
        tf.Phi3Config,
        2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    ),
    # Norms over all heads of q and k together, and none before attention and MLP.
    "olmo2": _config(tf.Olmo2Config, 2),
    # Attention sinks, windows in every other layer, biases everywhere, a mixture of experts, YaRN.
    "gpt_oss": _config(
        tf.GptOssConfig,
        2,
        head_dim=16,
        num_local_experts=5,
        num_experts_per_tok=2,
        sliding_window=SLIDING_WINDOW,
        layer_types=_ALTERNATING,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
        },
    ),
    # Experts, stored one by one under names that sort wrongly as text; a dense first layer.
    "qwen3_moe": _config(
        tf.Qwen3MoeConfig,
        2,
        head_dim=16,
        num_experts=12,
        num_experts_per_tok=3,
        moe_intermediate_size=32,
        mlp_only_layers=[0],
    ),
    # Experts under other names than in the model.
    "mixtral": _config(
        tf.MixtralConfig, 2, num_local_experts=4, num_experts_per_tok=2, sliding_window=None, head_dim=None
    ),
}

# Passed as `shard_size`, this splits any of the checkpoints into several files with an index.
SHARDED = "100KB"


def save(
    config: Any,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 3,
    shard_size: str = "5GB",
) -> PreTrainedModel:
    """Saves a model of this config with random weights to `folder` and returns it, as it computes the reference."""
    # The generator's state is the caller's business, so it is put back.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        # transformers' default of 0.02 leaves all logits nearly equal; wider weights make greedy decoding decisive.
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.15)
                elif "norm" not in name:  # biases, which would be zero, and attention sinks
                    parameter.normal_(std=0.5)
    model = model.to(dtype).eval()
    model.save_pretrained(folder, max_shard_size=shard_size)
    # As the reference it goes on behind an end-of-sequence token, unless a test tells it of one.
    model.generation_config.eos_token_id = None
    return model


def checkpoint(
    family: str,
    folder: Path,
    *,
    tied: bool = False,
    layers: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 3,
    shard_size: str = "5GB",
) -> PreTrainedModel:
    """Saves a tiny model of a family to `folder` and returns it."""
    changes = {} if layers is None else {"num_hidden_layers": layers}
    config = CONFIGS[family](tie_word_embeddings=tied, **changes)
    return save(config, folder, dtype=dtype, seed=seed, shard_size=shard_size)


# Every family by name, for parametrised tests.
FAMILIES: dict[str, Callable[..., PreTrainedModel]] = {name: partial(checkpoint, name) for name in CONFIGS}

llama = FAMILIES["llama"]
mistral = FAMILIES["mistral"]
