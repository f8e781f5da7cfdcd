"""Serving by one instance: it takes requests from Redis, has the engine run them, and sends their tokens to routers."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prometheus_client import Counter
from redis.exceptions import RedisError

from services.common.queues import RequestQueue, Taken, Ticket
from services.common.tasks import begin_task, end_tasks
from services.common.telemetry import logger
from services.gpu_agent.engine.loop import EngineLoop
from services.gpu_agent.engine.pace import Pace
from services.gpu_agent.engine.sampling_params import Grammar
from services.gpu_agent.engine.sequence import FinishReason, Sequence, SequenceOutput
from services.gpu_agent.queued_request import refusal, sequence_of, too_large, update_of
from services.gpu_agent.relay import Relay
from warmserve.v1 import agent_pb2

if TYPE_CHECKING:
    from services.gpu_agent.engine.grammar import GrammarCompiler

_log = logger(__name__)
_BLOCK_MS = 1000
_RETRY_S = 0.2
_LOOK_S = 1.0
_RELEASE_S = 5.0
_PACE_S = 1.0  # how often it looks whether its pace has changed
_COMPILERS = 2  # threads in which grammars are compiled
_TOKENS = Counter("warmserve_gpu_agent_tokens_total", "Tokens generated", ["model"])
_SEQUENCES = Counter("warmserve_gpu_agent_sequences_total", "Sequences ended", ["model", "finish"])


@dataclass(frozen=True)
class _Running:
    ticket: Ticket
    relay_address: str
    attempt: int


class InstanceServer:
    """Runs on the event loop.

    `on_load()` is called whenever the number of running sequences turns zero or non-zero. Grammars are compiled in
    threads of its own, because that may take seconds.
    """

    def __init__(
        self,
        instance_id: str,
        model: str,
        slots: int,
        engine: EngineLoop,
        queue: RequestQueue,
        relay: Relay,
        on_load: Callable[[], None],
        grammars: GrammarCompiler,
    ) -> None:
        self.instance_id = instance_id
        self.slots = slots
        self.pace: Pace | None = None
        """How long its sequences wait for their next tokens, as `look_at_pace` saw it; None while that is not known."""
        self._model = model
        self._engine = engine
        self._queue = queue
        self._relay = relay
        self._on_load = on_load
        self._pace_due = 0.0  # when it is to be looked at again; time.monotonic()
        self._grammars = grammars
        self._compilers = ThreadPoolExecutor(_COMPILERS, thread_name_prefix=f"grammars {instance_id}")
        self._compiling: dict[str, asyncio.Task[None]] = {}  # requests that the engine does not have yet
        self._running: dict[str, _Running] = {}
        self._slot_freed = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._pulling: asyncio.Task[None] | None = None
        self._ending: dict[asyncio.Task[None], Ticket] = {}  # ended, but Redis does not know yet

    @property
    def running(self) -> int:
        """Sequences in progress."""
        return len(self._running)

    def start_pulling(self) -> None:
        """Begins, or goes on, to take requests."""
        if self._pulling is None:
            self._pulling = begin_task(self._pull(), f"pull {self.instance_id}")

    async def stop_pulling(self) -> None:
        """Takes no more requests; what was taken but not begun goes back to the queue."""
        await end_tasks([self._pulling])
        self._pulling = None
        try:
            async with asyncio.timeout(_RELEASE_S):
                await self._release()
        except (RedisError, TimeoutError) as error:
            # The routers find those requests when this instance's record is gone.
            _log.warning("could not give requests back", instance=self.instance_id, error=str(error))

    async def until_idle(self, unless: asyncio.Event) -> bool:
        """Waits until no sequence is in progress, and returns True; False where `unless` is set before that."""
        # In a loop, because an event may be cleared again before its waiter runs.
        while not unless.is_set() and not self._idle.is_set():
            waits = [asyncio.create_task(event.wait()) for event in (self._idle, unless)]
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()
        return not unless.is_set()

    async def flush(self, within_s: float) -> None:
        """Returns once Redis has been told of every ended request; where it is away, after `within_s` seconds."""
        if self._ending:
            await asyncio.wait(self._ending, timeout=within_s)

    async def close(self) -> None:
        """Ends what is left of it, and leaves the group of readers."""
        await end_tasks([self._pulling, *self._ending, *self._compiling.values()])
        self._compilers.shutdown(wait=False, cancel_futures=True)
        try:
            async with asyncio.timeout(_RELEASE_S):
                await self._queue.leave(self._model, self.instance_id)
        except (RedisError, TimeoutError) as error:
            _log.warning("could not leave the readers", instance=self.instance_id, error=str(error))

    def handle(self, outputs: Iterable[SequenceOutput]) -> None:
        """Passes one engine step's news on to the routers concerned."""
        by_router: defaultdict[str, list[agent_pb2.SequenceUpdate]] = defaultdict(list)
        tokens = 0
        for output in outputs:
            run = self._running.get(output.request_id)
            if run is None or run.attempt != output.attempt:
                continue
            tokens += len(output.token_ids)
            update = update_of(output, self.instance_id)
            if output.finish_reason is not None:
                _SEQUENCES.labels(self._model, output.finish_reason.value).inc()
                self._forget(output.request_id)
            by_router[run.relay_address].append(update)
        _TOKENS.labels(self._model).inc(tokens)
        for address, updates in by_router.items():
            self._relay.send(address, updates)

    def look_at_pace(self) -> bool:
        """Whether the pace has changed, looked at once a second and whenever it becomes idle."""
        now = time.monotonic()
        if now < self._pace_due and self._running:
            return False
        self._pace_due = now + _PACE_S
        pace = self._engine.new_pace(self.instance_id)
        self.pace = pace or self.pace
        return pace is not None

    def cancel(self, request_ids: Iterable[str]) -> None:
        """Drops sequences that nobody waits for any more."""
        for request_id in request_ids:
            if request_id in self._compiling:  # the engine does not know it
                run = self._running[request_id]
                self.handle([SequenceOutput(request_id, run.attempt, [], 0, FinishReason.CANCELLED)])
            elif request_id in self._running:
                self._engine.cancel(request_id)

    def cancel_router(self, address: str) -> None:
        """Drops all sequences of a router that was lost, telling it nothing."""
        for name in [name for name, run in self._running.items() if run.relay_address == address]:
            self._drop(name)

    def fail_all(self, error: str) -> None:
        """Gives every sequence in progress up, so that its router puts it back and another instance goes on."""
        self.handle(
            [
                SequenceOutput(name, run.attempt, [], 0, FinishReason.ERROR, error)
                for name, run in list(self._running.items())
            ]
        )

    async def _pull(self) -> None:
        looked = time.monotonic()
        while True:
            free = self.slots - self.running
            if free <= 0:
                self._slot_freed.clear()
                await self._slot_freed.wait()
                continue
            try:
                if time.monotonic() - looked > _LOOK_S:
                    await self._release()
                    looked = time.monotonic()
                for taken in await self._queue.take(self._model, self.instance_id, free, _BLOCK_MS):
                    self._begin(taken)
            except RedisError as error:
                _log.warning("Redis does not answer; trying again", instance=self.instance_id, error=str(error))
                await asyncio.sleep(_RETRY_S)

    async def _release(self) -> None:
        """Puts back what Redis says is taken and nobody here knows of: the answer with it was lost on the way."""
        known = {run.ticket for run in self._running.values()} | set(self._ending.values())
        if released := await self._queue.release(self._model, self.instance_id, known):
            _log.warning("gave back requests that had not arrived", instance=self.instance_id, requests=released)

    def _begin(self, taken: Taken) -> None:
        request = taken.request
        name = request.request_id
        before = self._running.get(name)
        if before is not None and before.attempt >= request.attempt:
            # The same request twice, because delivery is at least once; the first goes on.
            self._tell_redis(taken.ticket)
            return
        if before is not None:
            # Its router gave the older attempt up.
            self._drop(name)
        if self.instance_id in request.too_large_for:
            self._relay.send(request.relay_address, [too_large(name, request.attempt, self.instance_id)])
            self._tell_redis(taken.ticket)
            return
        self._running[name] = _Running(taken.ticket, request.relay_address, request.attempt)
        if self._idle.is_set():
            self._idle.clear()
            self._on_load()
        started = agent_pb2.SequenceUpdate(
            request_id=name, attempt=request.attempt, instance_id=self.instance_id, offset=request.generated
        )
        self._relay.send(request.relay_address, [started])
        if request.deadline_unix_ms and request.deadline_unix_ms <= time.time() * 1e3:
            self.handle([SequenceOutput(name, request.attempt, [], request.generated, FinishReason.DEADLINE)])
            return
        try:
            sequence = sequence_of(request)
        except ValueError as error:
            self._refuse(name, str(error))
            return
        if sequence.sampling.grammar is None:
            self._engine.submit(self.instance_id, sequence)
        else:
            task = begin_task(self._compile(sequence, sequence.sampling.grammar), f"compile the grammar of {name}")
            self._compiling[name] = task

    async def _compile(self, sequence: Sequence, grammar: Grammar) -> None:
        name, attempt, generated = sequence.request_id, sequence.attempt, sequence.num_generated
        answer = sequence.token_ids[len(sequence.token_ids) - generated :]
        try:
            loop = asyncio.get_running_loop()
            sequence.matcher = await loop.run_in_executor(self._compilers, self._grammars.matcher, grammar, answer)
        except ValueError as error:
            if generated:  # it was good enough for an earlier attempt
                self.handle([SequenceOutput(name, attempt, [], generated, FinishReason.ERROR, str(error))])
            else:
                self._refuse(name, str(error))
        except Exception as error:
            # Whatever it is, the request must not be lost; another instance may do better.
            text = f"the grammar could not be compiled: {error!r}"
            self.handle([SequenceOutput(name, attempt, [], generated, FinishReason.ERROR, text)])
            raise
        else:
            del self._compiling[name]
            self._engine.submit(self.instance_id, sequence)

    def _refuse(self, name: str, error: str) -> None:
        """Ends a request that no instance could serve."""
        run = self._running[name]
        self._relay.send(run.relay_address, [refusal(name, run.attempt, self.instance_id, error)])
        _SEQUENCES.labels(self._model, "refused").inc()
        self._forget(name)

    def _drop(self, request_id: str) -> None:
        self._engine.cancel(request_id)
        self._forget(request_id)

    def _forget(self, request_id: str) -> None:
        run = self._running.pop(request_id)
        compiling = self._compiling.pop(request_id, None)
        if compiling is not None and compiling is not asyncio.current_task():
            compiling.cancel()
        self._tell_redis(run.ticket)
        self._slot_freed.set()
        if not self._running:
            self._idle.set()
            self._on_load()

    def _tell_redis(self, ticket: Ticket) -> None:
        task = begin_task(self._done(ticket), f"forget {ticket.entry_id}")
        self._ending[task] = ticket
        task.add_done_callback(self._ending.pop)

    async def _done(self, ticket: Ticket) -> None:
        while True:
            try:
                return await self._queue.done(ticket)
            except RedisError:
                await asyncio.sleep(_RETRY_S)
