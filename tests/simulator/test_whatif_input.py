"""What operators hand in: a models file, a trace of any format, a number of GPUs. What is wrong is said in words."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.models_file import EXAMPLE, ModelsFileError, read_models
from simulator.spec import ImpossibleError, ModelSpec, check
from simulator.trace_traffic import read_traffic
from simulator.whatif import cluster_of, fewest, with_target
from warmserve.traces import TraceError

LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "torch_dtype": "bfloat16",
}


def models_file(folder: Path, text: str) -> Path:
    file = folder / "models.yaml"
    file.write_text(text)
    return file


def two(folder: Path) -> list[ModelSpec]:
    return read_models(models_file(folder, "models:\n  chat: {parameters: 8e9}\n  code: {parameters: 1e9}\n"))


# The models file


def test_the_example_is_a_models_file(tmp_path: Path) -> None:
    models = read_models(models_file(tmp_path, EXAMPLE))
    assert [model.name for model in models] == ["chat", "code"]
    assert models[0].parameters == 8_000_000_000
    assert models[1].parameters == 32_000_000_000
    assert models[1].tp == 2
    assert models[0].ttft_s == 0.5
    check(cluster_of(8), models)


def test_the_commented_part_of_the_example_holds_too(tmp_path: Path) -> None:
    (tmp_path / "Llama-3.1-8B-Instruct").mkdir()
    (tmp_path / "Llama-3.1-8B-Instruct" / "config.json").write_text(json.dumps(LLAMA_8B))
    text = EXAMPLE.replace("  # support-chat:", "  support-chat:").replace("  #   config:", "    config:")
    assert [model.name for model in read_models(models_file(tmp_path, text))] == ["support-chat", "chat", "code"]


def test_a_config_gives_the_sizes_of_its_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    for where in (".", "config.json"):
        (model,) = read_models(models_file(tmp_path, f"models: {{m: {{config: {where}, context_tokens: 4096}}}}"))
        assert model.parameters == 8_030_261_248  # Llama 3.1 8B's, as published
        assert model.kv_bytes_per_token == 131_072
        assert (model.layers, model.hidden, model.context_tokens) == (32, 4096, 4096)


def test_a_size_alone_gives_a_usual_shape(tmp_path: Path) -> None:
    text = (
        "models: {a: {parameters: 8B}, b: {parameters: 70.6e9, tp: 4}, c: {parameters: 100M}, d: {parameters: 400e9}}"
    )
    a, b, c, d = read_models(models_file(tmp_path, text))
    assert (a.layers, a.kv_bytes_per_token) == (32, 131_072)
    assert (b.layers, b.kv_bytes_per_token) == (80, 327_680)
    assert c.layers == 8
    assert d.layers > 80


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("models: {chat: {parameters: huge}}", "model chat: parameters: 'huge' is no number"),
        ("models: {chat: {tp: 2}}", "model chat: give its size"),
        ("models: {chat: {parameters: 8e9, config: x}}", "model chat: give its size"),
        ("models: {chat: {parameters: 8e9, colour: red}}", "model chat: colour: is not known; known are config"),
        ("models: {chat: {parameters: -1}}", "model chat: parameters: Input should be greater than 0"),
        ("models: {chat: {config: nowhere}}", "model chat: .*No such file"),
        ("models: []", "expected `models:`"),
        ("- a", "expected `models:`"),
        ("models: {a: {", "cannot be read as YAML"),
    ],
)
def test_a_wrong_models_file_is_refused_with_words(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ModelsFileError, match=words):
        read_models(models_file(tmp_path, text))


def test_a_models_file_that_is_not_there_is_named_and_an_example_offered(tmp_path: Path) -> None:
    with pytest.raises(ModelsFileError, match=r"nope.yaml cannot be read: No such file.*--example-models"):
        read_models(tmp_path / "nope.yaml")


def test_lengths_that_an_access_log_does_not_tell_are_said_to_be_assumed(tmp_path: Path) -> None:
    log = tmp_path / "access.log"
    log.write_text('10.0.0.1 - - [01/Nov/2026:12:00:00 +0000] "POST /v1/chat/completions HTTP/1.1" 200 500 "-" "x"\n')
    (model,) = read_models(models_file(tmp_path, "models: {chat: {parameters: 8e9}}"))
    read = read_traffic(log, [model], model=None, seed=0)
    assert len(read.traffic) == 1
    assert any("tells no lengths" in remark for remark in read.remarks)


def test_a_mixture_of_experts_is_refused_and_told_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA_8B, "num_experts": 64}))
    with pytest.raises(ModelsFileError, match=r"mixture of experts .* give `parameters:`"):
        read_models(models_file(tmp_path, "models: {m: {config: .}}"))


def test_a_config_without_a_size_says_which(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 1}))
    with pytest.raises(ModelsFileError, match="its config lacks 'num_hidden_layers'"):
        read_models(models_file(tmp_path, "models: {m: {config: .}}"))


def test_a_target_is_for_models_that_have_none_of_their_own(tmp_path: Path) -> None:
    models = read_models(models_file(tmp_path, EXAMPLE))
    assert [model.ttft_s for model in with_target(models, 2.0)] == [0.5, 2.0]
    assert with_target(models, None) == tuple(models)


# Traces

FORMATS = {
    "azure.csv": "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,4,5\n2023-11-16 18:17:05,6,7\n",
    "burst.csv": "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5,chat,4,5,9,API log\n6,chat,6,7,13,API log\n",
    "own.csv": "time,model,prompt_tokens,output_tokens\n10,chat,4,5\n11,chat,6,7\n",
    "lines.jsonl": '{"time": 10, "model": "chat", "prompt_tokens": 4, "output_tokens": 5}\n'
    '{"time": 11, "model": "chat", "prompt_tokens": 6, "output_tokens": 7}\n',
    "access.log": '1.2.3.4 - - [10/Oct/2024:13:55:36 +0000] "POST /v1/chat/completions HTTP/1.1" 200 2326\n'
    '1.2.3.4 - - [10/Oct/2024:13:55:37 +0000] "POST /v1/chat/completions HTTP/1.1" 200 2326\n',
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_of_requests_becomes_traffic(tmp_path: Path, name: str) -> None:
    trace = tmp_path / name
    trace.write_text(FORMATS[name])
    read = read_traffic(trace, two(tmp_path), model="chat", seed=0)
    requests = list(read.traffic)
    assert [request.model for request in requests] == ["chat", "chat"]
    assert requests[0].time_s == 0
    assert 0.5 < requests[1].time_s < 1.5
    if name != "access.log":
        assert [(r.prompt_tokens, r.output_tokens) for r in requests] == [(4, 5), (6, 7)]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "servegen.csv",
            "model,client,window_start_s,rate_per_s\nchat,1,0,0.5\nchat,1,600,1\ncode,1,0,0.25\ncode,1,600,1\n",
        ),
        (
            "windows.csv",
            "window_start,model,rate,window_s\n0,chat,0.5,600\n600,chat,1,600\n0,code,0.25,600\n600,code,1,600\n",
        ),
        (
            "loads.csv",
            "window_start,model,load,window_s\n0,chat,0.79,600\n600,chat,1.58,600\n0,code,0.4,600\n600,code,1.58,600\n",
        ),
    ],
)
def test_windows_become_requests_at_their_rate(tmp_path: Path, name: str, text: str) -> None:
    trace = tmp_path / name
    trace.write_text(text)
    read = read_traffic(trace, two(tmp_path), model=None, seed=0)
    counts = np.bincount(read.traffic.model)
    assert counts.tolist() == pytest.approx([900, 750], rel=0.01)
    assert np.all(np.diff(read.traffic.times_s) >= 0)
    assert any("windows" in remark for remark in read.remarks)
    assert list(read_traffic(trace, two(tmp_path), model=None, seed=0).traffic) == list(read.traffic)


def test_servegens_clients_can_be_models_of_their_own(tmp_path: Path) -> None:
    trace = tmp_path / "servegen.csv"
    trace.write_text(
        "model,client,window_start_s,rate_per_s\n" + "".join(f"m,{c},{w},1\n" for c in (1, 2) for w in (0, 600))
    )
    models = read_models(models_file(tmp_path, "models: {m/2: {parameters: 8e9}, m/1: {parameters: 1e9}}"))
    assert np.bincount(read_traffic(trace, models, model=None, seed=0).traffic.model).tolist() == [1200, 1200]


def test_a_model_that_the_file_lacks_is_named_with_the_nearest(tmp_path: Path) -> None:
    trace = tmp_path / "own.csv"
    trace.write_text("time,model,prompt_tokens,output_tokens\n10,chatt,4,5\n10,zebra,4,5\n")
    with pytest.raises(TraceError, match=r"'chatt' \(did you mean 'chat'\?\), 'zebra' \(there are chat, code\)"):
        read_traffic(trace, two(tmp_path), model=None, seed=0)


def test_a_trace_without_models_needs_one_named(tmp_path: Path) -> None:
    trace = tmp_path / "azure.csv"
    trace.write_text(FORMATS["azure.csv"])
    with pytest.raises(TraceError, match=r"name one with --model \(chat, code\)"):
        read_traffic(trace, two(tmp_path), model=None, seed=0)
    with pytest.raises(TraceError, match=r"--model cht: there is no such model \(did you mean 'chat'\?\)"):
        read_traffic(trace, two(tmp_path), model="cht", seed=0)
    only = read_models(models_file(tmp_path, "models: {solo: {parameters: 8e9}}"))
    assert {request.model for request in read_traffic(trace, only, model=None, seed=0).traffic} == {"solo"}


def test_what_no_context_holds_is_cut_and_said(tmp_path: Path) -> None:
    trace = tmp_path / "own.csv"
    trace.write_text("time,model,prompt_tokens,output_tokens\n10,chat,100000,5\n11,chat,10,9000\n12,chat,0,0\n")
    read = read_traffic(trace, two(tmp_path), model=None, seed=0)
    assert [(r.prompt_tokens, r.output_tokens) for r in read.traffic] == [(8187, 5), (10, 4096), (1, 1)]
    assert any("2 of 3 requests were longer" in remark for remark in read.remarks)


def test_an_empty_trace_is_refused(tmp_path: Path) -> None:
    trace = tmp_path / "windows.csv"
    trace.write_text("window_start,model,rate,window_s\n0,chat,0,600\n")
    with pytest.raises(TraceError, match="no requests"):
        read_traffic(trace, two(tmp_path), model=None, seed=0)


# GPUs


@pytest.mark.parametrize("gpus", [0, -1, 12, 513, 600])
def test_impossible_numbers_of_gpus_are_refused(gpus: int) -> None:
    with pytest.raises(ImpossibleError, match=f"--gpus {gpus}"):
        cluster_of(gpus)


def test_clusters_are_one_node_or_whole_nodes() -> None:
    assert (cluster_of(3).nodes, cluster_of(3).gpus_per_node) == (1, 3)
    assert (cluster_of(24).nodes, cluster_of(24).gpus_per_node) == (3, 8)


SIZES = [*range(1, 9), *range(16, 513, 8)]


@given(enough=st.sampled_from([*SIZES, 1000]), start=st.sampled_from(SIZES), most=st.sampled_from([32, 128, 512]))
def test_the_search_finds_the_fewest_and_asks_little(enough: int, start: int, most: int) -> None:
    asked: list[int] = []

    def met(gpus: int) -> bool:
        assert gpus not in asked
        asked.append(gpus)
        return gpus >= enough

    most = max(most, start)
    assert fewest(met, start, most) == (enough if enough <= most else None)
    assert len(asked) <= 14
