"""A private etcd and a private Redis as child processes, with their data in a folder of ours."""

from __future__ import annotations

import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.children import Child, find_program
from launcher.ports import free_port

_START_S = 60.0


@dataclass
class Backing:
    """An etcd or Redis that was started."""

    child: Child
    address: str  # host:port
    answers: Callable[[], bool]  # whether it answers now; blocks for up to a second

    def wait(self) -> Backing:
        """Waits until it answers. Raises ChildFailedError where it ends instead, TimeoutError after a minute."""
        deadline = time.monotonic() + _START_S
        while not self.answers():
            self.child.check()
            if time.monotonic() > deadline:
                self.child.stop(1)
                raise TimeoutError(f"{self.child.name} did not answer within {_START_S:.0f} s; see {self.child.log}")
            time.sleep(0.02)
        return self


def version(program: str) -> str:
    """What `etcd` or `redis-server` says of its version, and which file it is."""
    path = find_program(program)
    text = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    return f"{text.splitlines()[0]} ({path})"


def start_etcd(data: Path, log: Path, port: int = 0) -> Backing:
    """Starts etcd on 127.0.0.1, on a free port unless told otherwise, and waits until it answers."""
    return etcd(data, log, port or free_port(), free_port()).wait()


def start_redis(data: Path, log: Path, port: int = 0) -> Backing:
    """Starts Redis on 127.0.0.1, on a free port unless told otherwise, and waits until it answers."""
    return redis(data, log, port or free_port()).wait()


def etcd(data: Path, log: Path, port: int, peer_port: int, keep_open: Sequence[int] = ()) -> Backing:
    """Starts etcd on 127.0.0.1."""
    program = find_program("etcd")
    client, peer = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{peer_port}"
    command = [
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
    ]
    child = Child("etcd", command, log, keep_open=keep_open)

    def answers() -> bool:
        try:
            with urllib.request.urlopen(f"{client}/health", timeout=1) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    return Backing(child, client.removeprefix("http://"), answers)


def redis(data: Path, log: Path, port: int, keep_open: Sequence[int] = ()) -> Backing:
    """Starts Redis on 127.0.0.1, keeping its data on disk."""
    program = find_program("redis-server")
    data.mkdir(parents=True, exist_ok=True)
    command = [program, "--bind", "127.0.0.1", "--port", str(port), "--dir", str(data), "--appendonly", "yes"]
    child = Child("redis", [*command, "--save", ""], log, keep_open=keep_open)

    def answers() -> bool:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(64).startswith(b"+PONG")
        except OSError:
            return False

    return Backing(child, f"127.0.0.1:{port}", answers)
