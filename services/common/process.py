"""The life of a service process: settings, logs, metrics, etcd and Redis, then the service, until SIGTERM or SIGINT."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import uvloop
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff

from services.common.grpc_frame import GrpcServer
from services.common.session import Session
from services.common.settings import S, ServiceSettings, load_settings
from services.common.telemetry import configure_logging, logger, serve_metrics
from warmserve.cluster.events import EventStream
from warmserve.cluster.keys import Keys
from warmserve.cluster.store import Store, StoreUnavailableError

_log = logger(__name__)
_RETRY_S = 0.5


@dataclass
class Node:
    """What a running service stands on."""

    keys: Keys
    store: Store
    session: Session
    redis: Redis
    events: EventStream
    server: GrpcServer
    stop: asyncio.Event  # set by SIGTERM or SIGINT

    async def close(self) -> None:
        """Ends what the service has left open, as where it failed while it started."""
        await self.server.stop(0)
        await self.session.close()
        await self.redis.aclose()
        await self.store.close()


def run(service: str, kind: type[S], main: Callable[[S, Node], Awaitable[None]]) -> None:
    """Runs a service process.

    `main` registers its services on node.server, calls node.server.start(), works until node.stop is set, stops in
    order, and returns. etcd is waited for; Redis is connected to on first use.
    """
    settings = load_settings(kind, service)
    configure_logging(service, settings)
    # What was imported is never garbage, and a collection that walked all of it would stop every thread: with torch and
    # transformers for some 0.2 s.
    gc.freeze()
    try:
        uvloop.run(_run(service, settings, main))
    except OSError as error:
        _log.error("cannot go on", error=str(error))
        sys.exit(1)


async def _run(service: str, settings: S, main: Callable[[S, Node], Awaitable[None]]) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    node = make_node(settings, stop)
    started = asyncio.create_task(_start_session(node.session, settings))
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait({started, stopped}, return_when=asyncio.FIRST_COMPLETED)
    try:
        if started.done():
            started.result()
            metrics_port = serve_metrics(settings)
            _log.info("starting", metrics=f"http://{settings.host}:{metrics_port}/metrics", pid=os.getpid())
            await main(settings, node)
    finally:
        started.cancel()
        stopped.cancel()
        await node.close()
    _log.info("stopped")


def make_node(settings: ServiceSettings, stop: asyncio.Event) -> Node:
    """The clients of a service, not yet connected."""
    keys = Keys(settings.prefix)
    store = Store(settings.etcd_endpoints)
    redis = Redis.from_url(settings.redis_url, retry=Retry(ExponentialBackoff(cap=0.5, base=0.05), 2))
    return Node(
        keys=keys,
        store=store,
        session=Session(store, settings.lease_ttl_s),
        redis=redis,
        events=EventStream(redis, keys),
        server=GrpcServer(settings),
        stop=stop,
    )


async def _start_session(session: Session, settings: ServiceSettings) -> None:
    while True:
        try:
            return await session.start()
        except StoreUnavailableError as error:
            _log.warning("waiting for etcd", endpoints=settings.etcd_endpoints, error=str(error))
            await asyncio.sleep(_RETRY_S)
