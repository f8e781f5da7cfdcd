"""Child processes: started, waited for, stopped in order, and never left behind."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

# Run by a Python of its own, which then becomes the child: asks the kernel (PR_SET_PDEATHSIG is 1) for a signal when
# the launcher's thread that started it ends, and gives up where the launcher ended before that. Not a preexec_fn,
# because forking beside the threads of gRPC may hang.
_LEASH = (
    "import ctypes, os, sys\n"
    "ctypes.CDLL(None).prctl(1, int(sys.argv[1]), 0, 0, 0)\n"
    "if os.getppid() != int(sys.argv[2]): os._exit(1)\n"
    "os.execv(sys.argv[3], sys.argv[3:])\n"
)


class ChildFailedError(RuntimeError):
    """A child ended although it was meant to run."""


class Child:
    """One child process with a log file.

    It gets `death_signal` when the thread that made it ends, however it ends, so make children in the main thread.
    `keep_open` are file descriptors that the child inherits.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log: Path,
        environment: Mapping[str, str] | None = None,
        *,
        death_signal: signal.Signals = signal.SIGTERM,
        keep_open: Sequence[int] = (),
    ) -> None:
        self.name = name
        self.log = log
        self.command = list(command)
        leash = [sys.executable, "-ISc", _LEASH, str(int(death_signal)), str(os.getpid())]
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as sink:
            self.process = subprocess.Popen(
                [*leash, find_program(self.command[0]), *self.command[1:]],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                start_new_session=True,  # Ctrl-C reaches the launcher alone, which stops its children in order
                pass_fds=tuple(keep_open),
            )

    @property
    def running(self) -> bool:
        """Whether the process is still there."""
        return self.process.poll() is None

    def check(self) -> None:
        """Raises ChildFailedError, with the end of the log, where the process has ended."""
        if not self.running:
            raise ChildFailedError(
                f"{self.name} ended with status {self.process.returncode}; the end of {self.log}:\n{self.log_tail()}"
            )

    def log_tail(self, lines: int = 15) -> str:
        """The last lines of the log, indented."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return "\n".join(f"  {line}" for line in text.splitlines()[-lines:])

    async def ended(self) -> int:
        """Waits for the process to end; returns its status."""
        while self.process.poll() is None:
            loop, gone = asyncio.get_running_loop(), asyncio.Event()
            descriptor = os.pidfd_open(self.process.pid)  # readable once the process has ended
            loop.add_reader(descriptor, gone.set)
            try:
                await gone.wait()
            finally:
                loop.remove_reader(descriptor)
                os.close(descriptor)
        return int(self.process.returncode)

    def terminate(self) -> None:
        """Asks the process to end."""
        if self.running:
            self.process.terminate()

    def kill(self) -> None:
        """Ends the process at once."""
        if self.running:
            self.process.kill()

    def stop(self, grace_s: float) -> None:
        """Asks the process to end, and kills it after `grace_s` seconds."""
        self.terminate()
        try:
            self.process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    async def stop_gently(self, grace_s: float) -> bool:
        """Like `stop`, without blocking the event loop. Returns False where the process had to be killed."""
        self.terminate()
        try:
            await asyncio.wait_for(self.ended(), grace_s)
        except TimeoutError:
            self.kill()
            await self.ended()
            return False
        return True


def find_program(name: str) -> str:
    """A program on PATH, else beside this interpreter (where wheels put theirs). Raises FileNotFoundError."""
    beside = Path(sys.executable).parent / name
    found = shutil.which(name) or (str(beside) if beside.is_file() else None)
    if found is None:
        raise FileNotFoundError(
            f"{name} is not on PATH and not beside {sys.executable}: pip install 'warmserve-server[all]'"
        )
    return found
