"""A router put together: mirrors, both doors, the relay, and their end in order."""

from __future__ import annotations

import time
from collections.abc import Callable

from redis.exceptions import RedisError

from services.common.load import LoadCounters
from services.common.process import Node
from services.common.queues import RequestQueue
from services.common.telemetry import logger
from services.router.core import Core
from services.router.dispatch import Dispatcher
from services.router.grpc_api import InferenceService
from services.router.http_server import HttpServer
from services.router.load import LoadRecorder, LoadReporter
from services.router.openai_api import make_app
from services.router.prewarm import Prewarmer
from services.router.progress import ProgressTeller
from services.router.recovery import Recovery
from services.router.relay import RelayService
from services.router.request import Request
from services.router.settings import RouterSettings
from services.router.tokenizers import TokenizerCache
from services.router.view import ClusterView
from services.router.wake import Waker
from warmserve.cluster.events import EventStream
from warmserve.v1 import agent_pb2, agent_pb2_grpc, cluster_pb2, common_pb2, inference_pb2, inference_pb2_grpc

_log = logger(__name__)


async def serve(settings: RouterSettings, node: Node) -> None:
    """Runs a router until node.stop is set."""
    view = ClusterView(node.store, node.keys)
    queue = RequestQueue(node.redis, node.keys)
    tokenizers = TokenizerCache()
    dispatcher = Dispatcher(settings.id, queue, view)

    def tell_waiting(model: str) -> None:
        for request in dispatcher.waiting_of(model):
            request.changed.set()

    waker = Waker(view, lambda model: len(dispatcher.waiting_of(model)), tell_waiting, settings.wake_retry_s)
    dispatcher.on_waiting = lambda request: waker.need(request.spec.name)
    dispatcher.on_resumed = _resumed_event(node.events, dispatcher)
    recovery = Recovery(dispatcher, queue, node.redis, view, waker.need, settings.check_s)
    recorder = LoadRecorder(settings.window_s, time.time())
    reporter = LoadReporter(settings.id, recorder, LoadCounters(node.redis, node.keys), settings.window_s)
    core = Core(settings, view, tokenizers, dispatcher, ProgressTeller(dispatcher, view, waker), recorder)
    view.models.on_change(lambda name, old, new: _load_ahead(tokenizers, new))
    await view.start()

    node.server.add(
        inference_pb2_grpc.add_InferenceServiceServicer_to_server,
        InferenceService(core, Prewarmer(node.store, node.keys), settings),
        inference_pb2.DESCRIPTOR.services_by_name["InferenceService"],
    )
    node.server.add(
        agent_pb2_grpc.add_TokenRelayServiceServicer_to_server,
        RelayService(dispatcher),
        agent_pb2.DESCRIPTOR.services_by_name["TokenRelayService"],
    )
    http = HttpServer(make_app(core, settings), settings.host, settings.http_port, settings.reachable_host)
    dispatcher.relay_address = await node.server.start()
    http_url = await http.start()
    recovery.start()
    reporter.start()
    record = cluster_pb2.RouterRecord(
        id=settings.id,
        address=dispatcher.relay_address,
        http_url=http_url,
        started_unix_ms=int(time.time() * 1000),
    )
    await node.session.put(node.keys.router(settings.id), record)
    await node.server.set_serving(True)
    _log.info("serving", address=dispatcher.relay_address, http=http_url)

    await node.stop.wait()
    _log.info("stopping", requests=len(dispatcher.all()))
    await node.server.set_serving(False)
    await node.session.delete(node.keys.router(settings.id))
    await core.stop(settings.grace_s)
    await http.stop()
    await recovery.close()
    await waker.close()
    await dispatcher.close()
    await node.server.stop(1.0)
    await reporter.close()
    await view.close()
    tokenizers.close()


def _load_ahead(tokenizers: TokenizerCache, spec: cluster_pb2.ModelSpec | None) -> None:
    if spec is not None:
        tokenizers.load(spec)


def _resumed_event(
    events: EventStream, dispatcher: Dispatcher
) -> Callable[[Request, common_pb2.Reason, frozenset[str]], None]:
    """What appends REQUEST_RESUMED to the timeline."""

    async def append(event: cluster_pb2.Event) -> None:
        try:
            await events.append(event)
        except RedisError as error:
            _log.debug("an event was not recorded", error=str(error))

    def resumed(request: Request, reason: common_pb2.Reason, agents: frozenset[str]) -> None:
        event = cluster_pb2.Event(
            unix_ms=int(time.time() * 1000),
            kind=cluster_pb2.EVENT_KIND_REQUEST_RESUMED,
            model=request.spec.name,
            agent_ids=sorted(agents),
            reason=reason,
        )
        dispatcher.spawn(append(event))

    return resumed
