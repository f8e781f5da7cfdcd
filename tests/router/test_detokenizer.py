"""Text from tokens, and stop texts."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from services.router.detokenizer import AnswerText, Detokenizer, StopScanner
from tests.router.peers import TEXT

_HALF = "\N{REPLACEMENT CHARACTER}"


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))


def pieces_of(tokenizer: Tokenizer, tokens: list[int], prompt: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt)
    return [detokenizer.push(token) for token in tokens] + [detokenizer.flush()]


@given(data=st.data())
def test_pieces_of_any_tokens_join_to_the_decoded_answer(tokenizer: Tokenizer, data: st.DataObject) -> None:
    size = tokenizer.get_vocab_size()
    tokens = data.draw(st.lists(st.integers(0, size - 1), max_size=60))
    prompt = data.draw(st.sampled_from([[], tokenizer.encode("ends whole").ids]))
    assert "".join(pieces_of(tokenizer, tokens, prompt)) == tokenizer.decode(tokens)


@given(text=st.text(st.characters(exclude_characters=_HALF, codec="utf-8"), max_size=60) | st.just(TEXT))
def test_no_piece_of_real_text_holds_half_a_character(tokenizer: Tokenizer, text: str) -> None:
    pieces = pieces_of(tokenizer, tokenizer.encode(text).ids, [])
    assert "".join(pieces) == text
    assert not any(_HALF in piece for piece in pieces)


def test_text_that_never_becomes_whole_is_not_kept_back_for_ever(tokenizer: Tokenizer) -> None:
    byte = next(token for token in range(tokenizer.get_vocab_size()) if tokenizer.decode([token]) == _HALF)
    detokenizer = Detokenizer(tokenizer, [])
    text = "".join(detokenizer.push(byte) for _ in range(100))
    assert len(text) >= 97
    assert text + detokenizer.flush() == tokenizer.decode([byte] * 100)


def test_a_sentencepiece_answer_keeps_the_space_before_its_first_word() -> None:
    vocabulary = {"▁Hello": 0, "▁world": 1, "<unk>": 2}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.decoder = decoders.Metaspace()
    assert pieces_of(tokenizer, [1, 0], prompt=[0]) == [" world", " Hello", ""]


@given(
    text=st.text("ab", max_size=30),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=10),
)
def test_stop_texts_are_found_however_the_text_is_cut(text: str, stops: list[str], cuts: list[int]) -> None:
    scanner = StopScanner(stops)
    edges = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    given_out = []
    for start, end in pairwise(edges):
        given_out.append(scanner.push(text[start:end]))
        if scanner.stopped:
            break
    out = "".join(given_out) + scanner.flush()
    assert text.startswith(out)
    assert not any(stop in out for stop in stops)
    if any(stop in text for stop in stops):
        assert scanner.stopped
        assert any(text.startswith(out + stop) for stop in stops)
    else:
        assert not scanner.stopped
        assert out == text


def test_tokens_after_the_one_that_completes_a_stop_text_are_not_used(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("one two three four").ids
    answer = AnswerText(tokenizer, [], ["two"])
    text, used = answer.push(tokens)
    assert answer.stopped
    assert text == "one "
    assert "two" in tokenizer.decode(tokens[:used])
    assert "two" not in tokenizer.decode(tokens[: used - 1])


def test_a_stop_text_may_be_completed_by_the_last_held_back_character(tokenizer: Tokenizer) -> None:
    byte = next(token for token in range(tokenizer.get_vocab_size()) if tokenizer.decode([token]) == _HALF)
    answer = AnswerText(tokenizer, [], [_HALF])
    assert answer.push([byte]).text == ""
    assert answer.flush() == ""
    assert answer.stopped
