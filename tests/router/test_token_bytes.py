"""The bytes of single tokens, for tokenizers of each kind."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models

from services.router.token_bytes import token_bytes


def test_byte_level_tokens_join_to_the_text(tokenizer_folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    of = token_bytes(tokenizer)

    @given(st.text(st.characters(codec="utf-8"), max_size=40))
    def joined(text: str) -> None:
        assert b"".join(of(token) for token in tokenizer.encode(text).ids) == text.encode()

    joined()
    assert len({of(token) for token in range(tokenizer.get_vocab_size())}) == tokenizer.get_vocab_size()


def test_special_tokens_and_unknown_ids(tokenizer_folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken("Größe größer", special=False)])
    of = token_bytes(tokenizer)
    assert of(tokenizer.token_to_id("</s>")) == b"</s>"
    assert of(tokenizer.token_to_id("Größe größer")) == "Größe größer".encode()
    assert of(10**6) == b""


def test_sentencepiece_tokens_with_byte_fallback() -> None:
    vocabulary = {"\u2581the": 0, "x": 1, "<0x0A>": 2, "<0xE6>": 3, "日": 4, "<unk>": 5}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    of = token_bytes(tokenizer)
    assert [of(token) for token in range(5)] == [b" the", b"x", b"\n", b"\xe6", "日".encode()]


def test_other_tokens_are_decoded() -> None:
    tokenizer = Tokenizer(models.WordPiece({"play": 0, "##ing": 1, "[UNK]": 2}, unk_token="[UNK]"))
    assert token_bytes(tokenizer)(1) == b"##ing"
    tokenizer.decoder = decoders.WordPiece()
    assert token_bytes(tokenizer)(0) == b"play"
