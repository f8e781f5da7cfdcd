"""The gRPC door: InferenceService."""

from __future__ import annotations

from typing import Any

import structlog

from services.router.core import Core
from services.router.errors import invalid
from services.router.prewarm import Prewarmer
from services.router.settings import RouterSettings
from services.router.validation import MAX_TIMEOUT_S, Call, Conversation, Input
from warmserve.v1 import common_pb2, inference_pb2, inference_pb2_grpc


class InferenceService(inference_pb2_grpc.InferenceServiceServicer):
    """Serves InferenceService over the core."""

    def __init__(self, core: Core, prewarmer: Prewarmer, settings: RouterSettings) -> None:
        self._core = core
        self._prewarmer = prewarmer
        self._settings = settings

    async def Generate(  # type: ignore[override]  # it writes to the context
        self, request: inference_pb2.GenerateRequest, context: Any
    ) -> None:
        """Streams the answers. A cancelled call cancels this coroutine, and with it all of them."""
        # Written to the context rather than yielded, so that a cancellation always arrives inside `open`.
        async with self._core.open(self._call(request, context)) as taken:
            request_id = taken[0].client_id
            structlog.contextvars.bind_contextvars(request_id=request_id)
            async for index, event in self._core.follow(taken):
                response = inference_pb2.GenerateResponse(request_id=request_id, index=index)
                if isinstance(event, inference_pb2.Progress):
                    response.progress.CopyFrom(event)
                elif isinstance(event, inference_pb2.TextDelta):
                    response.delta.CopyFrom(event)
                else:
                    response.finished.CopyFrom(event)
                await context.write(response)

    async def ListModels(self, request: inference_pb2.ListModelsRequest, context: Any) -> Any:
        """The deployed models, in order of name."""
        names = sorted(self._core.view.models.items)
        return inference_pb2.ListModelsResponse(models=[self._status(name) for name in names])

    async def Prewarm(self, request: inference_pb2.PrewarmRequest, context: Any) -> Any:
        """Announces traffic of a deployed model."""
        if request.model:
            self._core.spec(request.model)
        announced = await self._prewarmer.announce(request)
        return inference_pb2.PrewarmResponse(id=announced, model=self._status(request.model))

    def _status(self, name: str) -> inference_pb2.ModelStatus:
        spec = self._core.spec(name)
        return inference_pb2.ModelStatus(
            name=name,
            state=self._core.view.best_state(name),
            context_tokens=spec.facts.context_tokens or spec.limits.max_context_tokens,
            deployed_unix_ms=spec.deployed_unix_ms,
        )

    def _call(self, request: inference_pb2.GenerateRequest, context: Any) -> Call:
        given, name = _input(request)
        remaining = context.time_remaining()
        return Call(
            model=request.model,
            input=given,
            input_name=name,
            sampling=request.sampling,
            timeout_s=self._settings.request_timeout_s if remaining is None else min(remaining, MAX_TIMEOUT_S),
            request_id=request.request_id,
            priority=request.priority or common_pb2.PRIORITY_NORMAL,
            n=request.n or 1,
        )


def _input(request: inference_pb2.GenerateRequest) -> tuple[Input, str]:
    match request.WhichOneof("input"):
        case "prompt":
            return request.prompt, "prompt"
        case "conversation":
            messages = [{"role": item.role, "content": item.content} for item in request.conversation.messages]
            return Conversation(messages), "conversation.messages"
        case "token_ids":
            return list(request.token_ids.ids), "token_ids"
    raise invalid("input", "set one of prompt, conversation and token_ids")
