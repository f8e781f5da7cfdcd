"""The models of a what-if, as an operator writes them down: a YAML file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from simulator.spec import ModelSpec

EXAMPLE = """\
# Models for `warmctl simulate`, by the names that the trace calls them.
models:
  # From its checkpoint: a folder with config.json, or that file. Relative paths begin at this file.
  # support-chat:
  #   config: ./Llama-3.1-8B-Instruct

  # Or by its size alone; layers and KV cache are then those of a usual dense model of that size.
  chat:
    parameters: 8e9
    ttft_s: 0.5              # 95 of 100 requests are to have their first token within this; 0: no target
  code:
    parameters: 32B
    tp: 2                    # GPUs of one replica: 1, 2, 4 or 8
    layers: 64
    kv_bytes_per_token: 262144
    max_batch: 64            # sequences that an instance runs at a time
    context_tokens: 8192     # prompt and answer
    bytes_per_parameter: 2   # 2: bfloat16
    priority: 2              # of models that wait for room, the weightier comes first
    min_replicas: 0          # instances that are always active
    max_replicas: 0          # 0: no bound
"""

# Dense models of 2024 and 2025: parameters and layers.
_LAYERS = ((0.1e9, 8), (0.5e9, 24), (1.24e9, 16), (3.2e9, 28), (8e9, 32), (14.8e9, 48), (32.8e9, 64), (70.6e9, 80))
_KV_WIDTH = 1024  # eight heads of 128: what those from 3B on have; smaller ones have half
_DTYPE_BYTES = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0, "float8_e4m3fn": 1.0}


class ModelsFileError(ValueError):
    """The file cannot be used; the text names the model, what is wrong and what would be right."""


class _Entry(BaseModel):
    """One model of the file."""

    model_config = ConfigDict(extra="forbid")

    config: Path | None = None
    parameters: float | None = Field(None, gt=0)
    layers: int | None = Field(None, gt=0)
    kv_bytes_per_token: int | None = Field(None, gt=0)
    bytes_per_parameter: float | None = Field(None, gt=0)
    tp: int = Field(1, ge=1)
    max_batch: int = Field(64, ge=1)
    context_tokens: int = Field(8192, ge=2)
    ttft_s: float = Field(0.0, ge=0)
    tpot_s: float = Field(0.0, ge=0)
    priority: float = Field(1.0, gt=0)
    min_replicas: int = Field(0, ge=0)
    max_replicas: int = Field(0, ge=0)

    @field_validator("parameters", mode="before")
    @classmethod
    def _count(cls, value: Any) -> Any:
        """YAML reads 8e9 as a text; people write 8B."""
        if not isinstance(value, str):
            return value
        text = value.strip().lower()
        factor = {"b": 1e9, "m": 1e6}.get(text[-1:], 1.0)
        try:
            return float(text.rstrip("bm")) * factor
        except ValueError:
            raise ValueError(f"{value!r} is no number of parameters; write 8e9 or 8B") from None

    @model_validator(mode="after")
    def _some_size(self) -> _Entry:
        if (self.config is None) == (self.parameters is None):
            raise ValueError("give its size: either `config:` (a checkpoint's folder) or `parameters:` (like 8e9)")
        return self


def read_models(file: Path) -> list[ModelSpec]:
    """The models of a file like EXAMPLE. Raises ModelsFileError."""
    try:
        content = yaml.safe_load(file.read_text())
    except OSError as error:
        raise ModelsFileError(f"{file} cannot be read: {error.strerror or error}; see --example-models") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ModelsFileError(f"{file} cannot be read as YAML: {error}") from error
    entries = content.get("models") if isinstance(content, dict) else None
    if not isinstance(entries, dict) or not entries:
        raise ModelsFileError(f"{file}: expected `models:` and under it each model by its name; see --example-models")
    return [_model(file, str(name), entry) for name, entry in entries.items()]


def _model(file: Path, name: str, raw: Any) -> ModelSpec:
    try:
        entry = _Entry.model_validate(raw)
    except ValidationError as error:
        problems = "; ".join(_problem(problem) for problem in error.errors())
        raise ModelsFileError(f"{file}, model {name}: {problems}") from None
    try:
        sizes = _of_config(file.parent / entry.config) if entry.config else _of_parameters(entry.parameters or 0.0)
    except (KeyError, ValueError, OSError) as error:
        what = f"its config lacks {error}" if isinstance(error, KeyError) else error
        raise ModelsFileError(f"{file}, model {name}: {what}") from error
    told = {field: value for field in sizes if (value := getattr(entry, field, None)) is not None}
    rest = entry.model_dump(exclude={"config", *sizes, "parameters"})
    return ModelSpec(name, **{**sizes, **told, "parameters": sizes["parameters"]}, **rest)


def _problem(problem: Any) -> str:
    place = ".".join(str(part) for part in problem["loc"])
    text = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        text = f"is not known; known are {', '.join(_Entry.model_fields)}"
    return f"{place}: {text}" if place else text


def _of_parameters(parameters: float) -> dict[str, Any]:
    """Sizes of a usual dense model with so many parameters."""
    sizes, layers = zip(*_LAYERS, strict=True)
    above = next((at for at, size in enumerate(sizes) if size >= parameters), None)
    if above in (0, None):
        depth = layers[0] if above == 0 else layers[-1] * (parameters / sizes[-1]) ** (1 / 3)
    else:
        assert above is not None
        share = math.log(parameters / sizes[above - 1]) / math.log(sizes[above] / sizes[above - 1])
        depth = layers[above - 1] + share * (layers[above] - layers[above - 1])
    width = _KV_WIDTH if parameters > 2e9 else _KV_WIDTH // 2
    count = max(1, round(depth))
    return {
        "parameters": round(parameters),
        "layers": count,
        "kv_bytes_per_token": 2 * count * width * 2,
        "bytes_per_parameter": 2.0,
        "hidden": 0,
    }


def _of_config(path: Path) -> dict[str, Any]:
    """Sizes from a checkpoint's config.json: attention, gated MLP and embeddings of a dense decoder."""
    path = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is no config: expected a JSON object")  # noqa: TRY004 (it is the user's file)
    config = {**config, **config.get("text_config", {})}
    unknown = [
        key for key in ("num_experts", "num_local_experts", "n_routed_experts", "kv_lora_rank") if config.get(key)
    ]
    if unknown:
        raise ValueError(
            f"{path} is of a mixture of experts or of latent attention ({unknown[0]}), and the cost model knows dense "
            "models only; give `parameters:`, `layers:` and `kv_bytes_per_token:` of a dense one that is as slow"
        )
    hidden, layers, heads = config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head = config.get("head_dim") or hidden // heads
    attention = 2 * hidden * heads * head + 2 * hidden * kv_heads * head
    per_layer = attention + 3 * hidden * config["intermediate_size"] + 2 * hidden
    embeddings = config["vocab_size"] * hidden * (1 if config.get("tie_word_embeddings") else 2)
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    bytes_each = _DTYPE_BYTES.get(dtype, 2.0)
    return {
        "parameters": layers * per_layer + embeddings + hidden,
        "layers": layers,
        "kv_bytes_per_token": round(2 * layers * kv_heads * head * bytes_each),
        "bytes_per_parameter": bytes_each,
        "hidden": hidden,
    }
