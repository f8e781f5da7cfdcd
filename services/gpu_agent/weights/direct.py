"""Reading a file past the page cache, into memory that is aligned for it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from services.common.telemetry import logger

_log = logger(__name__)
_told: set[int] = set()  # devices of file systems without direct reading, of which it was said


class DirectFile:
    """A file open for reading with O_DIRECT, or without it where its file system refuses that. Any thread may read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._plain = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._direct: int | None = None
        try:
            self._direct = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        except OSError as error:
            self._refused(error)

    def read(self, offset: int, into: memoryview) -> None:
        """Fills `into` from `offset` on; both are multiples of the system's page. OSError, also where the file ends."""
        if self._direct is not None:
            try:
                self._fill(self._direct, offset, into)
            except OSError as error:
                self._refused(error)
            else:
                return
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

    def _fill(self, fd: int, offset: int, into: memoryview) -> None:
        done = 0
        while done < len(into):
            read = os.preadv(fd, [into[done:]], offset + done)
            if read == 0:
                raise OSError(errno.EIO, f"{self._path} ends at {offset + done}")
            done += read

    def _refused(self, error: OSError) -> None:
        """EINVAL is how file systems refuse direct reads; anything else is an error of the disk."""
        if error.errno != errno.EINVAL:
            raise error
        device = os.stat(self._path).st_dev
        if device not in _told:
            _told.add(device)
            _log.info("this file system has no direct reads; reading through the page cache", path=str(self._path))
