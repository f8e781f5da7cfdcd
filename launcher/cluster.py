"""The whole system on one machine: etcd, Redis and the services as children of this process."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from launcher import backing
from launcher.children import Child
from launcher.folder import DataFolder
from launcher.members import START_S, Member, backing_member, serves
from warmserve.cluster.keys import Keys
from warmserve.cluster.mirror import Mirror
from warmserve.cluster.store import Store
from warmserve.v1 import cluster_pb2

HOST = "127.0.0.1"
_WISHED_HTTP_PORT = 8000


@dataclass(frozen=True)
class ClusterConfig:
    """What to run."""

    agents: int = 2
    http_port: int = 0  # 0: the one of the last start, else 8000, else any
    arena_bytes: int = 1 << 30  # of each agent
    model_roots: tuple[Path, ...] = ()  # besides the data folder's own
    window_s: float = 300.0
    season_s: float | None = None  # None: the forecaster's own default
    lookahead_s: float | None = None  # None: the placer's own default
    max_batch: int | None = None  # None: the agents' own default
    grace_s: float = 10.0


class Cluster:
    """`async with Cluster(...)` starts everything and waits until it serves; leaving stops it in order.

    Made and entered in the main thread. Raises on entry, after stopping what had started: PortTakenError,
    ChildFailedError, TimeoutError, FileNotFoundError (no etcd or Redis).
    """

    def __init__(self, folder: DataFolder, config: ClusterConfig, report: Callable[[str], None]) -> None:
        self.folder = folder
        self.config = config
        self._report = report
        self._members: list[Member] = []  # in order of start
        self._keepers: list[asyncio.Task[None]] = []
        self._metrics: dict[str, int] = {}
        take = folder.ports.take
        self.http_port = (
            folder.ports.insist("router-http", config.http_port)
            if config.http_port
            else take("router-http", _WISHED_HTTP_PORT)
        )
        self.etcd_address = f"{HOST}:{take('etcd')}"
        self.redis_address = f"{HOST}:{take('redis')}"
        self.router_address = f"{HOST}:{take('router')}"

    @property
    def redis_url(self) -> str:
        """The URL of the Redis."""
        return f"redis://{self.redis_address}/0"

    @property
    def http_url(self) -> str:
        """The base URL of the OpenAI door, without /v1."""
        return f"http://{HOST}:{self.http_port}"

    @property
    def metrics_urls(self) -> dict[str, str]:
        """Prometheus metrics of each service, by member's name."""
        return {name: f"http://{HOST}:{port}/metrics" for name, port in self._metrics.items()}

    @property
    def environment(self) -> dict[str, str]:
        """Variables with which warmctl finds this cluster."""
        return {
            "WARMSERVE_ETCD_ENDPOINTS": self.etcd_address,
            "WARMSERVE_REDIS_URL": self.redis_url,
            "WARMSERVE_PREFIX": Keys().prefix,
        }

    @property
    def model_roots(self) -> list[Path]:
        """Folders that checkpoints may be deployed from."""
        return [self.folder.models, *(root.expanduser().resolve() for root in self.config.model_roots)]

    async def __aenter__(self) -> Cluster:
        for log in self.folder.path.glob("log/*.log"):
            log.replace(log.with_suffix(".log.1"))
        backings, services = self._stages()
        store = Store([self.etcd_address])
        try:
            await self._start(backings)
            _, revision = await store.snapshot(Keys().placer_leader())
            await self._start(services)
            self._keepers = [
                asyncio.create_task(m.keep(self._report), name=f"keeper of {m.name}") for m in self._members
            ]
            await self._wait_for_leader(store, revision)
        except BaseException:
            await self.stop()
            raise
        finally:
            await store.close()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def stop(self) -> None:
        """Stops everything, those that depend on others first. Cancelled while waiting, it kills what is left."""
        try:
            for keeper in self._keepers:
                keeper.cancel()
            await asyncio.gather(*self._keepers, return_exceptions=True)
            for _, members in groupby(reversed(self._members), lambda member: member.kind):
                await asyncio.gather(*(member.stop(self._report) for member in members))
        finally:
            for member in self._members:
                if member.child is not None:
                    member.child.stop(0)

    async def _start(self, stage: list[Member]) -> None:
        for member in stage:
            self._report(f"starting {member.name}")
            self._members.append(member)
            member.start()
        for member in stage:
            await member.wait_until_ready()
            self._report(f"{member.name} is ready")

    async def _wait_for_leader(self, store: Store, since: int) -> None:
        """Waits for a placer that was elected after etcd's revision `since`: after a crash the old one's record is
        there until its lease ends."""
        leader = Mirror(store, Keys().placer_leader(), cluster_pb2.LeaderRecord)
        await leader.start()
        try:
            await asyncio.wait_for(leader.wait_for(lambda _: leader.create_revision("") > since), START_S)
        except TimeoutError:
            raise TimeoutError(
                f"no placer was elected within {START_S:.0f} s; see {self.folder.log('placer')}"
            ) from None
        finally:
            await leader.close()

    def _stages(self) -> list[list[Member]]:
        """Members in order of start; those of one stage start together."""
        config, ports = self.config, self.folder.ports
        peer_port = ports.take("etcd-peer")
        etcd_port, redis_port = (int(address.rpartition(":")[2]) for address in (self.etcd_address, self.redis_address))
        log, keep_open = self.folder.log, (self.folder.lock_descriptor,)

        def etcd() -> backing.Backing:
            return backing.etcd(self.folder.path / "etcd", log("etcd"), etcd_port, peer_port, keep_open)

        def redis() -> backing.Backing:
            return backing.redis(self.folder.path / "redis", log("redis"), redis_port, keep_open)

        forecast = [] if config.season_s is None else [f"--season-s={config.season_s}"]
        ahead = [] if config.lookahead_s is None else [f"--lookahead-s={config.lookahead_s}"]
        batch = [] if config.max_batch is None else [f"--max-batch={config.max_batch}"]
        for root in (self.folder.models, self.folder.path / "images", self.folder.path / "forecaster"):
            root.mkdir(parents=True, exist_ok=True)
        placer = self._service("placer", "placer", ahead)
        forecaster = self._service(
            "forecaster", "forecaster", [f"--data-dir={self.folder.path / 'forecaster'}", *forecast]
        )
        agents = [
            self._service(
                f"agent-{index}",
                "gpu_agent",
                [
                    f"--device-index={index}",
                    f"--arena-bytes={config.arena_bytes}",
                    f"--image-dir={self.folder.path / 'images'}",
                    f"--model-roots={','.join(map(str, self.model_roots))}",
                    *batch,
                ],
                self._threads(),
            )
            for index in range(config.agents)
        ]
        router = self._service("router", "router", [f"--http-port={self.http_port}"])
        return [
            [backing_member("etcd", etcd), backing_member("redis", redis)],
            [placer, forecaster, *agents, router],
        ]

    def _threads(self) -> dict[str, str]:
        # Agents that each take every core slow one another down.
        share = max(1, (os.cpu_count() or 1) // max(1, self.config.agents))
        return {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(share)}

    def _service(
        self, name: str, module: str, flags: list[str] | None = None, environment: dict[str, str] | None = None
    ) -> Member:
        port, metrics_port = self.folder.ports.take(name), self.folder.ports.take(f"{name}-metrics")
        address = f"{HOST}:{port}"
        self._metrics[name] = metrics_port
        command = [
            sys.executable,
            "-P",  # modules in the folder that the user happens to be in are not ours
            "-m",
            f"services.{module}",
            f"--id={name}",
            f"--host={HOST}",
            f"--port={port}",
            f"--metrics-port={metrics_port}",
            f"--etcd-endpoints={self.etcd_address}",
            f"--redis-url={self.redis_url}",
            f"--prefix={Keys().prefix}",
            f"--window-s={self.config.window_s}",
            f"--grace-s={self.config.grace_s}",
            *(flags or []),
        ]

        def start() -> Child:
            return Child(
                name,
                command,
                self.folder.log(name),
                environment,
                # Without the launcher nobody sees to it that a service ends. (etcd and Redis get SIGTERM.)
                death_signal=signal.SIGKILL,
                keep_open=(self.folder.lock_descriptor,),
            )

        return Member(name, start, lambda: serves(address), self.config.grace_s + 5.0)
