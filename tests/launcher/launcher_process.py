"""`warmserve up` as a process, and what a user sees of it."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path


class UpProcess:
    """A running `warmserve up`; its output is read as it comes."""

    def __init__(self, data: Path, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "launcher.cli", "up", "--data", str(data), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._lines: list[str] = []
        self._changed = threading.Condition()
        self._ended = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def output(self) -> str:
        """All of it so far."""
        with self._changed:
            return "\n".join(self._lines)

    def wait_for(self, pattern: str, timeout_s: float = 120.0) -> re.Match[str]:
        """Waits for output that matches."""
        with self._changed:
            matched = self._changed.wait_for(lambda: self._ended or self._search(pattern), timeout_s)
            found = self._search(pattern)
        assert found is not None, f"{'ended' if matched else 'waited'} without {pattern!r}:\n{self.output}"
        return found

    def wait_until_running(self) -> None:
        """Waits until it says that it runs."""
        self.wait_for(r"^Running; Ctrl-C")

    def value(self, label: str) -> str:
        """What it printed behind a label, for example the endpoint behind "OpenAI HTTP"."""
        return self.wait_for(rf"^{re.escape(label)} +(\S+)", 1.0).group(1)

    def children(self) -> list[int]:
        """Process ids of its children."""
        threads = Path(f"/proc/{self.process.pid}/task").iterdir()
        return [int(child) for thread in threads for child in (thread / "children").read_text().split()]

    def pid_of(self, service: str) -> int:
        """The process id of the child whose command line has `service` in it."""
        (found,) = [pid for pid in self.children() if service in command_line(pid)]
        return found

    def stop(self, number: int, timeout_s: float = 60.0) -> int:
        """Sends a signal and waits for the end; returns the status."""
        self.process.send_signal(number)
        status = self.process.wait(timeout_s)
        self._reader.join(10)
        return status

    def discard(self) -> None:
        """Ends it, for the end of a test that failed half way."""
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
            self.process.wait()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._changed:
                self._lines.append(line.rstrip("\n"))
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _search(self, pattern: str) -> re.Match[str] | None:
        return re.search(pattern, "\n".join(self._lines), re.MULTILINE)


def command_line(pid: int) -> str:
    """A process's command line; empty where it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def alive(pid: int) -> bool:
    """Whether the process runs; one that only waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
    """Polls; for what other processes do without telling us."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s:.0f} s in vain: {what}"
        time.sleep(0.05)
