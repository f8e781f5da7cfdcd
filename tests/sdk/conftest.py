"""warmctl as a process, against the test's own cluster."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import warmserve
from launcher.backing import Backing
from tests.sdk.cluster_state import write_cluster
from tests.sdk.inference_server import unused_address
from warmserve.cluster.keys import Keys
from warmserve.cluster.store import Store

# What is drawn into a pipe must not depend on the terminal that the tests run in.
_INHERITED = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
_SDK = str(Path(warmserve.__file__).parents[1])  # alone, for warmctl needs nothing of the services


@dataclass
class Done:
    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class Warmctl:
    """Runs `warmctl ARGUMENTS` against the test's cluster."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment

    async def start(self, *arguments: str, **more: Any) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "warmserve.admin.cli",
            *arguments,
            env={**_INHERITED, "PYTHONPATH": _SDK, **self.environment},
            **{"stdin": asyncio.subprocess.DEVNULL, "stdout": -1, "stderr": -1, **more},
        )

    async def __call__(self, *arguments: str, **more: Any) -> Done:
        process = await self.start(*arguments, **more)
        out, err = await process.communicate()
        done = Done(process.returncode or 0, (out or b"").decode(), (err or b"").decode())
        assert "Traceback" not in done.err
        return done


@pytest.fixture
def warmctl(etcd: Backing, redis_server: Backing, keys: Keys) -> Warmctl:
    return Warmctl(
        {
            "WARMSERVE_ETCD_ENDPOINTS": f"{unused_address()},{etcd.address}",  # the second one is tried
            "WARMSERVE_REDIS_URL": f"redis://{redis_server.address}/0",
            "WARMSERVE_PREFIX": keys.prefix,
        }
    )


@pytest.fixture
async def cluster(store: Store, keys: Keys) -> None:
    await write_cluster(store, keys)


def words(text: str) -> str:
    """The text with every run of blanks made one."""
    return re.sub(r"\s+", " ", text)
