"""Replays arrivals against a router, as its clients would send them, and records what each client saw."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from warmserve import AsyncClient, Options, TextDelta, WarmServeError
from warmserve.traces import Request

_WORDS = tuple(
    word
    for line in (
        "the model is warm and the request waits for an agent that has free pages so return self name value not found",
        "in time of each step with one more token from its queue when it ends as a list or None if there was no other",
    )
    for word in line.split()
)


@dataclass(frozen=True)
class Outcome:
    """What became of one request. Times in seconds; `ttft_s` as the client measured it."""

    model: str
    at_s: float  # when it was sent, since the replay's begin
    found_state: str  # active, warm, warming or cold; "" where it was lost
    ttft_s: float
    total_s: float
    prompt_tokens: int
    output_tokens: int
    resumed: int
    error: str  # "" where it was answered in full
    tokens_s: tuple[float, ...] = ()  # when each token came, since it was sent
    queue_s: float = 0.0  # until an instance took it, as the router measured
    router_ttft_s: float = 0.0  # likewise, until the first token

    @property
    def lost(self) -> bool:
        """Whether the client got less than it asked for."""
        return self.error != ""


async def replay(
    target: str,
    requests: Sequence[Request],
    *,
    timeout_s: float,
    seed: int,
    on_sent: Callable[[Request], None],
    on_outcome: Callable[[Outcome], None],
) -> list[Outcome]:
    """Sends each request at its time, whatever became of those before, and waits for all. Failures are outcomes too.

    Prompts are words of about one token each; answers go on past an end-of-sequence token, so that they are as long
    as the trace's.
    """
    begin = time.monotonic()
    async with AsyncClient(target, timeout=timeout_s) as client:

        async def send(index: int, request: Request) -> Outcome:
            await asyncio.sleep(begin + request.time_s - time.monotonic())
            on_sent(request)
            outcome = await _send(client, request, random.Random(seed * 1_000_003 + index), begin)
            on_outcome(outcome)
            return outcome

        return await asyncio.gather(*(send(index, request) for index, request in enumerate(requests)))


async def _send(client: AsyncClient, request: Request, chance: random.Random, begin: float) -> Outcome:
    prompt = " ".join(chance.choices(_WORDS, k=request.prompt_tokens))
    sent = time.monotonic()
    tokens_s: list[float] = []
    error = ""
    completion = None
    options: Options = {
        "max_tokens": request.output_tokens,
        "ignore_eos": True,
        "temperature": 0.8,
        "seed": chance.getrandbits(32),
    }
    try:
        async with client.stream_generate(request.model, prompt, **options) as stream:
            async for event in stream:
                if isinstance(event, TextDelta):
                    tokens_s += [time.monotonic() - sent] * len(event.token_ids)
        completion = stream.completion
    except WarmServeError as failure:
        error = f"{type(failure).__name__}: {failure}"
    ended = time.monotonic()
    return Outcome(
        model=request.model,
        at_s=sent - begin,
        found_state=completion.timing.found_state if completion else "",
        ttft_s=tokens_s[0] if tokens_s else ended - sent,
        total_s=ended - sent,
        prompt_tokens=completion.usage.prompt_tokens if completion else 0,
        output_tokens=completion.usage.completion_tokens if completion else 0,
        resumed=completion.timing.resumed if completion else 0,
        error=error,
        tokens_s=tuple(tokens_s),
        queue_s=completion.timing.queue_ms / 1000 if completion else 0.0,
        router_ttft_s=completion.timing.ttft_ms / 1000 if completion else 0.0,
    )
