"""The demo's checkpoints are what a user's would be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from launcher.checkpoints import SLIDING_WINDOW, _own_source, make_checkpoints, train_tokenizer

CLASSES = {"tiny-llama": "LlamaForCausalLM", "tiny-qwen3": "Qwen3ForCausalLM", "tiny-mistral": "MistralForCausalLM"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("checkpoints")
    unfinished = folder / ".tiny-llama.unfinished"  # of a run that was killed
    unfinished.mkdir()
    (unfinished / "junk").touch()
    reported: list[str] = []
    checkpoints = make_checkpoints(folder, reported.append)
    assert len(reported) == 4
    assert not (checkpoints["tiny-llama"] / "junk").exists()
    return checkpoints


@pytest.fixture(scope="module")
def tokenizer(made: dict[str, Path]) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(made["tiny-llama"])


@pytest.mark.parametrize("name", CLASSES)
def test_transformers_loads_and_runs_them(made: dict[str, Path], name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(made[name])
    tokenizer = AutoTokenizer.from_pretrained(made[name])
    assert type(model).__name__ == CLASSES[name]
    assert model.dtype == torch.float32
    assert model.config.vocab_size == len(tokenizer)
    assert 40 << 20 < (made[name] / "model.safetensors").stat().st_size < 80 << 20
    prompt = tokenizer("the model", return_tensors="pt")
    out = model.generate(**prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert out.shape[1] == prompt.input_ids.shape[1] + 4


def test_one_has_a_sliding_window(made: dict[str, Path]) -> None:
    config = AutoModelForCausalLM.from_pretrained(made["tiny-mistral"]).config
    assert config.sliding_window == SLIDING_WINDOW < config.max_position_embeddings


@given(text=st.text(max_size=200))
def test_the_tokenizer_gives_back_any_text(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False).input_ids
    if not set(ids) & set(tokenizer.all_special_ids):
        assert tokenizer.decode(ids) == text


def test_the_tokenizer_compresses_what_it_was_trained_on(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "".join(_own_source())
    assert len(tokenizer(text).input_ids) < len(text) / 2.5
    assert tokenizer("the").input_ids[0] == tokenizer.bos_token_id


def test_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<s><|system|>Be brief.</s><|user|>Hello</s><|assistant|>"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    roles = [tokenizer.convert_tokens_to_ids(role) for role in ("<|system|>", "<|user|>", "<|assistant|>")]
    assert [token for token in ids if token in roles] == roles


def test_making_them_again_is_the_same_and_is_skipped_where_they_are(made: dict[str, Path]) -> None:
    texts = _own_source()[:10]
    first, second = (train_tokenizer(texts).backend_tokenizer.to_str() for _ in range(2))
    assert first == second
    reported: list[str] = []
    before = {name: (path / "model.safetensors").stat().st_mtime_ns for name, path in made.items()}
    assert make_checkpoints(made["tiny-llama"].parent, reported.append) == made
    assert reported == []
    assert before == {name: (path / "model.safetensors").stat().st_mtime_ns for name, path in made.items()}
