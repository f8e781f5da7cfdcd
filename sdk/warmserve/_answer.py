"""Answers put together from the messages of their stream. No I/O here."""

from __future__ import annotations

from collections.abc import Iterable

from warmserve._enums import enum_word
from warmserve._protocol import Call
from warmserve.errors import WarmServeError
from warmserve.types import Choice, Completion, Progress, TextDelta, Timing, TokenLogprob, TopLogprob, Usage
from warmserve.v1 import common_pb2, inference_pb2


class _Building:
    """One answer so far."""

    def __init__(self) -> None:
        self.text: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.finished: inference_pb2.Finished | None = None


class Answer:
    """What comes back of one call: one answer, or as many as were asked for."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.progress: Progress | None = None
        """Where it stood when it last was reported waiting."""
        self._choices = [_Building() for _ in range(call.request.n or 1)]

    @property
    def several(self) -> bool:
        """Whether more than one answer was asked for."""
        return len(self._choices) > 1

    @property
    def text(self) -> str:
        """The first answer's text so far."""
        return "".join(self._choices[0].text)

    def take(self, response: inference_pb2.GenerateResponse) -> Progress | TextDelta | None:
        """The event in a message; None where it is an end, or of a kind this version does not know.

        Raises WarmServeError where tokens are missing or repeated.
        """
        if response.index >= len(self._choices):
            raise self._error(f"the router sent answer {response.index}, and {len(self._choices)} were asked for")
        choice = self._choices[response.index]
        kind = response.WhichOneof("event")
        if kind == "progress":
            self.progress = _progress(response.progress)
            return self.progress
        if kind == "delta":
            delta = _delta(response)
            if delta.token_ids and delta.offset != len(choice.token_ids):
                raise self._error(f"the router sent token {delta.offset} where token {len(choice.token_ids)} was due")
            choice.text.append(delta.text)
            choice.token_ids.extend(delta.token_ids)
            choice.logprobs.extend(delta.logprobs)
            return delta
        if kind == "finished":
            choice.finished = response.finished
        return None

    def result(self) -> Completion:
        """The completion, once the stream has ended. Raises WarmServeError where it ended without one."""
        ends = [choice.finished for choice in self._choices if choice.finished is not None]
        if len(ends) < len(self._choices):
            raise self._error("the router ended the stream before the answer was complete")
        return Completion(
            request_id=self.call.request_id,
            model=self.call.request.model,
            choices=tuple(
                _choice(index, choice, end) for index, (choice, end) in enumerate(zip(self._choices, ends, strict=True))
            ),
            usage=Usage(ends[0].usage.prompt_tokens, sum(end.usage.completion_tokens for end in ends)),
        )

    def _error(self, message: str) -> WarmServeError:
        return WarmServeError(message, request_id=self.call.request_id)


def _choice(index: int, choice: _Building, finished: inference_pb2.Finished) -> Choice:
    timing = finished.timing
    return Choice(
        index=index,
        text="".join(choice.text),
        token_ids=tuple(choice.token_ids),
        finish_reason=enum_word(inference_pb2.FinishReason.DESCRIPTOR, finished.reason),
        logprobs=tuple(choice.logprobs),
        timing=Timing(
            found_state=enum_word(common_pb2.ReplicaState.DESCRIPTOR, timing.found_state),
            queue_ms=timing.queue_ms,
            prefill_ms=timing.prefill_ms,
            ttft_ms=timing.ttft_ms,
            total_ms=timing.total_ms,
            resumed=timing.resumed,
        ),
    )


def _delta(response: inference_pb2.GenerateResponse) -> TextDelta:
    delta = response.delta
    return TextDelta(delta.text, tuple(delta.token_ids), delta.offset, response.index, tuple(_logprobs(delta.logprobs)))


def _logprobs(given: Iterable[inference_pb2.TokenLogprob]) -> Iterable[TokenLogprob]:
    for item in given:
        top = tuple(TopLogprob(other.token_id, other.logprob, other.token) for other in item.top)
        yield TokenLogprob(item.token_id, item.logprob, item.token, top)


def _progress(message: inference_pb2.Progress) -> Progress:
    return Progress(
        state=enum_word(inference_pb2.ProgressState.DESCRIPTOR, message.state),
        cause=enum_word(common_pb2.Cause.DESCRIPTOR, message.reason.cause),
        reason=message.reason.text,
        estimated_wait_ms=message.estimated_wait_ms if message.HasField("estimated_wait_ms") else None,
        requests_in_progress=message.requests_in_progress,
    )
