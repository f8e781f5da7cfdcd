"""Reading a file past the page cache, into memory that is aligned for it, except for what the cache has."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from services.common.telemetry import logger

_log = logger(__name__)
_told: set[int] = set()  # devices of file systems without direct reading, of which it was said
_ALIGNMENT = 4096  # bytes; no disk wants more
_NOT_CACHED = {errno.EAGAIN, errno.EOPNOTSUPP, errno.ENOSYS}  # or a file system that does not tell


class FileEnds(OSError):
    """The file ends before what was to be read."""


class DirectFile:
    """A file open for reading with O_DIRECT, or without it where its file system refuses that. Any thread may read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._plain = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._direct: int | None = None
        try:
            # The same file, whatever has become of its name.
            self._direct = os.open(f"/proc/self/fd/{self._plain}", os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        except OSError as error:
            self._refused(error)

    @property
    def size(self) -> int:
        """Its size now, in bytes."""
        return os.fstat(self._plain).st_size

    def is_at(self, path: Path) -> bool:
        """Whether it is the file that is there now."""
        try:
            return os.path.samestat(os.stat(path), os.fstat(self._plain))
        except FileNotFoundError:
            return False

    def read(self, offset: int, into: memoryview) -> None:
        """Fills `into` from `offset` on; both are multiples of 4,096 bytes. OSError where the disk fails, FileEnds.

        What the page cache has, up to where it ends, comes from there: a file that was just written need not be read.
        """
        if self._direct is not None:
            cached = self._cached(offset, into)
            try:
                self._fill(self._direct, offset + cached, into[cached:])
            except OSError as error:
                self._refused(error)
            else:
                return
        self._fill(self._plain, offset, into)

    def read_through_cache(self, offset: int, into: memoryview) -> None:
        """The same by way of the page cache, of any alignment: for memory that is no copy of the cache's."""
        self._fill(self._plain, offset, into)

    def close(self) -> None:
        """Closes it."""
        os.close(self._plain)
        if self._direct is not None:
            os.close(self._direct)

    def __enter__(self) -> DirectFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _cached(self, offset: int, into: memoryview) -> int:
        """Reads what can be had without waiting for the disk; returns how much, in whole blocks."""
        done = 0
        while done < len(into):
            try:
                read = os.preadv(self._plain, [into[done:]], offset + done, os.RWF_NOWAIT)
            except OSError as error:
                if error.errno in _NOT_CACHED:
                    break
                raise
            if read == 0:
                break
            done += read
        return done - done % _ALIGNMENT

    def _fill(self, fd: int, offset: int, into: memoryview) -> None:
        done = 0
        while done < len(into):
            read = os.preadv(fd, [into[done:]], offset + done)
            if read == 0:
                raise FileEnds(errno.EIO, f"{self._path} ends at {offset + done}")
            done += read

    def _refused(self, error: OSError) -> None:
        """EINVAL is how file systems refuse direct reads; anything else is an error of the disk."""
        if error.errno != errno.EINVAL:
            raise error
        device = os.fstat(self._plain).st_dev
        if device not in _told:
            _told.add(device)
            _log.info("this file system has no direct reads; reading through the page cache", path=str(self._path))
