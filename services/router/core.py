"""A request's life, the same for both doors: checked, admitted, tokenised, queued, followed, and always cleaned up."""

from __future__ import annotations

import asyncio
import math
import random
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import grpc

from services.common.telemetry import logger
from services.router import metrics
from services.router.dispatch import Dispatcher, deadline_passed
from services.router.errors import RequestError, invalid, unavailable
from services.router.following import Event, Follower, Told
from services.router.load import LoadRecorder
from services.router.progress import ProgressTeller
from services.router.request import Request
from services.router.sampling_rules import check_token_parameters
from services.router.settings import RouterSettings
from services.router.tokenizers import TokenizerCache
from services.router.validation import Call, allowed_tokens, check_call, unknown_model
from services.router.view import ClusterView
from warmserve.v1 import cluster_pb2, inference_pb2

_log = logger(__name__)
_STOPPING_RETRY_S = 2.0
_FAREWELL_S = 5.0  # for clients to take the error that ends their request


class Core:
    """Takes calls from the doors and gives back events."""

    def __init__(
        self,
        settings: RouterSettings,
        view: ClusterView,
        tokenizers: TokenizerCache,
        dispatcher: Dispatcher,
        progress: ProgressTeller,
        load: LoadRecorder,
    ) -> None:
        self._settings = settings
        self.view = view
        self._tokenizers = tokenizers
        self._dispatcher = dispatcher
        self._progress = progress
        self._load = load
        self._in_progress: Counter[str] = Counter()
        self._idle = asyncio.Event()
        self._idle.set()
        self.stopping = False
        dispatcher.on_tokens = self._count_tokens
        view.on_model_gone(self._model_gone)

    def spec(self, name: str) -> cluster_pb2.ModelSpec:
        """A deployed model. Raises RequestError (NOT_FOUND) with the nearest names."""
        spec = self.view.models.items.get(name)
        if spec is None:
            raise unknown_model(name, self.view.models.items)
        return spec

    @asynccontextmanager
    async def open(self, call: Call) -> AsyncIterator[list[Request]]:
        """Checks a call and queues a request for each answer it wants; leaving the context drops them all.

        The deadline holds for everything inside, the caller's own waits too. Raises RequestError.
        """
        arrived = asyncio.get_running_loop().time()
        requests: list[Request] = []
        try:
            check_call(call, self._settings.max_prompt_chars)
            spec = self.spec(call.model)
            with self._admit(spec.name, call.n):
                try:
                    async with asyncio.timeout(call.timeout_s) as limit:
                        requests = await self._prepare(call, spec, arrived)
                        self._begin(requests)
                        yield requests
                except TimeoutError as error:
                    if not limit.expired():
                        raise
                    late = _expired(requests)
                    raise late from error
                finally:
                    for request in requests:
                        self._end(request)
        except RequestError:
            if not requests:
                model = call.model if call.model in self.view.models.items else ""
                metrics.REQUESTS.labels(model, "refused", "").inc()
            raise

    async def follow(self, requests: list[Request]) -> AsyncIterator[tuple[int, Event]]:
        """A call's events, each with the index of its answer, up to and including the last Finished.

        Raises RequestError where an answer fails; the others are of no use then.
        """
        told = Told()
        followers = [Follower(request, self._progress, self._dispatcher, told) for request in requests]
        changed = requests[0].changed
        news = True
        while any(not follower.finished for follower in followers):
            quiet = True
            for follower in followers:
                event = follower.next(news)
                if event is not None:
                    quiet = False
                    yield follower.index, event
            news = False
            if quiet:
                await changed.wait()
                changed.clear()
                news = True

    async def stop(self, grace_s: float) -> None:
        """Refuses new requests, lets those in progress go on for up to `grace_s` seconds, and fails what is left."""
        self.stopping = True
        if self._idle.is_set():
            return
        try:
            async with asyncio.timeout(grace_s):
                await self._idle.wait()
        except TimeoutError:
            left = self._dispatcher.all()
            _log.warning("requests are cut off", requests=len(left))
            for request in left:
                request.fail(unavailable("the router is stopping; send the request to another", _STOPPING_RETRY_S))
            try:
                async with asyncio.timeout(_FAREWELL_S):
                    await self._idle.wait()
            except TimeoutError:
                _log.warning("clients do not take their answers", requests=self._in_progress.total())

    @contextmanager
    def _admit(self, model: str, count: int) -> Iterator[None]:
        if self.stopping:
            raise unavailable("the router is stopping; send the request to another", _STOPPING_RETRY_S)
        settings = self._settings
        if count > min(settings.max_requests_per_model, settings.max_requests):
            most = min(settings.max_requests_per_model, settings.max_requests)
            raise invalid("n", f"{count} answers asked for, and this router takes {most} at a time")
        if self._in_progress[model] + count > settings.max_requests_per_model:
            raise self._full(self._in_progress[model], f"requests of model {model!r} are in progress", model)
        if self._in_progress.total() + count > settings.max_requests:
            raise self._full(self._in_progress.total(), "requests are in progress", model)
        self._in_progress[model] += count
        self._idle.clear()
        try:
            yield
        finally:
            self._in_progress[model] -= count
            if not self._in_progress[model]:
                del self._in_progress[model]
            if not self._in_progress:
                self._idle.set()

    def _full(self, count: int, what: str, model: str) -> RequestError:
        wait_ms = self._progress.estimated_wait_ms(model) or 0.0
        message = f"{count} {what} at this router, and it takes no more at a time; try again later"
        retry_after_s = max(1, math.ceil(wait_ms / 1000))
        return RequestError(grpc.StatusCode.RESOURCE_EXHAUSTED, message, retry_after_s=retry_after_s)

    async def _prepare(self, call: Call, spec: cluster_pb2.ModelSpec, arrived: float) -> list[Request]:
        found_state = self.view.best_state(spec.name)
        now_ms = int(time.time() * 1000)
        tokenizer = await self._tokenizers.get(spec)
        check_token_parameters(call.sampling, tokenizer.vocabulary)
        prompt = await self._tokenizers.encode(tokenizer, call.input, call.input_name)
        context = spec.facts.context_tokens or spec.limits.max_context_tokens
        max_tokens = allowed_tokens(len(prompt), call.sampling, context, call.input_name)
        seed = call.sampling.seed if call.sampling.HasField("seed") else random.getrandbits(64)
        unique = uuid.uuid4().hex
        changed = asyncio.Event()
        requests = []
        for index in range(call.n):
            sampling = inference_pb2.SamplingParams()
            sampling.CopyFrom(call.sampling)
            sampling.max_tokens = max_tokens
            sampling.seed = (seed + index) % 2**64
            requests.append(
                Request(
                    id=unique if call.n == 1 else f"{unique}-{index}",
                    client_id=call.request_id or unique,
                    spec=spec,
                    prompt=prompt,
                    sampling=sampling,
                    priority=call.priority,
                    arrived=arrived,
                    arrived_unix_ms=now_ms,
                    deadline_unix_ms=now_ms + int(call.timeout_s * 1000),
                    found_state=found_state,
                    tokenizer=tokenizer,
                    changed=changed,
                    index=index,
                )
            )
        return requests

    def _begin(self, requests: list[Request]) -> None:
        model = requests[0].spec.name
        if model not in self.view.models.items:
            raise unknown_model(model, self.view.models.items)  # undeployed while the prompt was tokenised
        for request in requests:
            # The prompt counts once.
            prompt_tokens = 0 if request.index else len(request.prompt)
            self._load.arrived(model, prompt_tokens, time.time())
            metrics.IN_PROGRESS.labels(model).inc()
            metrics.PROMPT_TOKENS.labels(model).inc(prompt_tokens)
            self._dispatcher.begin(request)

    def _end(self, request: Request) -> None:
        model = request.spec.name
        if not self._dispatcher.has(request):
            return  # refused in _begin
        self._dispatcher.end(request)
        self._load.ended(model, time.time())
        metrics.IN_PROGRESS.labels(model).dec()
        state = metrics.state_label(request.found_state)
        metrics.REQUESTS.labels(model, _outcome(request), state).inc()
        if request.started:
            metrics.QUEUE.labels(model, state).observe(request.started - request.arrived)
        if request.first_token:
            metrics.TTFT.labels(model, state).observe(request.first_token - request.arrived)
        _log.debug("request ended", request_id=request.client_id, model=model, outcome=_outcome(request))

    def _count_tokens(self, request: Request, count: int) -> None:
        self._load.generated(request.spec.name, count, time.time())
        metrics.OUTPUT_TOKENS.labels(request.spec.name).inc(count)

    def _model_gone(self, model: str) -> None:
        self._tokenizers.forget(model)
        for request in self._dispatcher.waiting_of(model):
            text = f"model {model!r} was undeployed while the request waited"
            request.fail(RequestError(grpc.StatusCode.NOT_FOUND, text, param="model"))


def _expired(requests: list[Request]) -> RequestError:
    if not requests:
        return RequestError(grpc.StatusCode.DEADLINE_EXCEEDED, "the request's deadline passed before it was queued")
    for request in requests:
        request.fail(deadline_passed(request))
    return deadline_passed(max(requests, key=lambda request: len(request.tokens)))


def _outcome(request: Request) -> str:
    if request.error is not None:
        return "deadline" if request.error.code is grpc.StatusCode.DEADLINE_EXCEEDED else "failed"
    match request.finish:
        case inference_pb2.FINISH_REASON_STOP:
            return "stop"
        case inference_pb2.FINISH_REASON_LENGTH:
            return "length"
    return "cancelled"
