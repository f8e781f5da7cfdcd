"""Models of real shapes with random weights, made directly in an arena's pages: speed does not depend on the values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from services.gpu_agent.arena.arena import Arena
from services.gpu_agent.arena.weight_range import WeightRange
from services.gpu_agent.weights.layout import ImageLayout, plan_layout


def llama_8b() -> LlamaConfig:
    """The shape of Llama 3.1 8B: 8.03 billion parameters."""
    return _llama(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32)


def llama_3b() -> LlamaConfig:
    """The shape of Llama 3.2 3B: 3.21 billion parameters, embeddings tied."""
    return _llama(
        hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24, tie_word_embeddings=True
    )


def llama_1b() -> LlamaConfig:
    """The shape of Llama 3.2 1B: 1.24 billion parameters, embeddings tied."""
    return _llama(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, head_dim=64, tie_word_embeddings=True)


def _llama(**shape: Any) -> LlamaConfig:
    """What they have in common, unless `shape` says otherwise."""
    common: dict[str, Any] = {
        "vocab_size": 128256,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaConfig(**{**common, **shape})


@dataclass(frozen=True)
class ArenaModel:
    """A model whose weights are resident."""

    config: Any
    layout: ImageLayout
    weights: WeightRange

    @property
    def step_bytes(self) -> int:
        """Bytes of weights that a decode step reads: all but the rows of embeddings that it does not look up."""
        embedding = self.layout.place("model.embed_tokens.weight")
        tied = self.layout.place("lm_head.weight") == embedding
        return sum(place.nbytes for place in self.layout.tensors) - (0 if tied else embedding.nbytes)


def place(arena: Arena, name: str, config: Any, dtype: torch.dtype = torch.bfloat16) -> ArenaModel:
    """Plans, maps and fills a model with normally distributed weights (norms with ones)."""
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(config).state_dict(keep_vars=True)
    first: dict[int, str] = {}
    aliases = {}
    for key, tensor in state.items():
        if first.setdefault(id(tensor), key) != key:
            aliases[key] = first[id(tensor)]
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items() if key not in aliases}
    layout = plan_layout(shapes, aliases, dtype, arena.page_bytes)
    weights = arena.add_weights(name, layout.total_bytes)
    weights.grow(layout.num_pages)
    for spot in layout.tensors:
        tensor = weights.tensor(spot.dtype, spot.shape, spot.offset)
        if len(spot.shape) == 1:
            tensor.fill_(1.0)
        else:
            tensor.normal_(0, 0.02)
    return ArenaModel(config, layout, weights)
