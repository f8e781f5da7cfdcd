"""A lock for work that comes in pieces: whoever waits for it has it next, in the order in which they asked."""

from __future__ import annotations

import threading
from collections import deque


class Turns:
    """A context manager. A thread that gives it back and takes it again at once lets those who wait go first.

    threading.Lock promises no order: a loop that takes it for each piece of its work may keep others out until the
    last piece. Not reentrant.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._taken = False
        self._waiting: deque[threading.Lock] = deque()  # each is held until its turn has come

    def __enter__(self) -> None:
        with self._lock:
            if not self._taken:
                self._taken = True
                return
            turn = threading.Lock()
            turn.acquire()
            self._waiting.append(turn)
        turn.acquire()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().release()  # it stays taken
            else:
                self._taken = False
