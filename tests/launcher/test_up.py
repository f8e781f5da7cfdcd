"""`warmserve up` end to end: real services, real etcd and Redis, as a user runs it."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.folder import DataFolder, ports_of
from launcher.ports import is_free
from tests.launcher.launcher_process import UpProcess, alive, wait_until

SMALL = ("--agents", "1", "--arena-bytes", "256MiB")


@pytest.fixture
def started() -> Iterator[list[UpProcess]]:
    """Launchers that are discarded at the test's end."""
    launchers: list[UpProcess] = []
    yield launchers
    for launcher in launchers:
        launcher.discard()


def run_curl(line: str) -> dict[str, Any]:
    """Runs the printed line in a shell; where there is no curl, sends what it says."""
    if shutil.which("curl"):
        text = subprocess.run(line, shell=True, capture_output=True, text=True, check=True, timeout=120).stdout
        return dict(json.loads(text))
    words = shlex.split(line)
    headers = dict([words[words.index("-H") + 1].split(": ")])
    body = words[words.index("-d") + 1].encode()
    request = urllib.request.Request(next(word for word in words if word.startswith("http")), body, headers)
    with urllib.request.urlopen(request, timeout=120) as answer:
        return dict(json.load(answer))


def curl_line(launcher: UpProcess) -> str:
    return launcher.wait_for(r"^  (curl .*)$", 1.0).group(1)


def assert_answers(launcher: UpProcess, model: str) -> None:
    answer = run_curl(curl_line(launcher))
    assert answer["model"] == model
    assert answer["usage"]["completion_tokens"] > 0


def assert_nothing_left(pids: list[int], data: Path) -> None:
    assert pids
    wait_until(lambda: not any(alive(pid) for pid in pids), "all children end", 30.0)
    # A killed process counts as dead a moment before the kernel has closed its sockets.
    wait_until(lambda: all(is_free(port) for port in ports_of(data).values()), "all ports are free", 10.0)


def test_up_serves_restarts_what_dies_and_knows_its_models_again(tmp_path: Path, started: list[UpProcess]) -> None:
    data = tmp_path / "one"
    first = UpProcess(data, *SMALL, "--demo-models")
    started.append(first)
    first.wait_until_running()
    assert first.wait_for(r"^Models: (.*)$").group(1) == "tiny-llama, tiny-mistral, tiny-qwen3"
    first.wait_for(r"^etcd: .*etcd.* \(/.*\)$")
    first.wait_for(r"^Redis: .*\(/.*\)$")
    assert_answers(first, "tiny-llama")
    with urllib.request.urlopen(first.value("metrics"), timeout=10) as metrics:
        assert b"process_cpu_seconds_total" in metrics.read()

    # warmctl finds the cluster with the lines that were printed.
    exports = dict(pair.split("=", 1) for pair in _all(first, r"^  export (\S+)$"))
    listed = subprocess.run(
        [sys.executable, "-m", "warmserve.admin.cli", "models", "list", "-o", "json"],
        env={**os.environ, **exports},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "tiny-qwen3" in listed.stdout

    # A replay finds the system by its folder, and loses nothing.
    figures = tmp_path / "figures.json"
    flags = ["--duration", "4", "--rate", "3", "--tokens", "0.02", "--period", "2", "--max-output", "8", "--json"]
    replayed = subprocess.run(
        [sys.executable, "-m", "launcher.cli", "replay", "--data", data, *flags, figures],
        capture_output=True,
        text=True,
    )
    assert replayed.returncode == 0, replayed.stdout + replayed.stderr
    report = json.loads(figures.read_text())
    assert report["requests"] > 0
    assert report["lost"] == 0
    assert sum(latency["requests"] for latency in report["by_state"].values()) == report["requests"]

    # A second launcher on the same folder is refused, and the first does not mind.
    refused = UpProcess(data)
    started.append(refused)
    assert refused.process.wait(60) == 1
    refused.wait_for(rf"in use by the launcher with process id {first.process.pid}")
    assert "Traceback" not in refused.output

    # Each child may die and comes back; etcd and Redis with their data.
    for name, command in {
        "router": "services.router",
        "agent-0": "services.gpu_agent",
        "placer": "services.placer",
        "forecaster": "services.forecaster",
        "redis": "redis-server",
        "etcd": "--listen-client-urls",
    }.items():
        os.kill(first.pid_of(command), signal.SIGKILL)
        first.wait_for(rf"^{name} was ended by SIGKILL; starting it again")
        first.wait_for(rf"^{name} is back")
    assert_answers(first, "tiny-llama")

    endpoint, children = first.value("OpenAI HTTP"), first.children()
    assert len(children) == 6
    assert first.stop(signal.SIGTERM) == 0
    assert "Traceback" not in first.output
    assert_nothing_left(children, data)

    # Started again it is where it was, and knows its models.
    second = UpProcess(data, *SMALL)
    started.append(second)
    second.wait_until_running()
    assert second.value("OpenAI HTTP") == endpoint
    assert_answers(second, "tiny-llama")

    # Another runs beside it, in another folder.
    other = UpProcess(tmp_path / "two", "--agents", "1", "--arena-bytes", "64MiB")
    started.append(other)
    other.wait_until_running()
    other.wait_for(r"^No model is deployed")
    other.wait_for(r"warmctl models deploy")
    assert other.value("OpenAI HTTP") != endpoint
    assert_answers(second, "tiny-llama")
    children = other.children()
    assert other.stop(signal.SIGINT) == 0
    assert_nothing_left(children, tmp_path / "two")

    # Killed hard, it leaves nothing behind either, and the folder is free for the next.
    children = second.children()
    second.stop(signal.SIGKILL)
    assert_nothing_left(children, data)
    with DataFolder(data) as folder:
        assert folder.ports.take("router-http") == int(endpoint.removesuffix("/v1").rpartition(":")[2])


def _all(launcher: UpProcess, pattern: str) -> list[str]:
    return re.findall(pattern, launcher.output, re.MULTILINE)


def test_a_port_that_is_taken_is_refused_by_name(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        launcher = UpProcess(tmp_path, "--http-port", str(port))
        assert launcher.process.wait(60) == 1
        launcher.wait_for(rf"port {port} of 127.0.0.1 is in use")
    assert "Traceback" not in launcher.output


@pytest.mark.parametrize(
    "arguments", [["--arena-bytes", "much"], ["--agents", "0"], ["--model-root", "/no/such/folder"]]
)
def test_bad_flags_are_refused_with_a_reason(tmp_path: Path, arguments: list[str]) -> None:
    launcher = UpProcess(tmp_path, *arguments)
    assert launcher.process.wait(60) == 2
    launcher.wait_for("Invalid value")
    assert "Traceback" not in launcher.output


def test_a_service_that_cannot_start_ends_the_launcher_with_its_log(tmp_path: Path) -> None:
    launcher = UpProcess(tmp_path, "--arena-bytes", "1")
    children = launcher.process.pid
    assert launcher.process.wait(120) == 1
    launcher.wait_for(r"^warmserve: agent-\d ended with status")
    assert not alive(children)
