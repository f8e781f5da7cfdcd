"""The process that makes whole plans: `python -m services.placer.planning_process`, between two pipes.

It ends when the placer does, in whatever way: then its input ends.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import signal
import sys
import time
from typing import BinaryIO

from services.placer import decisions, planner
from services.placer.planning_frames import LENGTH_BYTES, Begin, Part, Plan, Publish, Published, frame, pieces
from services.placer.published import plan_record
from services.placer.snapshot import Agent, Model, Replica, Snapshot
from warmserve.cluster.store import encode

_NICE = 5  # wakes, and whoever serves, come first


class Work:
    """Answers what the placer asks, in order."""

    def __init__(self) -> None:
        self._begin: Begin | None = None
        self._agents: dict[str, Agent] = {}
        self._replicas: list[Replica] = []
        self._models: dict[str, Model] = {}  # as they were told last
        self._plan: decisions.Plan | None = None

    def take(self, message: object) -> list[object]:
        """What to answer to a message, piece by piece."""
        match message:
            case Begin():
                self._begin, self._agents, self._replicas = message, {}, []
                self._models = {name: self._models[name] for name in message.models if name in self._models}
            case Part():
                self._agents |= {agent.id: agent for agent in message.agents}
                self._models |= {model.name: model for model in message.models}
                self._replicas += message.replicas
            case Plan():
                self._plan = planner.plan(self._snapshot())
                return [*pieces(self._plan.actions), None]
            case Publish():
                return [self._published(message)]
            case _:
                raise TypeError(f"unknown message {message!r}")
        return []

    def _snapshot(self) -> Snapshot:
        begin = self._begin
        if begin is None:
            raise ValueError("a plan was asked for, and no snapshot told")
        return Snapshot(
            begin.now_s,
            self._agents,
            {name: self._models[name] for name in begin.models},
            tuple(self._replicas),
            begin.refused,
            begin.rules,
            begin.nodes,
        )

    def _published(self, wish: Publish) -> Published | None:
        if self._plan is None:
            raise ValueError("a plan was to be published, and none was made")
        record = plan_record(wish, self._plan.outlooks, self._agents)
        digest = hashlib.blake2b(record.SerializeToString(deterministic=True), digest_size=16).digest()
        if digest == wish.unless:
            return None
        record.made_unix_ms = int(time.time() * 1e3)
        return Published(encode(record), digest)


def _read(source: BinaryIO) -> bytes | None:
    """The next value's bytes; None where there is no more."""
    header = source.read(LENGTH_BYTES)
    if len(header) < LENGTH_BYTES:
        return None
    length = int.from_bytes(header, "big")
    data = source.read(length)
    return data if len(data) == length else None


def main() -> None:
    """Entry point."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's, which the placer hears too
    os.nice(_NICE)
    work = Work()
    try:
        while (data := _read(sys.stdin.buffer)) is not None:
            for answer in work.take(pickle.loads(data)):
                sys.stdout.buffer.write(frame(answer))
            sys.stdout.buffer.flush()
    except BrokenPipeError:  # the placer has gone
        os._exit(0)


if __name__ == "__main__":
    main()
