"""Checkpoints that can be served are read right; those that cannot are refused with a message that says what to do."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5Config, ViTConfig

from services.gpu_agent.weights.checkpoint import Checkpoint
from services.gpu_agent.weights.errors import CheckpointError, Problem
from tests.gpu_agent.checkpoints import FAMILIES, SHARDED, llama

torch.set_num_threads(1)

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "models" / "tiny"
    llama(made)
    return made


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    made = tmp_path / "models" / "sharded"
    llama(made, shard_size=SHARDED)
    return made


def opened(folder: Path) -> Checkpoint:
    return Checkpoint.open(folder, [folder.parent])


def refused(folder: Path, kind: Problem, *parts: str) -> None:
    """The folder is refused with this kind, and the message has each of the parts."""
    with pytest.raises(CheckpointError) as caught:
        opened(folder)
    assert caught.value.kind is kind, caught.value.message
    for part in parts:
        assert part in caught.value.message


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("shard_size", ["5GB", SHARDED])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_saved_is_read(tmp_path: Path, family: str, tied: bool, shard_size: str) -> None:
    model = FAMILIES[family](tmp_path / "m", tied=tied, shard_size=shard_size, dtype=torch.bfloat16)
    checkpoint = opened(tmp_path / "m")

    assert checkpoint.architecture == type(model).__name__
    assert checkpoint.parameters == model.num_parameters()
    assert checkpoint.layers == model.config.num_hidden_layers
    assert checkpoint.context_tokens == 256
    assert checkpoint.dtype is torch.bfloat16
    assert checkpoint.eos_token_ids == (2,)
    assert checkpoint.aliases == ({"lm_head.weight": "model.embed_tokens.weight"} if tied else {})
    assert checkpoint.shapes == {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    for name, source in checkpoint.tensors.items():
        parameter = model.get_parameter(name)
        assert torch.equal(torch.cat(list(source.read())).view(source.shape), parameter), name


def test_the_fingerprint_tells_versions_apart(tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("same", 0), ("retrained", 1)):
        llama(tmp_path / name, seed=seed)
    one, same, retrained = (opened(tmp_path / name).fingerprint for name in ("one", "same", "retrained"))
    assert one == same
    assert one != retrained  # headers and sizes are equal, only the weights differ
    edit_config(tmp_path / "same", rope_theta=5000.0)
    assert opened(tmp_path / "same").fingerprint != one


def test_a_redundant_copy_of_a_tied_tensor_is_accepted_only_if_equal(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    llama(folder, tied=True)
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert opened(folder).aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t["lm_head.weight"] + 1}))
    refused(folder, Problem.INVALID, "lm_head.weight", "differ", "set tie_word_embeddings to false")


def test_a_tied_tensor_may_be_stored_under_its_other_name(tmp_path: Path) -> None:
    llama(tmp_path / "m", tied=True)
    edit_tensors(tmp_path / "m", lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    checkpoint = opened(tmp_path / "m")
    assert checkpoint.tensors["model.embed_tokens.weight"].parts[0].name == "lm_head.weight"


def test_a_checkpoint_of_the_model_without_its_head_is_read_where_the_head_is_tied(tmp_path: Path) -> None:
    """As transformers reads it: such a checkpoint has no common prefix."""
    model = llama(tmp_path / "m", tied=True)

    def strip(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    edit_tensors(tmp_path / "m", strip)
    assert opened(tmp_path / "m").shapes == {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    edit_tensors(tmp_path / "m", lambda t: t.update({"model.norm.weight": torch.ones(64)}))
    refused(tmp_path / "m", Problem.INVALID, "norm.weight and model.norm.weight are both model.norm.weight")


def test_what_a_class_keeps_in_float32_is_known(tmp_path: Path) -> None:
    FAMILIES["gpt_oss"](tmp_path / "m")
    delicate = opened(tmp_path / "m").delicate
    assert delicate[torch.float32] == delicate[torch.bfloat16] == frozenset()
    assert delicate[torch.float16] == {
        "model.norm.weight",
        *(f"model.layers.{layer}.{part}_layernorm.weight" for layer in (0, 1) for part in ("input", "post_attention")),
    }


def test_rotary_buffers_of_old_checkpoints_are_left_out(folder: Path) -> None:
    edit_tensors(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    assert not any("inv_freq" in name for name in opened(folder).tensors)


def test_the_end_of_sequence_tokens_are_those_that_generate_would_use(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 7]}))
    assert opened(folder).eos_token_ids == (5, 7)
    (folder / "generation_config.json").unlink()
    assert opened(folder).eos_token_ids == (2,)
    edit_config(folder, eos_token_id=None)
    assert opened(folder).eos_token_ids == ()
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": "</s>"}))
    refused(folder, Problem.INVALID, "'</s>' as eos_token_id")


# Where the folder is


def test_a_missing_folder(folder: Path) -> None:
    refused(folder.parent / "typo", Problem.NOT_FOUND, "there is no folder", "typo")


def test_a_folder_outside_the_allowed_ones_is_refused_alike_whether_it_exists_or_not(folder: Path) -> None:
    for path in (folder, folder.parent / "missing", Path("/etc"), folder.parent / "allowed" / ".." / "tiny"):
        with pytest.raises(CheckpointError, match="outside the allowed model folders") as caught:
            Checkpoint.open(path, [folder.parent / "allowed"])
        assert caught.value.kind is Problem.PERMISSION


def test_a_folder_whose_name_begins_like_an_allowed_one_is_outside(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="outside"):
        Checkpoint.open(folder, [folder.parent / "ti"])


def test_without_allowed_folders_nothing_is_served(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="none is configured"):
        Checkpoint.open(folder, [])


def test_a_link_that_leads_outside_is_followed_before_it_is_judged(tmp_path: Path, folder: Path) -> None:
    allowed = tmp_path / "allowed"
    allowed.mkdir()
    (allowed / "link").symlink_to(folder)
    with pytest.raises(CheckpointError, match="outside") as caught:
        Checkpoint.open(allowed / "link", [allowed])
    assert caught.value.kind is Problem.PERMISSION
    assert Checkpoint.open(allowed / "link", [allowed, folder.parent]).layers == 2


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "generation_config.json"])
def test_a_file_that_is_a_link_to_outside(tmp_path: Path, folder: Path, name: str) -> None:
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    refused(folder, Problem.PERMISSION, name, "outside the allowed model folders")


def test_links_between_allowed_folders_are_fine(folder: Path) -> None:
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    (folder / "model.safetensors").rename(blobs / "weights")
    (folder / "model.safetensors").symlink_to(blobs / "weights")
    assert opened(folder).layers == 2


@pytest.mark.parametrize("path", ["models/tiny", "/a\0b", ""])
def test_a_path_that_cannot_be_one(tmp_path: Path, path: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(path, [tmp_path, Path("/")])
    assert caught.value.kind is Problem.INVALID


def test_a_file_in_place_of_a_folder(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="is a file; give the folder"):
        Checkpoint.open(folder / "config.json", [folder])


# The weight files


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    refused(folder, Problem.INVALID, "has no config.json")


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    refused(folder, Problem.INVALID, "has neither model.safetensors nor model.safetensors.index.json")


def test_shards_without_their_index(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    refused(sharded, Problem.INVALID, "model-00001-of-", "without an index")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_never_opened(folder: Path, name: str) -> None:
    (folder / "model.safetensors").unlink()
    # Reading this pickle would create the file `executed`.
    (folder / name).write_bytes(f"cposix\nsystem\n(S'touch {folder}/executed'\ntR.".encode())
    refused(folder, Problem.INVALID, name, "pickle", "save_pretrained")
    assert not (folder / "executed").exists()


def test_pickled_weights_beside_safetensors_do_not_matter(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"anything")
    assert opened(folder).layers == 2


def test_a_missing_shard(sharded: Path) -> None:
    (sharded / "model-00002-of-00006.safetensors").unlink()
    refused(sharded, Problem.INVALID, "lacks 1 of the 6 shards", "model-00002-of-00006.safetensors", "copy the missing")


@pytest.mark.parametrize("keep", [0, 4, 8, 200, -1])
def test_a_truncated_file(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    os.truncate(path, keep if keep >= 0 else path.stat().st_size - 1)
    refused(folder, Problem.INVALID, "model.safetensors", "truncated or corrupt", "download it again")


def test_a_truncated_shard(sharded: Path) -> None:
    path = sharded / "model-00003-of-00006.safetensors"
    os.truncate(path, path.stat().st_size // 2)
    refused(sharded, Problem.INVALID, path.name, "truncated or corrupt")


def test_a_corrupt_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[8:40] = os.urandom(32)
    path.write_bytes(raw)
    refused(folder, Problem.INVALID, "truncated or corrupt")


def test_a_file_that_is_something_else(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    refused(folder, Problem.INVALID, "truncated or corrupt")


def test_a_directory_in_place_of_a_weight_file(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    refused(folder, Problem.INVALID, "model.safetensors")


def test_a_wrong_shape(folder: Path) -> None:
    edit_tensors(folder, lambda t: t.update({"model.norm.weight": torch.ones(63)}))
    refused(folder, Problem.INVALID, "do not fit config.json", "model.norm.weight has shape [63] and not [64]")


def test_a_missing_tensor(folder: Path) -> None:
    edit_tensors(folder, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    refused(folder, Problem.INVALID, "model.layers.1.mlp.up_proj.weight is missing")


def test_an_unexpected_tensor(folder: Path) -> None:
    edit_tensors(folder, lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.ones(2)}))
    refused(folder, Problem.INVALID, "model.layers.2.mlp.up_proj.weight is not part of the model")


def test_many_faults_are_counted_and_the_first_named(folder: Path) -> None:
    edit_config(folder, hidden_size=128, head_dim=16)
    refused(folder, Problem.INVALID, "faults:", "has shape", "more")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float64])
def test_an_unsupported_dtype(folder: Path, dtype: torch.dtype) -> None:
    edit_tensors(folder, lambda t: t.update({"model.norm.weight": torch.ones(64).to(dtype)}))
    refused(folder, Problem.INVALID, "model.norm.weight", "supported are F32, F16, BF16")


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', '{"weight_map": ["a"]}', "\xff"]
)
def test_a_broken_index(sharded: Path, content: str) -> None:
    (sharded / INDEX).write_bytes(content.encode("latin-1"))
    refused(sharded, Problem.INVALID, INDEX)


@pytest.mark.parametrize("file", ["../other/model.safetensors", "/etc/passwd", "pytorch_model.bin"])
def test_an_index_that_names_files_elsewhere(sharded: Path, file: str) -> None:
    (sharded / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": file}}))
    refused(sharded, Problem.INVALID, file, "not a safetensors file of that folder")


def test_an_index_that_does_not_fit_its_shards(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = index["weight_map"]["model.embed_tokens.weight"]
    (sharded / INDEX).write_text(json.dumps(index))
    refused(sharded, Problem.INVALID, "does not fit its shards", "model.norm.weight")


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    save_file({**load_file(second), **load_file(first)}, second)
    refused(sharded, Problem.INVALID, "in another file as well")


# The config


@pytest.mark.parametrize(("content", "part"), [("", "is not JSON"), ("{", "is not JSON"), ("[1]", "not a JSON object")])
def test_a_config_that_is_not_one(folder: Path, content: str, part: str) -> None:
    (folder / "config.json").write_text(content)
    refused(folder, Problem.INVALID, "config.json", part)


@pytest.mark.parametrize("model_type", ["no_such_model", None, 7, ["llama"]])
def test_an_unknown_model_type(folder: Path, model_type: Any) -> None:
    edit_config(folder, model_type=model_type)
    refused(folder, Problem.INVALID, f"names model type {model_type!r}", "does not know")


def test_code_that_comes_with_a_checkpoint_is_never_run(folder: Path) -> None:
    (folder / "modeling_evil.py").write_text(f"open({str(folder / 'executed')!r}, 'w')")
    edit_config(folder, auto_map={"AutoConfig": "modeling_evil.Config", "AutoModelForCausalLM": "modeling_evil.Model"})
    assert opened(folder).architecture == "LlamaForCausalLM"
    edit_config(folder, model_type="evil")
    refused(folder, Problem.INVALID, "own code is never run")
    assert not (folder / "executed").exists()


@pytest.mark.parametrize("config", [T5Config(), ViTConfig()])
def test_models_of_other_kinds(folder: Path, config: Any) -> None:
    config.save_pretrained(folder)
    refused(folder, Problem.INVALID, config.model_type, "no decoder-only language model")


def test_a_model_with_another_head(folder: Path) -> None:
    edit_config(folder, architectures=["LlamaForSequenceClassification"])
    refused(folder, Problem.INVALID, "holds LlamaForSequenceClassification", "only LlamaForCausalLM can")


@pytest.mark.parametrize("quantisation", [{"quant_method": "gptq", "bits": 4}, {"quant_method": "mxfp4"}])
def test_a_quantised_model(folder: Path, quantisation: dict[str, Any]) -> None:
    edit_config(folder, quantization_config=quantisation)
    refused(folder, Problem.INVALID, "is quantised")


@pytest.mark.parametrize("layers", [10**9, 0, -1, "two", None])
def test_layers_that_cannot_be(folder: Path, layers: Any) -> None:
    edit_config(folder, num_hidden_layers=layers)
    refused(folder, Problem.INVALID, "config.json")


@pytest.mark.parametrize(
    "changes", [{"hidden_size": -64}, {"hidden_size": "wide"}, {"num_attention_heads": 0}, {"hidden_act": "nope"}]
)
def test_sizes_that_make_no_model(folder: Path, changes: dict[str, Any]) -> None:
    edit_config(folder, **changes)
    refused(folder, Problem.INVALID, "config.json")


def test_messages_are_one_line(folder: Path) -> None:
    edit_config(folder, hidden_size="wide")
    with pytest.raises(CheckpointError) as caught:
        opened(folder)
    assert "\n" not in caught.value.message
