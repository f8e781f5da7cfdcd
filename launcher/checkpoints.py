"""Three small checkpoints of three architectures with random weights, for trying the system without a download.

Each is what a user's own would be: saved by transformers' `save_pretrained`, with a real tokenizer (byte-level BPE,
trained on this program's own source) and a chat template.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

VOCABULARY = 4096
CONTEXT_TOKENS = 1024
SLIDING_WINDOW = 64
_SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
_ROLES = ["<|system|>", "<|user|>", "<|assistant|>"]
_CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' }}{{ message['content'] }}{{ eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def checkpoint_folders(folder: Path) -> dict[str, Path]:
    """Where in `folder` the checkpoints are or will be, by model name."""
    return {name: folder / name for name in _MAKERS}


def make_checkpoints(folder: Path, report: Callable[[str], None]) -> dict[str, Path]:
    """Makes the checkpoints that are not yet in `folder`; returns folders by model name.

    Deterministic for one version of this program. `report` is told what is being done, in words.
    """
    made = checkpoint_folders(folder)
    missing = [name for name in made if not made[name].is_dir()]
    if not missing:
        return made
    from transformers.utils import logging

    logging.disable_progress_bar()
    report("training a tokenizer on this program's source")
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(_own_source())
    for name in missing:
        report(f"making {name}")
        unfinished = folder / f".{name}.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        tokenizer.save_pretrained(unfinished)
        _make_model(name, tokenizer).save_pretrained(unfinished)
        unfinished.rename(made[name])
    return made


def _own_source() -> list[str]:
    import launcher
    import services
    import warmserve

    files = [file for package in (launcher, services, warmserve) for root in package.__path__ for file in _python(root)]
    return [file.read_text() for file in files]


def _python(root: str) -> Iterator[Path]:
    return iter(sorted(Path(root).rglob("*.py")))


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most VOCABULARY tokens with special tokens and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[*_SPECIAL.values(), *_ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    begin = _SPECIAL["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A $B", special_tokens=[(begin, tokenizer.token_to_id(begin))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=CONTEXT_TOKENS,
        additional_special_tokens=_ROLES,
        chat_template=_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        **_SPECIAL,
    )


def _make_model(name: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(list(_MAKERS).index(name))
        return _MAKERS[name](
            vocab_size=len(tokenizer),
            max_position_embeddings=CONTEXT_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            dtype="float32",
        )


def _llama(**common: Any) -> PreTrainedModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=384,
            intermediate_size=1280,
            num_hidden_layers=8,
            num_attention_heads=6,
            num_key_value_heads=2,
            tie_word_embeddings=False,
            **common,
        )
    )


def _qwen3(**common: Any) -> PreTrainedModel:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(
        Qwen3Config(
            hidden_size=384,
            intermediate_size=1264,
            num_hidden_layers=9,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=64,
            tie_word_embeddings=True,
            **common,
        )
    )


def _mistral(**common: Any) -> PreTrainedModel:
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(
        MistralConfig(
            hidden_size=384,
            intermediate_size=1280,
            num_hidden_layers=8,
            num_attention_heads=6,
            num_key_value_heads=2,
            sliding_window=SLIDING_WINDOW,
            tie_word_embeddings=False,
            **common,
        )
    )


# By model name, in the order of their seeds.
_MAKERS: dict[str, Callable[..., PreTrainedModel]] = {
    "tiny-llama": _llama,
    "tiny-qwen3": _qwen3,
    "tiny-mistral": _mistral,
}


def main() -> None:
    """`python -m launcher.checkpoints FOLDER` says what it does, a line a step."""
    make_checkpoints(Path(sys.argv[1]), lambda step: print(step, flush=True))


if __name__ == "__main__":
    main()
