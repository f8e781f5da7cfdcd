"""A private etcd and a private Redis as child processes, with their data in a folder of ours."""

from __future__ import annotations

import socket
import subprocess
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from launcher.children import Child, find_program, free_port

_START_S = 60.0


@dataclass
class Backing:
    """A running etcd or Redis."""

    child: Child
    address: str  # host:port
    version: str  # what `--version` says, with the program's path


def start_etcd(data: Path, log: Path, port: int = 0) -> Backing:
    """Starts etcd on 127.0.0.1 and waits until it answers. Raises ChildFailedError where it ends instead."""
    program = find_program("etcd")
    client, peer = f"http://127.0.0.1:{port or free_port()}", f"http://127.0.0.1:{free_port()}"
    child = Child(
        "etcd",
        [
            program,
            "--name=warmserve",
            f"--data-dir={data}",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=warmserve={peer}",
            "--auto-compaction-retention=1h",
            "--log-level=warn",
        ],
        log,
    )

    def answers() -> bool:
        try:
            with urllib.request.urlopen(f"{client}/health", timeout=1) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    _wait(child, answers)
    return Backing(child, client.removeprefix("http://"), _version(program))


def start_redis(data: Path, log: Path, port: int = 0) -> Backing:
    """Starts Redis on 127.0.0.1, keeping its data on disk, and waits until it answers."""
    program = find_program("redis-server")
    port = port or free_port()
    data.mkdir(parents=True, exist_ok=True)
    child = Child(
        "redis",
        [program, "--bind", "127.0.0.1", "--port", str(port), "--dir", str(data), "--appendonly", "yes", "--save", ""],
        log,
    )

    def answers() -> bool:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(64).startswith(b"+PONG")
        except OSError:
            return False

    _wait(child, answers)
    return Backing(child, f"127.0.0.1:{port}", _version(program))


def _wait(child: Child, answers: object) -> None:
    assert callable(answers)
    deadline = time.monotonic() + _START_S
    while not answers():
        child.check()
        if time.monotonic() > deadline:
            child.stop(1)
            raise TimeoutError(f"{child.name} did not answer within {_START_S:.0f} s; its log is {child.log}")
        time.sleep(0.02)


def _version(program: str) -> str:
    text = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    return f"{text.splitlines()[0]} ({program})"
