"""A small router: speaks InferenceService's real protocol over a real socket. The model's name chooses what it does."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import grpc

from warmserve.v1 import common_pb2, inference_pb2, inference_pb2_grpc

PIECES = ["Once ", "upon ", "", "a ", "time"]
STATUSES = {
    "unknown": (grpc.StatusCode.NOT_FOUND, "no model 'unknown' is deployed; the nearest are llama-a, llama-b"),
    "invalid": (grpc.StatusCode.INVALID_ARGUMENT, "temperature: 9 is above 2"),
    "full": (grpc.StatusCode.RESOURCE_EXHAUSTED, "100 requests wait already"),
    "stopping": (grpc.StatusCode.UNAVAILABLE, "the router is stopping"),
    "broken": (grpc.StatusCode.INTERNAL, "internal error"),
    "late": (grpc.StatusCode.DEADLINE_EXCEEDED, "no instance in time"),
}
TRAILERS = {
    "unknown": (("warmserve-suggestion", "llama-a"), ("warmserve-suggestion", "llama-b")),
    "full": (("warmserve-retry-after-ms", "1500"),),
}


class InferenceServer(inference_pb2_grpc.InferenceServiceServicer):
    """Use `address`; `requests` and `metadata` are what came; `cancelled` is set when a call's client has gone."""

    def __init__(self, port: int = 0) -> None:
        self.requests: list[inference_pb2.GenerateRequest] = []
        self.announced: list[inference_pb2.PrewarmRequest] = []
        self.metadata: list[dict[str, Any]] = []
        self.remaining_s: list[float | None] = []
        self.cancelled = threading.Event()
        self._server = grpc.server(futures.ThreadPoolExecutor(8))
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(self, self._server)
        port = self._server.add_insecure_port(f"127.0.0.1:{port}")
        self.address = f"127.0.0.1:{port}"
        self._server.start()

    def stop(self) -> None:
        self._server.stop(0).wait()

    def Generate(
        self, request: inference_pb2.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[inference_pb2.GenerateResponse]:
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        self.remaining_s.append(context.time_remaining())
        if request.model in ("never", "stuck"):
            context.add_callback(self.cancelled.set)
        if request.model in STATUSES:
            context.set_trailing_metadata(TRAILERS.get(request.model, ()))
            context.abort(*STATUSES[request.model])
        yield inference_pb2.GenerateResponse(
            request_id=request.request_id,
            progress=inference_pb2.Progress(
                state=inference_pb2.PROGRESS_STATE_WAKING,
                reason=common_pb2.Reason(cause=common_pb2.CAUSE_WAITING_REQUESTS, text="1 request waits"),
                estimated_wait_ms=250,
                requests_in_progress=1,
            ),
        )
        if request.model == "never":  # waits until its client goes
            self.cancelled.wait(60)
            return
        count = 1 if request.model == "fewer" else request.n or 1
        for offset, text in enumerate(PIECES):
            for index in range(count):  # the first answer as it is, further ones in capitals
                said = text.upper() if index else text
                delta = self._delta(request, said, offset + (offset > 1 and request.model == "gap"))
                delta.index = index + (request.model == "surplus")
                yield delta
            if request.model == "stuck" and offset == 1:
                self.cancelled.wait(60)
                return
            if request.model == "breaks" and offset == 1:
                context.abort(grpc.StatusCode.UNAVAILABLE, "the router is stopping")
        if request.model == "unfinished":
            return
        for index in range(count):
            yield inference_pb2.GenerateResponse(
                request_id=request.request_id,
                index=index,
                finished=inference_pb2.Finished(
                    reason=inference_pb2.FINISH_REASON_STOP if index else inference_pb2.FINISH_REASON_LENGTH,
                    usage=inference_pb2.Usage(prompt_tokens=3, completion_tokens=5),
                    timing=inference_pb2.Timing(
                        found_state=common_pb2.REPLICA_STATE_WARM, queue_ms=10, prefill_ms=5, ttft_ms=15, total_ms=40
                    ),
                ),
            )

    def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: grpc.ServicerContext
    ) -> inference_pb2.ListModelsResponse:
        return inference_pb2.ListModelsResponse(
            models=[
                inference_pb2.ModelStatus(
                    name="llama-a",
                    state=common_pb2.REPLICA_STATE_COLD,
                    context_tokens=2048,
                    deployed_unix_ms=1_700_000_000_000,
                )
            ]
        )

    def Prewarm(
        self, request: inference_pb2.PrewarmRequest, context: grpc.ServicerContext
    ) -> inference_pb2.PrewarmResponse:
        self.announced.append(request)
        if request.model in STATUSES:
            context.set_trailing_metadata(TRAILERS.get(request.model, ()))
            context.abort(*STATUSES[request.model])
        status = inference_pb2.ModelStatus(name=request.model, state=common_pb2.REPLICA_STATE_WARM, context_tokens=2048)
        return inference_pb2.PrewarmResponse(id="a1", model=status)

    def _delta(self, request: inference_pb2.GenerateRequest, text: str, offset: int) -> inference_pb2.GenerateResponse:
        delta = inference_pb2.TextDelta(text=text, token_ids=[100 + offset], offset=offset)
        if request.sampling.HasField("logprobs"):
            top = [
                inference_pb2.TopLogprob(token_id=100 + offset + i, logprob=-i - 0.5, token=b"\xe6")
                for i in range(request.sampling.logprobs)
            ]
            delta.logprobs.add(token_id=100 + offset, logprob=-0.5, token=text.encode(), top=top)
        return inference_pb2.GenerateResponse(request_id=request.request_id, delta=delta)


def unused_address() -> str:
    """Where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"
