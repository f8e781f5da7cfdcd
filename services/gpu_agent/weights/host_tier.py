"""Images in the node's memory, for all its agents: files in a memory file system, under a budget.

One file per image, with the image's name and bytes; it appears when it is complete. Who reads it holds a shared lock on
it, who writes one an exclusive lock on the unfinished file, and who makes room holds the folder's lock. So nothing that
is being read is taken away, and what a killed agent left is found and removed. Beside a file lies what it is worth. All
goes with the last agent that stops; what killed ones leave is there when they come back.
"""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import tempfile
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from services.common.telemetry import logger
from services.gpu_agent.weights.host_image import HostImage, Pin
from services.gpu_agent.weights.image import Image
from services.gpu_agent.weights.sums import host_sum

_log = logger(__name__)
_READERS = 4
_UNFINISHED = ".unfinished"
_MARGIN = 1.25  # what comes must be worth so many times what goes, or each forecast would turn the two round
_FULL = {errno.ENOSPC, errno.ENOMEM, errno.EDQUOT}


@dataclass(frozen=True)
class Kept:
    """One image, in the tier or for it; `value` is what each byte of it is worth there."""

    name: str
    nbytes: int
    value: float


class HostTier:
    """The tier as one agent sees it. Thread-safe; its methods read and write files: call them in a thread."""

    def __init__(self, folder: Path, budget_bytes: int, pin: Pin | None = None) -> None:
        """budget_bytes 0: there is no tier. All agents of a node should have the same folder and budget."""
        self.budget_bytes = budget_bytes
        self._folder = folder
        self._pin = pin
        self._opened: dict[str, HostImage] = {}
        self._lock = threading.Lock()
        self._too_large: set[str] = set()  # images of which it was said
        self._present: int | None = None  # a file that every agent of the tier holds a shared lock on
        if budget_bytes:
            folder.mkdir(parents=True, exist_ok=True)
            self._present = os.open(folder / ".agents", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._present, fcntl.LOCK_SH)
            if removed := _remove_unfinished(folder):
                _log.info("removed images that a killed agent had not finished", files=removed, folder=str(folder))

    @contextmanager
    def reading(self, image: Image) -> Iterator[HostImage | None]:
        """The image in memory, if it is there; no agent removes it within the block."""
        found = self._held(image)
        if found is None:
            yield None
            return
        try:
            yield found
        finally:
            found.let_go()

    def sweep(self) -> None:
        """Gives back what other agents have removed from the tier, unless it is being read still."""
        with self._lock:
            for name in [name for name, opened in self._opened.items() if opened.gone and not opened.held]:
                self._opened.pop(name).close()

    def close(self) -> None:
        """Ends its use by this agent. The last one of the node gives the memory back."""
        with self._lock:
            while self._opened:
                self._opened.popitem()[1].close()
            present, self._present = self._present, None
        if present is None:
            return
        with suppress(BlockingIOError):
            fcntl.flock(present, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for image in self.kept():
                self.discard(image.name)
        os.close(present)

    def ready(self, name: str) -> bool:
        """Whether an image is in memory, and registered with this agent's device."""
        with self._lock:
            opened = self._opened.get(name)
            if opened is not None and not opened.gone:
                return opened.registered
        return self._pin is None and (self._folder / name).exists()

    def chosen(self, images: Iterable[Kept]) -> list[Kept]:
        """Of images on the disk, those that are to be in memory: the most valuable ones, as many as the budget holds.

        What is there already has an advantage. Said once of an image: that it is larger than the budget.
        """
        kept = {image.name for image in self.kept()}
        fitting = [image for image in images if self._may_fit(image.name, image.nbytes)]
        return most_valuable(fitting, kept, self.budget_bytes)

    def appraise(self, name: str, value: float) -> None:
        """Says what an image in the tier is worth; the newest word of any agent counts."""
        if (self._folder / name).exists() and _value(self._folder / name) != value:
            _write(_worth(self._folder / name), json.dumps(value))

    def fill(self, image: Image, value: float, go_on: Callable[[], bool] = lambda: True) -> bool:
        """Copies an image from the disk, in place of what is worth less and nobody reads. False where it has no place.

        Pages are read several at a time, past the page cache where the file system allows it, and checked. It ends
        early, with nothing left, when `go_on()` is False. Raises ImageCorrupt, and OSError where the disk fails.
        """
        path, nbytes = self._folder / image.path.name, image.layout.total_bytes
        if not self.budget_bytes or path.exists() or not self._may_fit(path.name, nbytes):
            return path.exists()
        unfinished = path.with_name(f"{path.name}{_UNFINISHED}")
        self._folder.mkdir(parents=True, exist_ok=True)  # should somebody have cleaned up there
        with self._locked():
            fd = self._reserve(unfinished, nbytes, value)
        if fd is None:
            return False
        try:
            if not self._copy(image, fd, go_on):
                return False
            _write(_worth(path), json.dumps(value))
            os.rename(unfinished, path)
            return True
        finally:
            unfinished.unlink(missing_ok=True)
            os.close(fd)

    def discard(self, name: str) -> None:
        """Removes an image; who uses it can go on. Nothing where there is none."""
        (self._folder / name).unlink(missing_ok=True)
        _worth(self._folder / name).unlink(missing_ok=True)

    def kept(self) -> list[Kept]:
        """What is in the tier, the least valuable first."""
        found = []
        for path in self._folder.glob("*.image"):
            with suppress(FileNotFoundError):  # removed in this moment
                found.append(Kept(path.name, path.stat().st_size, _value(path)))
        return sorted(found, key=lambda kept: (kept.value, kept.name))

    def _held(self, image: Image) -> HostImage | None:
        """The image in memory, held; None where it is not there, or not any more."""
        self.sweep()
        name = image.path.name
        with self._lock:
            if name not in self._opened:
                try:
                    fd = os.open(self._folder / name, os.O_RDWR | os.O_CLOEXEC)
                except FileNotFoundError:
                    return None
                if os.fstat(fd).st_size != image.layout.total_bytes:
                    os.close(fd)
                    return None
                self._opened[name] = HostImage(fd, image.layout.page_bytes, self._pin)
            found = self._opened[name]
            return found if found.hold() else None

    def _reserve(self, unfinished: Path, nbytes: int, value: float) -> int | None:
        """Makes an unfinished file of that size, locked and with memory behind it; None where there is no place."""
        _remove_unfinished(self._folder)
        if any(self._folder.glob(f"*{_UNFINISHED}")):
            return None  # another agent fills the tier, and knows as much as this one
        kept = self.kept()
        used = sum(image.nbytes for image in kept) + sum(_sizes(self._folder.glob(f"*{_UNFINISHED}")))
        short = used + nbytes - self.budget_bytes
        going: list[tuple[Kept, int]] = []
        try:
            for image in kept:
                if short <= 0 or image.value * _MARGIN >= value:
                    break
                if (lock := self._unused(image.name)) is not None:
                    going.append((image, lock))
                    short -= image.nbytes
            if short > 0:
                _log.debug("no place in the host tier", image=unfinished.name, bytes=nbytes, short=short)
                return None
            for image, _ in going:
                _log.info("removed from the host tier", image=image.name, value=image.value, for_value=value)
                self.discard(image.name)
        finally:
            for _, lock in going:
                os.close(lock)
        fd = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)  # as long as it is held, the file is not taken for a dead agent's
            os.posix_fallocate(fd, 0, nbytes)
        except OSError as error:
            unfinished.unlink()
            os.close(fd)
            if error.errno not in _FULL:
                raise
            _log.warning("the host tier's folder is full; is it smaller than the budget?", folder=str(self._folder))
            return None
        return fd

    def _may_fit(self, name: str, nbytes: int) -> bool:
        if nbytes <= self.budget_bytes:
            return True
        if name not in self._too_large:
            self._too_large.add(name)
            _log.warning(
                "the host tier's budget is smaller than this image, which is always loaded from the disk; set a larger "
                "host_tier_bytes",
                image=name,
                image_mib=round(nbytes / 2**20, 1),
                budget_mib=round(self.budget_bytes / 2**20, 1),
            )
        return False

    def _unused(self, name: str) -> int | None:
        """An exclusive lock on an image, which nobody can open while it is held; None where somebody uses it."""
        try:
            fd = os.open(self._folder / name, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        return fd

    def _copy(self, image: Image, fd: int, go_on: Callable[[], bool]) -> bool:
        # Unmapped with the last reference: an error's traceback may hold a piece of it, with which it cannot be closed.
        view = memoryview(mmap.mmap(fd, image.layout.total_bytes))
        size = image.layout.page_bytes

        def read(index: int) -> bool:
            if not go_on():
                return False
            page = view[index * size : (index + 1) * size]
            image.fetch_page(index, page)
            image.check(index, host_sum(page))
            return True

        with ThreadPoolExecutor(_READERS, "fill-host-tier") as readers:
            return all(readers.map(read, range(image.layout.num_pages)))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        fd = os.open(self._folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)


def most_valuable(images: Iterable[Kept], kept: Collection[str], budget_bytes: int) -> list[Kept]:
    """The images that fit into a budget, the most valuable first; what is `kept` counts for more. Pure."""

    def precedence(image: Kept) -> tuple[float, bool, str]:
        there = image.name in kept
        return -image.value * (_MARGIN if there else 1), not there, image.name

    chosen, left = [], budget_bytes
    for image in sorted(images, key=precedence):
        if image.nbytes <= left:
            chosen.append(image)
            left -= image.nbytes
    return chosen


def _remove_unfinished(folder: Path) -> int:
    """Deletes what killed agents left, and returns how many files; what is being written is spared."""
    removed = 0
    for path in folder.glob(f"*{_UNFINISHED}"):
        with suppress(FileNotFoundError), path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            path.unlink()
            removed += 1
    return removed


def _worth(path: Path) -> Path:
    return path.with_name(f"{path.name}.value")


def _value(path: Path) -> float:
    try:
        return float(json.loads(_worth(path).read_text()))
    except (FileNotFoundError, ValueError):
        return 0.0


def _sizes(paths: Iterator[Path]) -> Iterator[int]:
    for path in paths:
        with suppress(FileNotFoundError):
            yield path.stat().st_size


def _write(path: Path, text: str) -> None:
    fd, name = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(fd, "w") as file:
            file.write(text)
        os.rename(name, path)
    except OSError:
        os.unlink(name)
        raise
