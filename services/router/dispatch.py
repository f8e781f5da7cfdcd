"""Requests in progress: into the queue, news from agents applied, put back where an instance was lost."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Coroutine
from typing import Any

import grpc
from redis.exceptions import RedisError

from services.common.queues import RequestQueue, Ticket
from services.common.telemetry import logger
from services.router import metrics
from services.router.errors import RequestError, TooLargeError
from services.router.relay import RelayStream
from services.router.request import Outcome, Request
from services.router.view import ClusterView
from warmserve.v1 import agent_pb2, common_pb2

_log = logger(__name__)
_REDIS_S = 5.0  # a Redis that takes longer is taken for lost
_REDIS_CALLS = 32  # at a time; the client opens a connection for each, and refuses more than a hundred
_FAILED_ATTEMPTS = 3  # attempts that fail without a new token before the client is told
_MAX_ATTEMPTS = 16  # a request that loses this many instances is likelier the cause than a victim
REDIS_ERRORS = (RedisError, OSError, TimeoutError)


class Dispatcher:
    """Owns the requests in progress at this router. Everything runs on the event loop."""

    def __init__(self, router_id: str, queue: RequestQueue, view: ClusterView) -> None:
        self.relay_address = ""  # host:port, set once the server listens
        self.queue_error = ""  # why the queue does not answer; empty while it does
        self.streams: dict[str, RelayStream] = {}
        self.on_tokens: Callable[[Request, int], None] = lambda request, count: None
        self.on_waiting: Callable[[Request], None] = lambda request: None
        self.on_resumed: Callable[[Request, common_pb2.Reason, frozenset[str]], None] = lambda request, why, agents: (
            None
        )
        self.on_stream_lost: Callable[[RelayStream], None] = lambda stream: None
        self._router_id = router_id
        self._queue = queue
        self._view = view
        self._requests: dict[str, Request] = {}
        self._by_model: dict[str, dict[str, Request]] = defaultdict(dict)  # in order of arrival
        self._background: set[asyncio.Task[None]] = set()
        self._redis_calls = asyncio.Semaphore(_REDIS_CALLS)

    def requests_of(self, model: str) -> list[Request]:
        """The model's requests in progress, oldest first."""
        return list(self._by_model.get(model, {}).values())

    def count(self, model: str) -> int:
        """How many requests of the model are in progress."""
        return len(self._by_model.get(model, ()))

    def waiting_of(self, model: str) -> list[Request]:
        """Those that no instance has."""
        return [request for request in self.requests_of(model) if request.waiting]

    def models(self) -> list[str]:
        """Models with requests in progress."""
        return [model for model, requests in self._by_model.items() if requests]

    def all(self) -> list[Request]:
        """All requests in progress."""
        return list(self._requests.values())

    def begin(self, request: Request) -> None:
        """Takes a request in and queues it."""
        self._requests[request.id] = request
        self._by_model[request.spec.name][request.id] = request
        request.queueing = True
        self.spawn(self.enqueue(request))
        self.on_waiting(request)

    def has(self, request: Request) -> bool:
        """Whether a request is in progress."""
        return request.id in self._requests

    def end(self, request: Request) -> None:
        """Forgets a request; whoever still has it is told to drop it."""
        self._requests.pop(request.id, None)
        of_model = self._by_model[request.spec.name]
        of_model.pop(request.id, None)
        if not of_model:
            del self._by_model[request.spec.name]
        self.release(request)

    def release(self, request: Request) -> None:
        """Sees to it that nobody works on a request any more."""
        if not request.released:
            request.released = True
            self.withdraw(request, cancel=True)

    def withdraw(self, request: Request, cancel: bool) -> None:
        """Takes the current attempt out of the queue and, with `cancel`, from the agent that has it."""
        if cancel and request.stream is not None:
            request.stream.cancel(request.id)
        if request.ticket is not None:
            self.spawn(self._forget(request.ticket))

    async def enqueue(self, request: Request) -> None:
        """Puts a waiting request into its queue; while Redis is away it stays in memory, for `Recovery` to put."""
        attempt = request.attempt
        request.queueing = True
        try:
            async with self._redis_calls, asyncio.timeout(_REDIS_S):
                ticket = await self._queue.put(request.queued(self._router_id, self.relay_address))
        except REDIS_ERRORS as error:
            self.queue_failed(error)
            request.changed.set()
            return
        finally:
            if request.attempt == attempt:
                request.queueing = False
        if request.id not in self._requests or request.attempt != attempt or request.released:
            await self._forget(ticket)  # cancelled, put back or at a stop text meanwhile
        else:
            request.ticket = ticket

    def queue_failed(self, error: Exception) -> None:
        """Notes that the queue does not answer."""
        if not self.queue_error:
            _log.warning("the queue does not answer; waiting requests are kept in memory", error=str(error))
        self.queue_error = str(error) or type(error).__name__

    async def _forget(self, ticket: Ticket) -> None:
        try:
            async with self._redis_calls, asyncio.timeout(_REDIS_S):
                await self._queue.done(ticket)
        except REDIS_ERRORS as error:
            # Whoever takes it will be told that nobody waits for it; what nobody can take the placer takes out.
            _log.debug("a queue entry could not be withdrawn", ticket=ticket.entry_id, error=str(error))

    def put_back(self, request: Request, reason: common_pb2.Reason, cancel: bool = True) -> None:
        """Has another instance go on with a request where the client's tokens end."""
        agents = request.agent_ids
        was_running = bool(request.instance_id)
        self.withdraw(request, cancel)
        request.detach()
        name = request.spec.name
        if len(request.tokens) >= request.sampling.max_tokens:
            request.end_at_length()
            return
        if request.spec.name not in self._view.models.items:
            request.fail(RequestError(grpc.StatusCode.NOT_FOUND, f"model {name!r} was undeployed", param="model"))
            return
        if request.attempt >= _MAX_ATTEMPTS:
            text = f"given up after {request.attempt} attempts; the last one ended because {reason.text}"
            request.fail(RequestError(grpc.StatusCode.INTERNAL, text))
            return
        request.queueing = True
        if was_running:
            request.resumed += 1
            metrics.RESUMES.labels(name).inc()
            self.on_resumed(request, reason, agents)
        _log.info(
            "request put back",
            request_id=request.client_id,
            model=name,
            attempt=request.attempt,
            tokens=len(request.tokens),
            reason=reason.text,
        )
        self.spawn(self.enqueue(request))
        self.on_waiting(request)

    # What agents say

    def stream_opened(self, stream: RelayStream) -> None:
        """An agent's stream begins; what it had on an older one it has given up."""
        older = self.streams.get(stream.agent_id)
        self.streams[stream.agent_id] = stream
        if older is not None:
            older.close()
            self._lose(older)
        _log.info("agent connected", agent=stream.agent_id)

    def stream_lost(self, stream: RelayStream) -> None:
        """An agent's stream is over."""
        if self.streams.get(stream.agent_id) is stream:
            del self.streams[stream.agent_id]
            self._lose(stream)

    def _lose(self, stream: RelayStream) -> None:
        reason = common_pb2.Reason(
            cause=common_pb2.CAUSE_AGENT_LOST, text=f"the token stream of agent {stream.agent_id} broke"
        )
        for request in self.all():
            if request.stream is stream and not request.ended:
                self.put_back(request, reason, cancel=False)
        self.on_stream_lost(stream)

    def apply(self, stream: RelayStream, update: agent_pb2.SequenceUpdate) -> None:
        """News of one sequence."""
        request = self._requests.get(update.request_id)
        over = bool(update.finish_reason)
        if request is None:
            if not over:
                stream.cancel(update.request_id)
            return
        had = len(request.tokens)
        waited = request.waiting
        outcome = request.apply(update, stream, asyncio.get_running_loop().time())
        if waited and request.instance_id:
            request.agent_ids = self._view.group_of(request.spec.name, request.instance_id) | {stream.agent_id}
        if len(request.tokens) > had:
            self.on_tokens(request, len(request.tokens) - had)
        self._act(request, outcome, stream, update, over)

    def _act(
        self,
        request: Request,
        outcome: Outcome,
        stream: RelayStream,
        update: agent_pb2.SequenceUpdate,
        over: bool,
    ) -> None:
        match outcome:
            case Outcome.CANCEL_SENDER if not over:
                stream.cancel(request.id)
            case Outcome.PUT_BACK:
                text = f"instance {update.instance_id} " + ("dropped it" if over else "lost tokens of it")
                self.put_back(request, common_pb2.Reason(cause=common_pb2.CAUSE_FAILURE, text=text), cancel=not over)
            case Outcome.EXPIRED:
                request.fail(deadline_passed(request))
            case Outcome.REFUSED:
                request.fail(RequestError(grpc.StatusCode.INVALID_ARGUMENT, update.error))
            case Outcome.TOO_LARGE:
                self._move_to_more_memory(request, update.instance_id, update.error)
            case Outcome.FAILED:
                request.failures += 1
                error = update.error or f"instance {update.instance_id} sent no log probabilities"
                if request.failures < _FAILED_ATTEMPTS:
                    reason = common_pb2.Reason(cause=common_pb2.CAUSE_FAILURE, text=error)
                    # Not cancelled, for that might reach the next attempt at the same agent.
                    self.put_back(request, reason, cancel=False)
                else:
                    text = f"failed {request.failures} times, the last time with: {error}"
                    request.fail(RequestError(grpc.StatusCode.INTERNAL, text))

    def _move_to_more_memory(self, request: Request, refused_by: str, error: str) -> None:
        """Has an instance with more memory go on with a request; where there is none, it fails with the numbers."""
        again = refused_by in request.too_large
        said = request.too_large.setdefault(refused_by, error)
        name = request.spec.name
        larger = self._view.larger_instances(name, request.too_large)
        if not larger:
            request.fail(TooLargeError(f"{said}; no other instance of model {name!r} has more memory for it"))
        elif again:
            # The larger ones are busy. `Recovery` queues it with its next check, so that this is no busy loop.
            request.detach()
        else:
            text = f"{said}; an instance on {', '.join(larger)} has more memory"
            self.put_back(request, common_pb2.Reason(cause=common_pb2.CAUSE_NO_CAPACITY, text=text), cancel=False)

    # Tasks that outlive the request they are for

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs something beside."""
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def close(self) -> None:
        """Ends all streams, and waits for what runs beside."""
        for stream in list(self.streams.values()):
            stream.close()
        while self._background:
            await asyncio.gather(*self._background, return_exceptions=True)


def deadline_passed(request: Request) -> RequestError:
    """DEADLINE_EXCEEDED, saying how far it came."""
    where = f"after {len(request.tokens)} tokens" if request.tokens else "before the first token"
    return RequestError(grpc.StatusCode.DEADLINE_EXCEEDED, f"the request's deadline passed {where}")
