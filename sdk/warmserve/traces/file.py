"""The lines of a trace file, plain or gzipped, read as they are asked for."""

from __future__ import annotations

import gzip
import io
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, cast

from warmserve.traces.shapes import TraceError

OnProgress = Callable[[int, int], None]
"""Hears (bytes read, bytes in all), of the file as it is on disk."""

_GZIP = b"\x1f\x8b"
_TELL_EVERY = 4096  # lines


class TraceFile:
    """Iterating gives the lines, with their ends; `line` is the number of the newest. Raises TraceError."""

    def __init__(self, path: Path, on_progress: OnProgress | None = None) -> None:
        self.path = path
        self.line = 0
        self._on_progress = on_progress

    def __iter__(self) -> Iterator[str]:
        self.line = 0
        try:
            with open(self.path, "rb") as raw:
                stream = gzip.GzipFile(fileobj=raw) if raw.peek(2)[:2] == _GZIP else raw
                size = os.fstat(raw.fileno()).st_size
                with io.TextIOWrapper(cast(BinaryIO, stream), encoding="utf-8-sig", newline="") as text:
                    for line in text:
                        self.line += 1
                        if self._on_progress is not None and self.line % _TELL_EVERY == 0:
                            self._on_progress(raw.tell(), size)
                        yield line
            if self._on_progress is not None:
                self._on_progress(size, size)
        except (EOFError, UnicodeDecodeError, gzip.BadGzipFile, zlib.error) as error:
            raise TraceError(f"{self.path} is damaged, or no trace: {error}") from error
        except OSError as error:
            raise TraceError(f"the trace {self.path} cannot be read: {error.strerror or error}") from error

    def wrong(self, problem: object) -> TraceError:
        """The error about the newest line."""
        return TraceError(f"{self.path}, line {self.line}: {problem}")
