"""One process of the system as it is kept: started, waited for, started again when it dies, stopped."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from launcher.backing import Backing
from launcher.children import Child, ChildFailedError

START_S = 120.0
_PROBE_S = 0.05
_BACKOFF_S = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_STEADY_S = 60.0  # whoever lived this long is started again as quickly as at the first time

Report = Callable[[str], None]


class Member:
    """A child that is kept running. `begin` starts it, in the main thread; `answers` says whether it is ready, and may
    block for up to a second."""

    def __init__(self, name: str, begin: Callable[[], Child], answers: Callable[[], bool], grace_s: float) -> None:
        self.name = name
        self.answers = answers
        self.child: Child | None = None
        self._begin = begin
        self._grace_s = grace_s

    @property
    def kind(self) -> str:
        """Members of one kind stop together."""
        return self.name.partition("-")[0]

    def start(self) -> None:
        """Starts it. Raises OSError where that is not possible."""
        self.child = self._begin()

    async def wait_until_ready(self) -> None:
        """Raises ChildFailedError where it ends instead, TimeoutError where it never answers."""
        assert self.child is not None
        deadline = time.monotonic() + START_S
        while not await asyncio.to_thread(self.answers):
            self.child.check()
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.name} did not answer within {START_S:.0f} s; see {self.child.log}")
            await asyncio.sleep(_PROBE_S)

    async def keep(self, report: Report) -> None:
        """Starts it again each time it ends, until cancelled."""
        failures = 0
        while True:
            assert self.child is not None
            started = time.monotonic()
            status = await self.child.ended()
            failures = 0 if time.monotonic() - started > _STEADY_S else failures
            pause = _BACKOFF_S[min(failures, len(_BACKOFF_S) - 1)]
            how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
            report(f"{self.name} {how}; starting it again in {pause:g} s (log: {self.child.log})")
            await asyncio.sleep(pause)
            failures += 1
            try:
                self.start()
                await self.wait_until_ready()
            except OSError as error:
                report(f"{self.name} cannot be started: {error}")
            except (ChildFailedError, TimeoutError):
                self.child.kill()  # the next turn of the loop says that it ended
            else:
                report(f"{self.name} is back")

    async def stop(self, report: Report) -> None:
        """Asks it to end, and kills it where it takes longer than its grace."""
        if self.child is None or not self.child.running:
            return
        report(f"stopping {self.name}")
        if not await self.child.stop_gently(self._grace_s):
            report(f"{self.name} did not stop within {self._grace_s:.0f} s and was killed")


def backing_member(name: str, start: Callable[[], Backing]) -> Member:
    """etcd or Redis as a member."""

    def begin() -> Child:
        backing = start()
        member.answers = backing.answers
        return backing.child

    member = Member(name, begin, lambda: False, 10.0)
    return member


def serves(address: str) -> bool:
    """Whether the gRPC server at `address` says that it is healthy."""
    with grpc.insecure_channel(address) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=1)
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
