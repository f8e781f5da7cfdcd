"""The whole system on one machine: etcd, Redis and the services as children of this process."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from launcher import backing
from launcher.children import Child, ChildFailedError
from launcher.folder import DataFolder

HOST = "127.0.0.1"
_WISHED_HTTP_PORT = 8000
_START_S = 120.0
_PROBE_S = 0.05
_BACKOFF_S = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_STEADY_S = 60.0  # a member that lived this long is restarted without waiting for longer than the first time


@dataclass(frozen=True)
class ClusterConfig:
    """What to run."""

    agents: int = 2
    http_port: int = 0  # 0: the one of the last start, else 8000, else any
    arena_bytes: int = 1 << 30  # of each agent
    page_bytes: int = 1 << 20
    model_roots: tuple[Path, ...] = ()  # besides the data folder's own
    window_s: float = 300.0
    season_s: float | None = None  # None: the forecaster's own default
    max_batch: int | None = None  # None: the agents' own default
    grace_s: float = 10.0


@dataclass
class Member:
    """One child that is kept running."""

    name: str
    start: Callable[[], Child]
    answers: Callable[[], bool]  # blocks for up to a second
    grace_s: float
    child: Child | None = None

    @property
    def kind(self) -> str:
        """Members of one kind stop together."""
        return self.name.partition("-")[0]

    async def wait_until_ready(self) -> None:
        """Raises ChildFailedError where it ends instead, TimeoutError where it never answers."""
        assert self.child is not None
        deadline = time.monotonic() + _START_S
        while not await asyncio.to_thread(self.answers):
            self.child.check()
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.name} did not answer within {_START_S:.0f} s; see {self.child.log}")
            await asyncio.sleep(_PROBE_S)


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
        return {"WARMSERVE_ETCD_ENDPOINTS": self.etcd_address, "WARMSERVE_REDIS_URL": self.redis_url}

    @property
    def model_roots(self) -> list[Path]:
        """Folders that checkpoints may be deployed from."""
        return [self.folder.models, *(root.expanduser().resolve() for root in self.config.model_roots)]

    def processes(self) -> dict[str, int]:
        """Process ids of what runs, by member's name."""
        return {m.name: m.child.process.pid for m in self._members if m.child is not None and m.child.running}

    async def __aenter__(self) -> Cluster:
        for log in self.folder.path.glob("log/*.log"):
            log.replace(log.with_suffix(".log.1"))
        try:
            for stage in self._stages():
                for member in stage:
                    self._report(f"starting {member.name}")
                    self._members.append(member)
                    member.child = member.start()
                await asyncio.gather(*(self._wait_until_ready(member) for member in stage))
        except BaseException:
            await self.stop()
            raise
        self._keepers = [asyncio.create_task(self._keep(m), name=f"keeper of {m.name}") for m in self._members]
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
                await asyncio.gather(*(self._stop_member(member) for member in members))
        finally:
            for member in self._members:
                if member.child is not None:
                    member.child.stop(0)

    async def _wait_until_ready(self, member: Member) -> None:
        await member.wait_until_ready()
        self._report(f"{member.name} is ready")

    async def _stop_member(self, member: Member) -> None:
        if member.child is None or not member.child.running:
            return
        self._report(f"stopping {member.name}")
        if not await member.child.stop_gently(member.grace_s):
            self._report(f"{member.name} did not stop within {member.grace_s:.0f} s and was killed")

    async def _keep(self, member: Member) -> None:
        failures = 0
        while True:
            assert member.child is not None
            started = time.monotonic()
            status = await member.child.ended()
            failures = 0 if time.monotonic() - started > _STEADY_S else failures
            pause = _BACKOFF_S[min(failures, len(_BACKOFF_S) - 1)]
            how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
            self._report(f"{member.name} {how}; starting it again in {pause:g} s (log: {member.child.log})")
            await asyncio.sleep(pause)
            failures += 1
            try:
                member.child = member.start()
                await member.wait_until_ready()
            except OSError as error:
                self._report(f"{member.name} cannot be started: {error}")
            except (ChildFailedError, TimeoutError):
                member.child.kill()  # the next turn of the loop says that it ended
            else:
                self._report(f"{member.name} is back")

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
        batch = [] if config.max_batch is None else [f"--max-batch={config.max_batch}"]
        for root in (self.folder.models, self.folder.path / "images", self.folder.path / "forecaster"):
            root.mkdir(parents=True, exist_ok=True)
        placer = self._service("placer", "placer")
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
                    f"--page-bytes={config.page_bytes}",
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
            [_backing("etcd", etcd), _backing("redis", redis)],
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

        return Member(name, start, lambda: _serves(address), self.config.grace_s + 5.0)


def _backing(name: str, start: Callable[[], backing.Backing]) -> Member:
    member: Member

    def begin() -> Child:
        started = start()
        member.answers = started.answers
        return started.child

    member = Member(name, begin, lambda: False, 10.0)
    return member


def _serves(address: str) -> bool:
    """Whether a gRPC server says that it is healthy."""
    with grpc.insecure_channel(address) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=1)
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
