"""The whole system as `warmserve up` runs it: every service a process of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from launcher.checkpoints import make_checkpoints
from launcher.cluster import Cluster, ClusterConfig
from launcher.folder import DataFolder
from launcher.ports import free_port
from launcher.programs import warmctl
from warmserve import AsyncClient


@dataclass
class System:
    """A running system with its checkpoints."""

    cluster: Cluster
    client: AsyncClient
    checkpoints: dict[str, Path]

    async def deploy(self, name: str, *flags: str) -> None:
        """Deploys one of the checkpoints under its own name."""
        await self.warmctl("models", "deploy", name, f"--source={self.checkpoints[name]}", *flags)

    async def warmctl(self, *arguments: str) -> str:
        """What warmctl prints."""
        return await warmctl(self.cluster.environment, *arguments)

    def pid(self, member: str) -> int:
        """A member's process now."""
        child = next(m.child for m in self.cluster._members if m.name == member)
        assert child is not None
        return child.process.pid


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The demo's checkpoints, made once."""
    return make_checkpoints(tmp_path_factory.mktemp("models"), lambda line: None)


StartSystem = Callable[..., AbstractAsyncContextManager[System]]


@pytest.fixture
def start_system(tmp_path: Path, checkpoints: dict[str, Path]) -> StartSystem:
    """`async with start_system(agents=2) as system:`"""

    @asynccontextmanager
    async def start(**config: object) -> AsyncIterator[System]:
        root = next(iter(checkpoints.values())).parent
        lines: list[str] = []
        with DataFolder(tmp_path / "data") as folder:
            # Of its own: two clusters that start at once may both find 8000 free.
            port = free_port()
            wanted = ClusterConfig(
                http_port=port, model_roots=(root,), window_s=2.0, season_s=20.0, grace_s=3.0, **config
            )
            async with Cluster(folder, wanted, lines.append) as cluster, AsyncClient(cluster.router_address) as client:
                yield System(cluster, client, checkpoints)

    return start
