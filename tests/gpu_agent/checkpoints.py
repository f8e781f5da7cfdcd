"""Small random-weight checkpoints, made with transformers' own `save_pretrained`, for tests of weights and engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB = 512
HIDDEN = 64
SLIDING_WINDOW = 8


def llama(
    folder: Path,
    *,
    tied: bool = False,
    layers: int = 2,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    shard_size: str = "5GB",
) -> PreTrainedModel:
    """Saves a tiny Llama (4 query heads, 2 KV heads) to `folder` and returns the model that was saved."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
    )
    return _save(LlamaForCausalLM, config, folder, dtype, seed, shard_size)


def qwen3(
    folder: Path,
    *,
    tied: bool = False,
    layers: int = 3,
    dtype: torch.dtype = torch.float32,
    seed: int = 1,
    shard_size: str = "5GB",
) -> PreTrainedModel:
    """Saves a tiny Qwen3 (head size unequal to hidden / heads, norms on q and k) and returns the model."""
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
    )
    return _save(Qwen3ForCausalLM, config, folder, dtype, seed, shard_size)


def mistral(
    folder: Path,
    *,
    tied: bool = False,
    layers: int = 4,
    dtype: torch.dtype = torch.float32,
    seed: int = 2,
    shard_size: str = "5GB",
) -> PreTrainedModel:
    """Saves a tiny Mistral whose attention sees a sliding window of SLIDING_WINDOW tokens and returns the model."""
    config = MistralConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=1,
        sliding_window=SLIDING_WINDOW,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
    )
    return _save(MistralForCausalLM, config, folder, dtype, seed, shard_size)


# Every family by name, for parametrised tests.
FAMILIES: dict[str, Callable[..., PreTrainedModel]] = {"llama": llama, "qwen3": qwen3, "mistral": mistral}

# Passed as `shard_size`, this splits any of the checkpoints above into several files with an index.
SHARDED = "100KB"


def _save(
    cls: type[PreTrainedModel], config: object, folder: Path, dtype: torch.dtype, seed: int, shard_size: str
) -> PreTrainedModel:
    # The generator's state is the caller's business, so it is put back.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls(config)
        # transformers' default of 0.02 leaves all logits nearly equal; wider weights make greedy decoding decisive.
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.15)
    model = model.to(dtype).eval()
    model.save_pretrained(folder, max_shard_size=shard_size)
    return model
