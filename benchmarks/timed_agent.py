"""The GPU agent, which also notes when each step of its engine has ended.

    STEP_TIMES=FILE python -m benchmarks.timed_agent

The file grows by 8 bytes a step: seconds of the system's monotonic clock, a double. What a client sees has the ways of
the event loop, of two gRPC streams and of its own process in it too.
"""

from __future__ import annotations

import itertools
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from services.gpu_agent import __main__ as agent
from services.gpu_agent import serving
from services.gpu_agent.engine.loop import EngineLoop
from services.gpu_agent.engine.sequence import SequenceOutput


def timed_loop(on_step: Callable[[str, list[SequenceOutput]], None], **others: Any) -> EngineLoop:
    """An engine's loop that notes when it had news: once a step, before anybody is told."""
    file = os.open(os.environ["STEP_TIMES"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def noted(instance_id: str, outputs: list[SequenceOutput]) -> None:
        os.write(file, struct.pack("d", time.monotonic()))
        on_step(instance_id, outputs)

    return EngineLoop(noted, **others)


def step_gaps(path: Path, began: float, ended: float) -> list[float]:
    """Milliseconds between the ends of steps within a time of the monotonic clock."""
    times = [time for (time,) in struct.iter_unpack("d", path.read_bytes()) if began <= time <= ended]
    return [(after - before) * 1e3 for before, after in itertools.pairwise(times)]


if __name__ == "__main__":
    vars(serving)["EngineLoop"] = timed_loop
    agent.main()
