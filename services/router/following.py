"""What a client is told of one answer: where it waits, its text as it comes, its end."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from services.router.detokenizer import AnswerText
from services.router.dispatch import Dispatcher
from services.router.progress import ProgressTeller
from services.router.request import Request
from warmserve.v1 import inference_pb2

Event = inference_pb2.Progress | inference_pb2.TextDelta | inference_pb2.Finished


@dataclass
class Told:
    """The progress that a call's client heard last, and of which answer."""

    index: int = -1
    progress: inference_pb2.Progress = field(default_factory=inference_pb2.Progress)


class Follower:
    """Follows one answer. The answers to one call share `told`, so that what is true of all is told once."""

    def __init__(self, request: Request, progress: ProgressTeller, dispatcher: Dispatcher, told: Told) -> None:
        self.finished = False
        """Whether Finished has been given out."""
        self._request = request
        self._progress = progress
        self._dispatcher = dispatcher
        self._told = told
        self._sent = 0
        sampling = request.sampling
        self._answer = AnswerText(request.tokenizer.backend, request.prompt, sampling.stop, sampling.min_tokens)

    @property
    def index(self) -> int:
        """Which answer to the call it is."""
        return self._request.index

    def next(self, changed: bool) -> Event | None:
        """What there is to tell now, one event at a time; progress only where something has `changed`.

        Raises RequestError where the answer failed.
        """
        request = self._request
        if self.finished:
            return None
        if request.error is not None:
            raise request.error
        if len(request.tokens) > self._sent:
            return self._delta()
        if request.finish:
            if rest := self._answer.flush():
                return inference_pb2.TextDelta(text=rest, offset=self._sent)
            self.finished = True
            return self._end()
        return self._waits() if changed and request.waiting else None

    def _delta(self) -> inference_pb2.TextDelta:
        request, start = self._request, self._sent
        fresh = request.tokens[start:]
        text, used = self._answer.push(fresh)
        self._sent += used
        if self._answer.stopped:
            request.stop_at(self._sent)
            self._dispatcher.release(request)
        logprobs = [request.tokenizer.with_bytes(item) for item in request.logprobs[start : self._sent]]
        return inference_pb2.TextDelta(text=text, token_ids=fresh[:used], offset=start, logprobs=logprobs)

    def _end(self) -> inference_pb2.Finished:
        request = self._request
        return inference_pb2.Finished(
            reason=inference_pb2.FINISH_REASON_STOP if self._answer.stopped else request.finish,
            usage=inference_pb2.Usage(prompt_tokens=len(request.prompt), completion_tokens=len(request.tokens)),
            timing=request.timing(asyncio.get_running_loop().time()),
        )

    def _waits(self) -> inference_pb2.Progress | None:
        progress = self._progress.of(self._request)
        told = self._told
        known = (progress.state, progress.reason) == (told.progress.state, told.progress.reason)
        if known and (told.index != self.index or not progress.HasField("estimated_wait_ms")):
            return None
        self._told.index, self._told.progress = self.index, progress
        return progress
