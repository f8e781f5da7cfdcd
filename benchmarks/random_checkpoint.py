"""Checkpoints of any shape with random numbers, as files that any loader of safetensors reads."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM

VOCABULARY = 90
"""Token ids below this are in its tokenizer."""
_TILE = 1 << 20
_FILE_BYTES = 4 << 30


def write_checkpoint(folder: Path, config: Any, seed: int) -> None:
    """Writes a model in bf16 whose matrices repeat one tile of normally distributed numbers, and a small tokenizer.

    How fast it is loaded and run does not depend on the numbers; another seed makes another checkpoint.
    """
    folder.mkdir(parents=True)
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(config).state_dict()
    tile = (0.02 * torch.randn(_TILE, generator=torch.Generator().manual_seed(seed))).bfloat16()
    tied = config.tie_word_embeddings
    index: dict[str, str] = {}
    part: dict[str, torch.Tensor] = {}

    def write() -> None:
        name = f"model-{len(set(index.values())):05d}.safetensors"
        save_file(part, folder / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(part, name))
        part.clear()

    for name, tensor in state.items():
        if tied and name == "lm_head.weight":
            continue
        count = math.prod(tensor.shape)
        flat = tile.repeat(-(-count // _TILE))[:count] if tensor.dim() > 1 else torch.ones(count, dtype=torch.bfloat16)
        part[name] = flat.view(tensor.shape).contiguous()
        if sum(held.nbytes for held in part.values()) > _FILE_BYTES:
            write()
    write()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE(vocab={chr(33 + n): n for n in range(VOCABULARY)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
