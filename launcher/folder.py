"""A cluster's data folder: one launcher at a time, and what survives a restart."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from types import TracebackType

from launcher.ports import Ports, read_ports

_LEFTOVERS_S = 30.0


class FolderError(RuntimeError):
    """A data folder cannot be used."""


class FolderInUseError(FolderError):
    """Another launcher, or what is left of one, holds the folder."""


def default_data_folder() -> Path:
    """Where `warmserve up` keeps its data unless told otherwise."""
    base = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(base) / "warmserve"


def ports_of(folder: Path) -> dict[str, int]:
    """The ports of the cluster in `folder` by name, as of its last start; empty where there was none."""
    return read_ports(folder / "ports.json")


class DataFolder:
    """The folder, locked. Made where it is not there; raises FolderError where it cannot be had.

    The lock (flock) belongs to the open file, which children inherit: so it is held until the last of them has ended,
    even when the launcher was killed, and no second Redis can open the same data.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.expanduser().resolve()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / "lock").open("a+")
        except OSError as error:
            raise FolderError(f"{self.path} cannot be the data folder: {error.strerror or error}") from error
        try:
            self._take_lock()
        except BaseException:
            self._lock.close()
            raise
        self.ports = Ports(self.path / "ports.json")

    @property
    def lock_descriptor(self) -> int:
        """The file descriptor to hand to children."""
        return self._lock.fileno()

    @property
    def models(self) -> Path:
        """Checkpoints of the cluster's own."""
        return self.path / "models"

    def log(self, name: str) -> Path:
        """The log file of a child."""
        return self.path / "log" / f"{name}.log"

    def close(self) -> None:
        """Lets go of the lock, which ends once the children have ended too."""
        self._lock.close()

    def __enter__(self) -> DataFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _take_lock(self) -> None:
        deadline = time.monotonic() + _LEFTOVERS_S
        while not self._try_lock():
            self._lock.seek(0)
            holder = self._lock.read().strip()
            if holder.isdecimal() and _alive(int(holder)):
                raise FolderInUseError(
                    f"{self.path} is in use by the launcher with process id {holder}; stop that one, or name another "
                    "folder with --data"
                )
            # The launcher was killed, and its children are ending.
            if time.monotonic() > deadline:
                raise FolderInUseError(
                    f"{self.path} is still in use by processes of a launcher that was killed; "
                    f"`fuser {self.path / 'lock'}` lists them"
                )
            time.sleep(0.1)
        self._lock.truncate(0)
        self._lock.write(f"{os.getpid()}\n")
        self._lock.flush()

    def _try_lock(self) -> bool:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
