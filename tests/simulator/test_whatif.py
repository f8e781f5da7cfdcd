"""`warmctl simulate`, from its files to its answer, on the real simulator."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from simulator.cli import app
from tests.simulator.test_whatif_input import FORMATS

MODELS = "models:\n  chat: {parameters: 8e9}\n  code: {parameters: 1.2e9}\n"
runner = CliRunner()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "models.yaml").write_text(MODELS)
    chance = random.Random(1)
    lines, at = ["time,model,prompt_tokens,output_tokens"], 0.0
    for _ in range(400):
        at += chance.expovariate(2.0)
        lines.append(
            f"{at:.3f},{chance.choice(('chat', 'chat', 'code'))},{chance.randint(10, 1500)},{chance.randint(2, 200)}"
        )
    (tmp_path / "my.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def simulate(folder: Path, *arguments: str, trace: str = "my.csv") -> Any:
    return runner.invoke(app, ["--trace", str(folder / trace), "--models", str(folder / "models.yaml"), *arguments])


def figures(folder: Path, *arguments: str, trace: str = "my.csv") -> dict[str, Any]:
    result = simulate(folder, "-o", "json", *arguments, trace=trace)
    assert result.exit_code == 0, result.output
    document: dict[str, Any] = json.loads(result.stdout)
    for name in ("wall_seconds", "plan_seconds"):  # of real time
        del document["result"][name]
    return document


def test_traffic_is_answered_and_told_per_model(folder: Path) -> None:
    result = simulate(folder, "--gpus", "2")
    assert result.exit_code == 0, result.output
    assert "400 requests to 2 models" in result.stdout
    document = figures(folder, "--gpus", "2")
    models = document["result"]["models"]
    assert sum(model["requests"] for model in models.values()) == 400
    assert document["result"]["unserved"] == 0
    assert 0 < document["result"]["ttft_s"]["p50"] <= document["result"]["ttft_s"]["p99"] < 10
    assert document["gpu_hours"]["chat"] > 0


def test_the_same_question_has_the_same_answer(folder: Path) -> None:
    one, again = (figures(folder, "--gpus", "2", "--target-ttft", "0.5", "--seed", "3") for _ in range(2))
    assert one == again


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_can_be_simulated(folder: Path, name: str) -> None:
    (folder / name).write_text(FORMATS[name])
    document = figures(folder, "--gpus", "1", "--model", "chat", trace=name)
    assert document["result"]["models"]["chat"]["requests"] == 2
    assert document["result"]["unserved"] == 0


def test_windows_can_be_simulated(folder: Path) -> None:
    (folder / "w.csv").write_text("window_start,model,rate,window_s\n0,chat,0.2,300\n300,code,0.2,300\n")
    document = figures(folder, "--gpus", "1", trace="w.csv")
    assert document["result"]["models"]["chat"]["requests"] == 60
    assert any("windows" in remark for remark in document["remarks"])


def test_what_counts_for_the_only_model_is_said(folder: Path) -> None:
    (folder / "models.yaml").write_text("models:\n  chat: {parameters: 8e9, min_replicas: 1}\n")
    document = figures(folder, "--gpus", "1")
    assert document["result"]["models"]["chat"]["requests"] == 400
    assert any("count for chat, the only model, those for code as well" in remark for remark in document["remarks"])
    # A GPU has no more hours than there were, whatever stands before the first request.
    assert document["gpu_hours"]["chat"] <= document["result"]["duration_s"] / 3600 + 0.001


def test_one_client_of_many_has_its_own_traffic_alone(folder: Path) -> None:
    lines = [f"m,{client},{600 * at},{rate}" for at in range(2) for client, rate in ((0, 0.1), (1, 5.0))]
    (folder / "s.csv").write_text("\n".join(["model,client,window_start_s,rate_per_s", *lines]))
    (folder / "models.yaml").write_text("models:\n  m/0: {parameters: 1.2e9}\n")
    document = figures(folder, "--gpus", "1", trace="s.csv")
    assert 60 <= document["result"]["models"]["m/0"]["requests"] <= 180  # 0.1 a second
    assert "1 clients of the trace are not in the models file and left out" in document["remarks"]
    (folder / "models.yaml").write_text("models:\n  org/a: {parameters: 1.2e9}\n")
    assert "models file does not have" in simulate(folder, "--gpus", "1", trace="s.csv").output


def test_lengths_that_a_trace_does_not_tell_are_said_to_be_assumed(folder: Path) -> None:
    (folder / "my.jsonl").write_text('{"time": 1, "model": "chat"}\n{"time": 2, "model": "code"}\n')
    assert any("tells no lengths" in remark for remark in figures(folder, "--gpus", "1", trace="my.jsonl")["remarks"])


def test_windows_of_a_model_that_the_file_lacks_are_refused_whatever_others_are_called(folder: Path) -> None:
    (folder / "models.yaml").write_text("models:\n  org/a: {parameters: 8e9}\n  b: {parameters: 8e9}\n")
    (folder / "w.csv").write_text("window_start,model,rate,window_s\n0,org/a,0.2,300\n0,org/c,50,300\n")
    result = simulate(folder, "--gpus", "1", trace="w.csv")
    assert result.exit_code != 0
    assert "'org/c'" in result.output


def test_a_target_tells_how_many_gpus(folder: Path) -> None:
    easy = figures(folder, "--gpus", "4", "--target-ttft", "20")
    assert easy["gpus_needed"] == 1
    assert {trial["gpus"] for trial in easy["tried"]} >= {4, 1}
    never = figures(folder, "--gpus", "4", "--target-ttft", "0.001")
    assert never["gpus_needed"] is None
    assert all(trial["missed"] for trial in never["tried"])
    said = simulate(folder, "--gpus", "4", "--target-ttft", "0.001").stdout
    assert "No number of GPUs up to" in said
    assert "Above their target: " in said


def test_fewer_gpus_than_a_model_needs_are_a_trial_that_says_why(folder: Path) -> None:
    (folder / "models.yaml").write_text(MODELS.replace("1.2e9", "1.2e9, tp: 2"))
    document = figures(folder, "--gpus", "4", "--target-ttft", "20")
    assert document["gpus_needed"] == 2
    assert "code is spread over 2 GPUs" in next(t["impossible"] for t in document["tried"] if t["gpus"] == 1)


def test_the_report_needs_nothing_else(folder: Path) -> None:
    result = simulate(folder, "--gpus", "2", "--target-ttft", "5", "--html", str(folder / "report.html"))
    assert result.exit_code == 0, result.output
    page = (folder / "report.html").read_text()
    assert re.findall(r'(?:src|href|url)\s*[=(]\s*["\']?(?!data:)[^"\'\s>]+', page) == []
    assert "<script" not in page
    assert page.count("data:image/png;base64,") == 6
    for words in ("chat", "code", "GPUs and the target", "warmctl simulate"):
        assert words in page


def test_a_model_name_cannot_break_the_report(folder: Path) -> None:
    (folder / "models.yaml").write_text('models: {"<b>&": {parameters: 1e9}}\n')
    result = simulate(folder, "--gpus", "1", "--model", "<b>&", "--html", str(folder / "report.html"))
    assert result.exit_code == 0, result.output
    page = (folder / "report.html").read_text()
    assert "<b>" not in page
    assert "&lt;b&gt;&amp;" in page


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--gpus", "0"), "there must be at least one GPU"),
        (("--gpus", "12"), "8 or 16"),
        (("--gpus", "1", "--model", "chta"), "did you mean 'chat'?"),
        (("--gpus", "1", "--html", "/nowhere/report.html"), "/nowhere/report.html cannot be written"),
    ],
)
def test_wrong_questions_are_refused_with_words(folder: Path, arguments: tuple[str, ...], words: str) -> None:
    result = simulate(folder, *arguments)
    assert result.exit_code == 1
    assert words in result.stderr
    assert "Traceback" not in result.stderr


def test_a_model_too_large_is_named(folder: Path) -> None:
    (folder / "models.yaml").write_text("models: {chat: {parameters: 70e9}, code: {parameters: 1e9}}\n")
    result = simulate(folder, "--gpus", "2")
    assert result.exit_code == 1
    assert "chat is too large" in result.stderr
    assert "tp: " in result.stderr


def test_the_example_can_be_printed_alone() -> None:
    result = runner.invoke(app, ["--example-models"])
    assert result.exit_code == 0
    assert result.stdout.startswith("# Models for `warmctl simulate`")


def test_warmctl_hands_its_arguments_and_its_output_over(folder: Path) -> None:
    command = [sys.executable, "-m", "warmserve.admin.cli", "-o", "json", "simulate", "--gpus", "1"]
    command += ["--trace", str(folder / "my.csv"), "--models", str(folder / "models.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["result"]["requests"] == 400
    refused = subprocess.run([*command, "--gpus", "0"], capture_output=True, text=True, timeout=120, check=False)
    assert refused.returncode == 1
    assert "at least one GPU" in refused.stderr
    helped = subprocess.run(
        [*command[:3], "simulate", "--help"], capture_output=True, text=True, timeout=120, check=False
    )
    assert "--target-ttft" in helped.stdout


def test_without_the_simulator_warmctl_says_what_to_install(tmp_path: Path) -> None:
    # The SDK alone: a Python that finds warmserve and nothing else of this repository.
    program = (
        "import importlib.util, sys\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'simulator' else find(name, *rest)\n"
        "sys.argv = ['warmctl', 'simulate', '--gpus', '1']\n"
        "from warmserve.admin.cli import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "pip install 'warmserve-server[simulator]'" in done.stderr
