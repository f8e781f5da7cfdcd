"""Grammars: what they let through, what they keep out, and how faults in them are told."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from services.gpu_agent.engine.grammar import GrammarCompiler, GrammarError, Matcher
from services.gpu_agent.engine.sampling import sample
from services.gpu_agent.engine.sampling_batch import Row, prepare
from services.gpu_agent.engine.sampling_params import Grammar, GrammarKind, SamplingParams

EOS = 2
VOCABULARY = 300  # more than the tokenizer has, and no multiple of 32
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and a few longer ones."""
    pieces = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", '{"']
    bpe = models.BPE({t: i for i, t in enumerate(pieces)}, [("a", "b"), ("{", '"')], unk_token="<unk>")
    backend = Tokenizer(bpe)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def compiler(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> GrammarCompiler:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return GrammarCompiler(folder, VOCABULARY, {EOS})


def allowed(matcher: Matcher) -> set[int]:
    bits = np.unpackbits(matcher.mask.view(np.uint8), bitorder="little")
    return set(np.flatnonzero(bits).tolist())


def accepts(compiler: GrammarCompiler, tokenizer: PreTrainedTokenizerFast, grammar: Grammar, text: str) -> bool:
    """Whether a whole answer is in the grammar; asks the mask before each token."""
    matcher = compiler.matcher(grammar)
    for token in [*tokenizer.encode(text, add_special_tokens=False), EOS]:
        if token not in allowed(matcher):
            with pytest.raises(GrammarError, match=f"token {token}"):
                matcher.accept(token)
            return False
        matcher.accept(token)
    return matcher.is_terminated


@pytest.mark.parametrize(
    ("kind", "text", "inside", "outside"),
    [
        ("json_schema", json.dumps(SCHEMA), ['{"name": "a", "age": 7}', '{"name":"éü","age":150}'], ["{}", "[]"]),
        ("json_schema", json.dumps(SCHEMA), ['{"name": "ab", "age": 7}'], ['{"name": "a", "age": 151}', '{"age": 7}']),
        ("json_schema", '{"type": "string"}', ['"a\\n\\u00e9\\""'], ['"\n"', '"a']),
        ("json_schema", '{"type": "string", "maxLength": 3}', ['""', '"é😀x"'], ['"\t"', '"abcd"', '"\x11"']),
        ("json_object", "", ["{}", '{"a": [1, null, {"b": "ü"}]}'], ["[]", "3", '{"a": }', ""]),
        ("regex", "[a-c]{2,3}|x+", ["ab", "abc", "xxxx"], ["a", "abca", "", "xa"]),
        ("ebnf", 'root ::= "<" word ">"\nword ::= [a-z]+', ["<ab>", "<z>"], ["<>", "ab"]),
        (
            "choice",
            json.dumps(['a"b', "x\n\x01y", "😀", "é/\\", "ab"]),
            ['a"b', "x\n\x01y", "😀", "é/\\", "ab"],
            ["a", "😁"],
        ),
    ],
)
def test_each_kind_admits_its_language(
    compiler: GrammarCompiler,
    tokenizer: PreTrainedTokenizerFast,
    kind: str,
    text: str,
    inside: list[str],
    outside: list[str],
) -> None:
    grammar = Grammar(GrammarKind(kind), text)
    assert [t for t in inside if not accepts(compiler, tokenizer, grammar, t)] == []
    assert [t for t in outside if accepts(compiler, tokenizer, grammar, t)] == []


def test_only_tokens_of_the_vocabulary_are_allowed_where_everything_fits(compiler: GrammarCompiler) -> None:
    tokens = allowed(compiler.matcher(Grammar(GrammarKind.REGEX, "(.|\n)*")))
    assert EOS in tokens
    assert max(tokens) < 261  # the rest of the logits belong to no token


def test_the_end_comes_only_where_the_grammar_may_end(compiler: GrammarCompiler) -> None:
    matcher = compiler.matcher(Grammar(GrammarKind.CHOICE, '["ab"]'))
    assert EOS not in allowed(matcher)
    for token in sorted(allowed(matcher))[-1:]:  # the token of the whole word
        matcher.accept(token)
    assert allowed(matcher) == {EOS}
    matcher.accept(EOS)
    assert matcher.is_terminated
    with pytest.raises(GrammarError):
        matcher.accept(EOS)


def answer_of(
    compiler: GrammarCompiler, params: SamplingParams, seed: int, begin: list[int] | None = None
) -> list[int]:
    """What is drawn from random logits, from behind `begin` on; the row is one of three."""
    tokens = list(begin or [])
    assert params.grammar
    matcher = compiler.matcher(params.grammar, tokens)
    while len(tokens) < params.max_tokens and not matcher.is_terminated:
        generator = torch.Generator().manual_seed(1000 * seed + len(tokens))
        logits = torch.randn(3, VOCABULARY, generator=generator) * 3
        other = Row(SamplingParams(9), len(tokens))
        rows = [other, Row(params, len(tokens), matcher=matcher), other]
        token = sample(logits, prepare(rows, VOCABULARY, frozenset({EOS}))).choices()[1].token
        matcher.accept(token)
        tokens.append(token)
    return tokens


@pytest.mark.parametrize("seed", range(5))
def test_an_answer_that_ends_is_in_the_language(
    compiler: GrammarCompiler, tokenizer: PreTrainedTokenizerFast, seed: int
) -> None:
    params = SamplingParams(500, grammar=Grammar(GrammarKind.JSON_SCHEMA, json.dumps(SCHEMA)), seed=seed)
    answer = answer_of(compiler, params, seed)
    assert answer[-1] == EOS
    value = json.loads(tokenizer.decode(answer[:-1]))
    assert set(value) == {"name", "age"}
    assert 0 <= value["age"] <= 150
    # The same when it is resumed from the middle on.
    assert answer_of(compiler, params, seed, answer[: len(answer) // 2]) == answer


def test_rows_without_a_grammar_are_left_alone(compiler: GrammarCompiler) -> None:
    logits = torch.zeros(2, VOCABULARY)
    logits[0, 299] = 9.0
    logits[1, 299] = 9.0
    params = SamplingParams(1, temperature=0.0)
    strict = SamplingParams(1, temperature=0.0, grammar=Grammar(GrammarKind.REGEX, "b"))
    matcher = compiler.matcher(Grammar(GrammarKind.REGEX, "b"))
    batch = prepare([Row(params, 0), Row(strict, 0, matcher=matcher)], VOCABULARY)
    assert [c.token for c in sample(logits, batch).choices()] == [299, min(allowed(matcher))]


def test_min_tokens_gives_way_where_the_grammar_has_ended(compiler: GrammarCompiler) -> None:
    grammar = Grammar(GrammarKind.REGEX, "a|bb*")
    a, b = sorted(allowed(compiler.matcher(grammar)))
    params = SamplingParams(9, min_tokens=5, grammar=grammar)
    assert answer_of(compiler, params, 0, [a]) == [a, EOS]  # nothing but the end can follow
    for seed in range(8):
        answer = answer_of(compiler, params, seed, [b])
        assert answer[:5] == [b] * 5


@pytest.mark.parametrize(
    ("kind", "text", "fault"),
    [
        ("json_schema", '{"type":', "not JSON"),
        ("json_schema", '{"type": "nonsense"}', 'Unsupported type "nonsense"'),
        ("json_schema", '{"$ref": "#/nope"}', "nope"),
        ("json_schema", "[1]", "object or bool"),
        ("json_schema", '{"type": "number", "maximum": 1e400}', "1e400 is out of range"),
        ("json_schema", '{"enum": [NaN]}', "NaN is out of range"),
        ("json_schema", '{"minimum": 5, "maximum": 1, "type": "integer"}', "minimum greater than maximum"),
        ("json_schema", '{"items":' * 70 + "{}" + "}" * 70, "more than 64 deep"),
        ("json_schema", '{"items":' * 100_000 + "{}" + "}" * 100_000, "JSON schema is"),
        ("json_schema", '{"anyOf": [{"$ref": "#"}]}', "neither go on"),
        ("regex", "((", "position 3: The parenthesis is not closed"),
        ("regex", "a(?=b)", "Lookahead"),
        ("regex", "\ud800", "surrogates"),
        ("ebnf", 'start ::= "a"', 'root rule with name "root" is not found'),
        ("ebnf", "root ::= b", 'Rule "b" is not defined'),
        ("ebnf", 'root ::= root "a"', "neither go on"),
        ("choice", '"a"', "JSON list"),
        ("choice", "[]", "JSON list"),
        ("choice", '["a", 1]', "JSON list"),
        ("choice", "[", "not JSON"),
        ("choice", '["\\ud800"]', "surrogates"),
    ],
)
def test_a_fault_in_a_grammar_is_named(compiler: GrammarCompiler, kind: str, text: str, fault: str) -> None:
    with pytest.raises(GrammarError, match=re.escape(fault)) as error:
        compiler.matcher(Grammar(GrammarKind(kind), text))
    assert ".cc:" not in str(error.value)


def test_a_grammar_has_a_text_where_its_kind_needs_one() -> None:
    with pytest.raises(ValueError, match="needs a text"):
        Grammar(GrammarKind.REGEX)
    with pytest.raises(ValueError, match="needs no text"):
        Grammar(GrammarKind.JSON_OBJECT, "{}")


def test_a_grammar_that_takes_longer_and_longer_is_given_up(
    compiler: GrammarCompiler, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Its tokens are followed in the engine's thread: 900 of them would hold all models up for minutes."""
    grammar = Grammar(GrammarKind.EBNF, 'root ::= x x x x x x\nx ::= "" | "a" x | x x')
    (a,) = tokenizer.encode("a", add_special_tokens=False)
    with pytest.raises(GrammarError, match="too long to follow"):
        compiler.matcher(grammar, [a] * 900)


def test_an_answer_outside_the_grammar_cannot_be_resumed(compiler: GrammarCompiler) -> None:
    with pytest.raises(GrammarError, match="token 0 does not fit"):
        compiler.matcher(Grammar(GrammarKind.REGEX, "a"), [0])


def test_a_model_without_a_tokenizer_refuses_grammars_only(tmp_path: Path) -> None:
    compiler = GrammarCompiler(tmp_path, VOCABULARY, {EOS})
    with pytest.raises(GrammarError, match="tokenizer, which cannot be loaded"):
        compiler.matcher(Grammar(GrammarKind.JSON_OBJECT))
    with pytest.raises(GrammarError, match="end-of-sequence"):
        GrammarCompiler(tmp_path, VOCABULARY, ()).matcher(Grammar(GrammarKind.JSON_OBJECT))


def test_a_row_with_a_grammar_needs_its_matcher() -> None:
    params = SamplingParams(1, grammar=Grammar(GrammarKind.JSON_OBJECT))
    assert params.needs_last_token
    with pytest.raises(ValueError, match="matcher"):
        prepare([Row(params, 0)], VOCABULARY)
