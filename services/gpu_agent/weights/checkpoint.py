"""A checkpoint folder, checked completely before anything is made of it. Nothing in it is ever executed."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from services.gpu_agent.weights.conversion import TensorSource, find_sources
from services.gpu_agent.weights.errors import CheckpointError, Problem
from services.gpu_agent.weights.safetensors_files import (
    DTYPES,
    StoredTensor,
    read_weights,
    some,
)

# Old checkpoints carry this buffer, which transformers computes from the config; its own loader drops it too.
_ALWAYS_IGNORED = r"rotary_emb\.inv_freq"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that transformers' class can be built from, tensor by tensor.

    `tensors` are the model's, in the order of its modules, tied ones once, each under its first name in the model;
    `aliases` leads from a tied tensor's other names to that name.
    """

    folder: Path
    config: dict[str, Any]  # config.json as it is
    model_config: Any  # the same as transformers' PretrainedConfig
    architecture: str  # transformers' class name
    tensors: dict[str, TensorSource]
    aliases: dict[str, str]
    dtype: torch.dtype  # what config.json names, else what most numbers are stored as
    delicate: dict[torch.dtype, frozenset[str]]  # tensors that the model's class keeps in float32 beside such a dtype
    eos_token_ids: tuple[int, ...]
    fingerprint: str  # hex; tells one version of a checkpoint from another

    @property
    def parameters(self) -> int:
        """Numbers in all tensors, tied ones counted once."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor, in the order of the model's modules; what plan_layout wants."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return int(self.model_config.get_text_config().num_hidden_layers)

    @property
    def context_tokens(self) -> int | None:
        """The longest context the model was made for; None where the config does not say."""
        length = getattr(self.model_config.get_text_config(), "max_position_embeddings", None)
        return length if isinstance(length, int) and length > 0 else None

    @classmethod
    def open(cls, folder: str | Path, allowed_roots: Sequence[Path]) -> Checkpoint:
        """Reads config and headers and compares them with the model they describe.

        Raises CheckpointError; its kind says whether the folder is missing, forbidden or cannot be served.
        """
        access = _Access([root.resolve() for root in allowed_roots])
        resolved = access.folder(Path(folder))
        config, raw_config = _read_config(resolved, access)
        weights = read_weights(resolved, access.permit)
        model_config = _model_config(resolved, config)
        with torch.device("meta"):
            model = _build(model_config, len(weights.tensors))
        architecture = type(model).__name__
        stated = config.get("architectures")
        if stated and stated != [architecture]:
            raise CheckpointError(
                Problem.INVALID,
                f"{resolved} holds {some([str(name) for name in stated])}, which cannot be served; "
                f"for model type {model_config.model_type!r} only {architecture} can",
            )
        tensors, aliases = _match(model, architecture, weights.tensors)
        return cls(
            folder=resolved,
            config=config,
            model_config=model_config,
            architecture=architecture,
            tensors=tensors,
            aliases=aliases,
            dtype=_dtype(model_config, weights.tensors),
            delicate={dtype: _delicate(model, tensors, dtype) for dtype in DTYPES.values()},
            eos_token_ids=_eos_token_ids(resolved, config, access),
            fingerprint=hashlib.sha256(raw_config + weights.digest).hexdigest(),
        )


@dataclass(frozen=True)
class _Access:
    """Which files may be opened: those that lie under the allowed roots once every link is followed."""

    roots: list[Path]

    def permit(self, path: Path) -> Path:
        try:
            resolved = path.resolve()
        except (OSError, RuntimeError, ValueError) as error:  # loops of links, names that cannot be
            raise CheckpointError(Problem.INVALID, f"{str(path)!r} cannot be followed: {error}") from error
        if not any(resolved.is_relative_to(root) for root in self.roots):
            allowed = ", ".join(str(root) for root in self.roots) or "none is configured"
            leads = f" (it leads to {resolved})" if resolved != path else ""
            raise CheckpointError(Problem.PERMISSION, f"{path}{leads} is outside the allowed model folders ({allowed})")
        return resolved

    def folder(self, path: Path) -> Path:
        if not path.is_absolute():
            raise CheckpointError(Problem.INVALID, f"the model's folder must be an absolute path, not {str(path)!r}")
        # Permission first: what is outside is refused alike whether it exists or not.
        resolved = self.permit(path)
        if not os.path.exists(resolved):
            raise CheckpointError(Problem.NOT_FOUND, f"there is no folder {path} on this machine")
        if not resolved.is_dir():
            raise CheckpointError(Problem.INVALID, f"{path} is a file; give the folder that holds config.json")
        if not os.access(resolved, os.R_OK | os.X_OK):
            raise CheckpointError(Problem.PERMISSION, f"{path} cannot be read by this process")
        return resolved

    def read(self, path: Path) -> bytes:
        try:
            return self.permit(path).read_bytes()
        except PermissionError as error:
            raise CheckpointError(Problem.PERMISSION, f"{path} cannot be read: {error}") from error


def _read_json(path: Path, access: _Access) -> tuple[dict[str, Any], bytes]:
    raw = access.read(path)
    try:
        value = json.loads(raw)
    except ValueError as error:
        raise CheckpointError(Problem.INVALID, f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(Problem.INVALID, f"{path} is not a JSON object")
    return value, raw


def _read_config(folder: Path, access: _Access) -> tuple[dict[str, Any], bytes]:
    path = folder / "config.json"
    if not path.exists():
        raise CheckpointError(Problem.INVALID, f"{folder} has no config.json, so it is not a checkpoint")
    config, raw = _read_json(path, access)
    if config.get("quantization_config"):
        raise CheckpointError(Problem.INVALID, f"{folder} is quantised; only F32, F16 and BF16 weights can be served")
    return config, raw


def _model_config(folder: Path, config: dict[str, Any]) -> Any:
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in transformers.CONFIG_MAPPING:
        own_code = "; the checkpoint's own code is never run" if "auto_map" in config else ""
        raise CheckpointError(
            Problem.INVALID,
            f"config.json names model type {model_type!r}, which transformers {transformers.__version__} "
            f"does not know{own_code}",
        )
    try:
        parsed = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever transformers makes of a malformed config is the operator's to know
        raise _bad_config(error) from error
    if parsed.is_encoder_decoder or type(parsed) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise CheckpointError(
            Problem.INVALID, f"model type {model_type!r} is no decoder-only language model and cannot be served"
        )
    return parsed


def _build(config: Any, stored_tensors: int) -> PreTrainedModel:
    """The model without memory: its names, shapes and ties."""
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if not isinstance(layers, int) or not 0 < layers <= stored_tensors:
        raise CheckpointError(
            Problem.INVALID, f"config.json says {layers} layers, but the weight files hold {stored_tensors} tensors"
        )
    try:
        # With a dtype transformers would change torch's default for the whole process while it builds; it also writes
        # to the config it is given.
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=None, trust_remote_code=False
        )
    except Exception as error:  # as above
        raise _bad_config(error) from error
    return model


def _bad_config(error: Exception) -> CheckpointError:
    first_line = str(error).strip().split("\n")[0]
    return CheckpointError(
        Problem.INVALID, f"config.json does not describe a model: {type(error).__name__}: {first_line}"
    )


def _match(
    model: PreTrainedModel, architecture: str, stored: dict[str, StoredTensor]
) -> tuple[dict[str, TensorSource], dict[str, str]]:
    """Finds the source of each of the model's tensors, in the model's order, and the tied names."""
    names_of: dict[int, list[str]] = {}  # by identity: tied parameters are one object
    state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        names_of.setdefault(id(tensor), []).append(name)
    sources = find_sources(model, stored)
    patterns = [_ALWAYS_IGNORED, *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())]
    faults = [
        f"{name} is not part of the model"
        for name in sources.unused
        if not any(re.search(pattern, name) for pattern in patterns)
    ]
    faults += sources.faults
    tensors: dict[str, TensorSource] = {}
    aliases: dict[str, str] = {}
    for first, *others in names_of.values():
        aliases.update(dict.fromkeys(others, first))
        found = {name: sources.found[name] for name in (first, *others) if name in sources.found}
        if not found:
            faults.append(f"{first} is missing")
            continue
        shape = tuple(state[first].shape)
        faults += [
            f"{name} has shape {list(source.shape)} and not {list(shape)}"
            for name, source in found.items()
            if source.shape != shape
        ]
        if len(found) > 1 and not faults:
            _check_equal(found)
        tensors[first] = next(iter(found.values()))
    if faults:
        raise CheckpointError(
            Problem.INVALID,
            f"the weight files do not fit config.json ({architecture}), {len(faults)} faults: {some(faults)}",
        )
    return tensors, aliases


def _check_equal(found: dict[str, TensorSource]) -> None:
    """Tied tensors may be stored more than once, but then they must be the same."""
    first, *others = found.values()
    if not all(_equal(first, other) for other in others):
        raise CheckpointError(
            Problem.INVALID,
            f"config.json ties {' and '.join(found)}, but they differ; set tie_word_embeddings to false there",
        )


def _equal(one: TensorSource, other: TensorSource) -> bool:
    pairs = itertools.zip_longest(one.read(), other.read())
    return all(a is not None and b is not None and a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


def _delicate(model: PreTrainedModel, names: Iterable[str], dtype: torch.dtype) -> frozenset[str]:
    """The tensors that transformers' own loading keeps in float32 when the others have this dtype."""
    plan = model._get_dtype_plan(dtype)
    # Patterns as transformers reads them, found anywhere in a name.
    patterns = [pattern.replace("*", ".*") for pattern, kept in plan.items() if kept is torch.float32]
    return frozenset(name for name in names if any(re.search(pattern, name) for pattern in patterns))


def _dtype(model_config: Any, stored: dict[str, StoredTensor]) -> torch.dtype:
    stated = getattr(model_config, "dtype", None)
    if isinstance(stated, torch.dtype) and stated in DTYPES.values():
        return stated
    numbers: Counter[torch.dtype] = Counter()
    for tensor in stored.values():
        numbers[tensor.dtype] += math.prod(tensor.shape)
    return numbers.most_common(1)[0][0]


def _eos_token_ids(folder: Path, config: dict[str, Any], access: _Access) -> tuple[int, ...]:
    """The tokens that end an answer, as `generate` would take them: generation_config.json goes before config.json."""
    path = folder / "generation_config.json"
    generation = _read_json(path, access)[0] if path.exists() else {}
    value = generation.get("eos_token_id", config.get("eos_token_id"))
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(item, int) and item >= 0 for item in ids):
        raise CheckpointError(
            Problem.INVALID, f"{folder} names {value!r} as eos_token_id; it must be a token id or a list of them"
        )
    return tuple(ids)
