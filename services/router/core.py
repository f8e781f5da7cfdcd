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
from services.router.detokenizer import AnswerText
from services.router.dispatch import Dispatcher, deadline_passed
from services.router.errors import RequestError, unavailable
from services.router.load import LoadRecorder
from services.router.progress import ProgressTeller
from services.router.request import Request
from services.router.settings import RouterSettings
from services.router.tokenizers import TokenizerCache
from services.router.validation import Call, allowed_tokens, check_call, unknown_model
from services.router.view import ClusterView
from warmserve.v1 import cluster_pb2, inference_pb2

_log = logger(__name__)
_STOPPING_RETRY_S = 2.0
_FAREWELL_S = 5.0  # for clients to take the error that ends their request

Event = inference_pb2.Progress | inference_pb2.TextDelta | inference_pb2.Finished


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
    async def open(self, call: Call) -> AsyncIterator[Request]:
        """Checks a call and queues its request; leaving the context drops it wherever it is.

        The deadline holds for everything inside, the caller's own waits too. Raises RequestError.
        """
        arrived = asyncio.get_running_loop().time()
        request: Request | None = None
        try:
            check_call(call, self._settings.max_prompt_chars)
            spec = self.spec(call.model)
            with self._admit(spec.name):
                try:
                    async with asyncio.timeout(call.timeout_s) as limit:
                        request = await self._prepare(call, spec, arrived)
                        self._begin(request)
                        yield request
                except TimeoutError as error:
                    if not limit.expired():
                        raise
                    late = _expired(request)
                    raise late from error
                finally:
                    if request is not None:
                        self._end(request)
        except RequestError:
            if request is None:
                model = call.model if call.model in self.view.models.items else ""
                metrics.REQUESTS.labels(model, "refused", "").inc()
            raise

    async def follow(self, request: Request) -> AsyncIterator[Event]:
        """A request's events, up to and including Finished. Raises RequestError where it fails."""
        answer = AnswerText(request.decoder, request.prompt, request.sampling.stop)
        sent = 0
        told = inference_pb2.Progress()
        news = True
        while True:
            if request.error is not None:
                raise request.error
            fresh = request.tokens[sent:]
            if fresh:
                text, used = answer.push(fresh)
                if answer.stopped:
                    self._stop_at(request, sent + used)
                yield inference_pb2.TextDelta(text=text, token_ids=fresh[:used], offset=sent)
                sent += used
            elif request.finish:
                if rest := answer.flush():
                    yield inference_pb2.TextDelta(text=rest, offset=sent)
                yield self._finished(request, answer.stopped)
                return
            elif news and request.waiting:
                news = False
                progress = self._progress.of(request)
                known = (progress.state, progress.reason) == (told.state, told.reason)
                if not known or progress.HasField("estimated_wait_ms"):
                    told = progress
                    yield progress
            else:
                await request.changed.wait()
                request.changed.clear()
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
    def _admit(self, model: str) -> Iterator[None]:
        if self.stopping:
            raise unavailable("the router is stopping; send the request to another", _STOPPING_RETRY_S)
        settings = self._settings
        if self._in_progress[model] >= settings.max_requests_per_model:
            raise self._full(f"{settings.max_requests_per_model} requests of model {model!r} are in progress", model)
        if self._in_progress.total() >= settings.max_requests:
            raise self._full(f"{settings.max_requests} requests are in progress", model)
        self._in_progress[model] += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._in_progress[model] -= 1
            if not self._in_progress[model]:
                del self._in_progress[model]
            if not self._in_progress:
                self._idle.set()

    def _full(self, what: str, model: str) -> RequestError:
        wait_ms = self._progress.estimated_wait_ms(model) or 0.0
        message = f"{what} at this router, and it takes no more at a time; try again later"
        retry_after_s = max(1, math.ceil(wait_ms / 1000))
        return RequestError(grpc.StatusCode.RESOURCE_EXHAUSTED, message, retry_after_s=retry_after_s)

    async def _prepare(self, call: Call, spec: cluster_pb2.ModelSpec, arrived: float) -> Request:
        found_state = self.view.best_state(spec.name)
        now_ms = int(time.time() * 1000)
        tokenizer = await self._tokenizers.get(spec)
        prompt = await self._tokenizers.encode(tokenizer, call.input, call.input_name)
        sampling = inference_pb2.SamplingParams()
        sampling.CopyFrom(call.sampling)
        context = spec.facts.context_tokens or spec.limits.max_context_tokens
        sampling.max_tokens = allowed_tokens(len(prompt), call.sampling, context, call.input_name)
        if not sampling.HasField("seed"):
            sampling.seed = random.getrandbits(64)
        unique = uuid.uuid4().hex
        return Request(
            id=unique,
            client_id=call.request_id or unique,
            spec=spec,
            prompt=prompt,
            sampling=sampling,
            priority=call.priority,
            arrived=arrived,
            arrived_unix_ms=now_ms,
            deadline_unix_ms=now_ms + int(call.timeout_s * 1000),
            found_state=found_state,
            decoder=tokenizer.backend,
        )

    def _begin(self, request: Request) -> None:
        model = request.spec.name
        if model not in self.view.models.items:
            raise unknown_model(model, self.view.models.items)  # undeployed while the prompt was tokenised
        self._load.arrived(model, len(request.prompt), time.time())
        metrics.IN_PROGRESS.labels(model).inc()
        metrics.PROMPT_TOKENS.labels(model).inc(len(request.prompt))
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

    def _stop_at(self, request: Request, tokens: int) -> None:
        request.stop_at(tokens)
        self._dispatcher.release(request)

    def _finished(self, request: Request, stopped: bool) -> inference_pb2.Finished:
        return inference_pb2.Finished(
            reason=inference_pb2.FINISH_REASON_STOP if stopped else request.finish,
            usage=inference_pb2.Usage(prompt_tokens=len(request.prompt), completion_tokens=len(request.tokens)),
            timing=request.timing(asyncio.get_running_loop().time()),
        )

    def _count_tokens(self, request: Request, count: int) -> None:
        self._load.generated(request.spec.name, count, time.time())
        metrics.OUTPUT_TOKENS.labels(request.spec.name).inc(count)

    def _model_gone(self, model: str) -> None:
        self._tokenizers.forget(model)
        for request in self._dispatcher.waiting_of(model):
            text = f"model {model!r} was undeployed while the request waited"
            request.fail(RequestError(grpc.StatusCode.NOT_FOUND, text, param="model"))


def _expired(request: Request | None) -> RequestError:
    if request is None:
        return RequestError(grpc.StatusCode.DEADLINE_EXCEEDED, "the request's deadline passed before it was queued")
    late = deadline_passed(request)
    request.fail(late)
    return late


def _outcome(request: Request) -> str:
    if request.error is not None:
        return "deadline" if request.error.code is grpc.StatusCode.DEADLINE_EXCEEDED else "failed"
    match request.finish:
        case inference_pb2.FINISH_REASON_STOP:
            return "stop"
        case inference_pb2.FINISH_REASON_LENGTH:
            return "length"
    return "cancelled"
