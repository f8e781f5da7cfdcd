"""One answer in progress, and what news from agents does to it: exactly once towards the client."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING

from services.common.queues import Ticket
from services.router.errors import RequestError
from warmserve.v1 import agent_pb2, cluster_pb2, common_pb2, inference_pb2

if TYPE_CHECKING:
    from services.router.relay import RelayStream
    from services.router.tokenizers import ModelTokenizer


class Outcome(Enum):
    """What the router has to do after an update from an agent."""

    NOTHING = auto()
    CANCEL_SENDER = auto()  # the sender works on something nobody waits for
    PUT_BACK = auto()  # the sender lost tokens or gave up: another instance must go on
    FAILED = auto()  # the sender reports an error
    REFUSED = auto()  # the sender says that nobody can serve it
    TOO_LARGE = auto()  # the sender's memory could not hold it; another one's may
    EXPIRED = auto()  # the deadline has passed


@dataclass(eq=False)
class Request:
    """A request for one answer, from its tokenised prompt to its end. Times are the event loop's, in seconds.

    Where a client asks for several answers, each is a request of its own, with its own attempts and its own instance.
    """

    id: str  # unique in the cluster
    client_id: str  # the client's own, for logs and answers
    spec: cluster_pb2.ModelSpec
    prompt: list[int]
    sampling: inference_pb2.SamplingParams
    priority: common_pb2.Priority.ValueType
    arrived: float
    arrived_unix_ms: int
    deadline_unix_ms: int
    found_state: common_pb2.ReplicaState.ValueType
    tokenizer: ModelTokenizer  # the model's, kept even when the model is undeployed meanwhile
    changed: asyncio.Event  # set when there is news; all answers to one call share it
    index: int = 0  # which answer to the call it is

    # Where it is. With no instance it waits, in the queue under `ticket`, or in memory alone while Redis is away.
    attempt: int = 0
    ticket: Ticket | None = None
    queueing: bool = False  # being put into the queue at this moment
    instance_id: str = ""
    stream: RelayStream | None = None
    agent_ids: frozenset[str] = frozenset()

    # What has come of it.
    tokens: list[int] = field(default_factory=list)
    logprobs: list[inference_pb2.TokenLogprob] = field(default_factory=list)  # one for each token, where asked for
    finish: inference_pb2.FinishReason.ValueType = inference_pb2.FINISH_REASON_UNSPECIFIED
    error: RequestError | None = None
    started: float = 0.0
    first_token: float = 0.0
    resumed: int = 0
    released: bool = False  # neither a queue nor an instance has it any more
    too_large: dict[str, str] = field(default_factory=dict)  # instances that could not hold it, and what they said
    failures: int = 0  # attempts in a row that instances reported as failed, without a new token

    @property
    def ended(self) -> bool:
        """Whether nothing more will come."""
        return self.error is not None or self.finish != inference_pb2.FINISH_REASON_UNSPECIFIED

    @property
    def waiting(self) -> bool:
        """Whether no instance has it."""
        return not self.ended and not self.instance_id

    def queued(self, router_id: str, relay_address: str) -> agent_pb2.QueuedRequest:
        """The request as the next instance must go on with it."""
        return agent_pb2.QueuedRequest(
            request_id=self.id,
            model=self.spec.name,
            attempt=self.attempt,
            router_id=router_id,
            relay_address=relay_address,
            token_ids=self.prompt + self.tokens,
            generated=len(self.tokens),
            sampling=self.sampling,
            deadline_unix_ms=self.deadline_unix_ms,
            arrived_unix_ms=self.arrived_unix_ms,
            priority=self.priority,
            too_large_for=self.too_large,
        )

    def apply(self, update: agent_pb2.SequenceUpdate, stream: RelayStream, now: float) -> Outcome:
        """Takes in news of this request. Tokens that came before are ignored; a gap is never passed on."""
        if self.ended or (update.attempt != self.attempt and stream is not self.stream):
            return Outcome.CANCEL_SENDER
        if update.attempt != self.attempt:  # the same agent goes on with a newer attempt: do not cancel that
            return Outcome.NOTHING
        if not self.instance_id:
            self.instance_id = update.instance_id
            self.stream = stream
            if not self.tokens:
                self.started = now
            self.changed.set()
        elif self.instance_id != update.instance_id:
            return Outcome.NOTHING if stream is self.stream else Outcome.CANCEL_SENDER
        return self._take_tokens(update, now)

    def _take_tokens(self, update: agent_pb2.SequenceUpdate, now: float) -> Outcome:
        if update.token_ids:
            known = len(self.tokens) - update.offset
            if known < 0:
                return Outcome.PUT_BACK
            fresh = update.token_ids[known:]
            if fresh:
                if self.sampling.HasField("logprobs"):
                    if len(update.logprobs) != len(update.token_ids):
                        return Outcome.FAILED
                    self.logprobs.extend(update.logprobs[known:])
                self.first_token = self.first_token or now
                self.tokens.extend(fresh)
                self.failures = 0
                self.changed.set()
        match update.finish_reason:
            case inference_pb2.FINISH_REASON_STOP | inference_pb2.FINISH_REASON_LENGTH:
                self.finish = update.finish_reason
                self.released = True
                self.changed.set()
            case inference_pb2.FINISH_REASON_CANCELLED:
                return Outcome.PUT_BACK  # not by us: this request would not be found any more
            case inference_pb2.FINISH_REASON_DEADLINE:
                return Outcome.EXPIRED
            case inference_pb2.FINISH_REASON_ERROR:
                return Outcome.FAILED
            case inference_pb2.FINISH_REASON_REFUSED:
                return Outcome.REFUSED
            case inference_pb2.FINISH_REASON_TOO_LARGE:
                return Outcome.TOO_LARGE
        return Outcome.NOTHING

    def fail(self, error: RequestError) -> None:
        """Ends it with an error; what ended before stays as it is."""
        if not self.ended:
            self.error = error
            self.changed.set()

    def stop_at(self, tokens: int) -> None:
        """Ends it at a stop text that its first `tokens` tokens complete."""
        del self.tokens[tokens:]
        del self.logprobs[tokens:]
        self.error = None
        self.finish = inference_pb2.FINISH_REASON_STOP

    def end_at_length(self) -> None:
        """Ends it because it has all the tokens it may have."""
        self.finish = inference_pb2.FINISH_REASON_LENGTH
        self.changed.set()

    def detach(self) -> None:
        """Begins a new attempt, which nobody has yet."""
        self.attempt += 1
        self.instance_id = ""
        self.stream = None
        self.agent_ids = frozenset()
        self.ticket = None
        self.changed.set()

    def timing(self, now: float) -> inference_pb2.Timing:
        """Where its time went until now."""
        started = self.started or now
        return inference_pb2.Timing(
            found_state=self.found_state,
            queue_ms=1000 * (started - self.arrived),
            prefill_ms=1000 * (self.first_token - started) if self.first_token else 0.0,
            ttft_ms=1000 * (self.first_token - self.arrived) if self.first_token else 0.0,
            total_ms=1000 * (now - self.arrived),
            resumed=self.resumed,
        )
