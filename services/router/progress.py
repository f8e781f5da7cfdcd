"""What a waiting request is told: where it stands, why, and for how long."""

from __future__ import annotations

import time

from services.router.dispatch import Dispatcher
from services.router.request import Request
from services.router.view import ClusterView
from services.router.wake import Waker
from warmserve.v1 import common_pb2, inference_pb2


class ProgressTeller:
    """Puts together what dispatcher, view and waker know of waiting requests."""

    def __init__(self, dispatcher: Dispatcher, view: ClusterView, waker: Waker) -> None:
        self._dispatcher = dispatcher
        self._view = view
        self._waker = waker

    def estimated_wait_ms(self, model: str) -> float | None:
        """Estimated time until an instance is active; None where nothing is known."""
        status = self._waker.status(model)
        if status is None or status.ready_at is None:
            return None
        return max(0.0, 1000 * (status.ready_at - time.monotonic()))

    def of(self, request: Request) -> inference_pb2.Progress:
        """A waiting request's progress."""
        model = request.spec.name
        progress = inference_pb2.Progress(requests_in_progress=self._dispatcher.count(model))
        status = self._waker.status(model)
        if self._dispatcher.queue_error and request.ticket is None and not request.queueing:
            progress.state = inference_pb2.PROGRESS_STATE_BLOCKED
            progress.reason.cause = common_pb2.CAUSE_FAILURE
            progress.reason.text = "the queue does not answer; the request is kept here and queued when it does"
        elif status is not None and not self._view.active(model):
            progress.state = status.state
            progress.reason.CopyFrom(status.reason)
            wait_ms = self.estimated_wait_ms(model)
            if wait_ms is not None:
                progress.estimated_wait_ms = wait_ms
        else:
            active = self._view.active(model)
            progress.state = inference_pb2.PROGRESS_STATE_QUEUED if active else inference_pb2.PROGRESS_STATE_WAKING
            progress.reason.cause = common_pb2.CAUSE_WAITING_REQUESTS
            progress.reason.text = (
                "waiting for a free place on an instance" if active else "no instance is active; asking for one"
            )
        if request.resumed and progress.state != inference_pb2.PROGRESS_STATE_BLOCKED:
            progress.state = inference_pb2.PROGRESS_STATE_RESUMING
        return progress
