"""The engine's thread: the steps of all active instances, each of which gets the same share of the device."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from services.gpu_agent.engine.instance import Instance, InstanceStats
from services.gpu_agent.engine.pace import Pace
from services.gpu_agent.engine.sequence import FinishReason, Sequence, SequenceOutput

_log = logging.getLogger(__name__)

_UNDER_WAY = 2  # steps, of whichever instances: one that the device works on, and the next

# How long an instance that is short of KV pages waits before it looks again. Pages come back without a word when the
# loader's thread evicts weights.
_STALL_S = 0.005


class EngineStopped(RuntimeError):
    """The engine's thread has ended."""


@dataclass(frozen=True)
class _Command:
    run: Callable[[], None]
    done: Future[None]


@dataclass(frozen=True)
class _Job:
    piece: Callable[[], bool]
    done: Future[None]


@dataclass(eq=False)
class _Active:
    """An instance and its turn."""

    instance: Instance
    share: float = 0.0  # seconds of the device that it has had, or would have had if it had always been busy
    last: float = 0.0  # seconds of its last step, which the next is expected to take
    expected: deque[float] = field(default_factory=deque)  # of its steps under way; in `share` already
    stalled: bool = False  # it has work, but waits for KV pages that others hold


class EngineLoop:
    """Owns the one engine thread of an agent. All methods may be called from any thread and return at once.

    Both callbacks run in the engine's thread and must neither block nor raise: hand over with
    `loop.call_soon_threadsafe`.
    """

    def __init__(
        self,
        on_step: Callable[[str, list[SequenceOutput]], None],
        on_failure: Callable[[str, Exception], None],
        is_fatal: Callable[[BaseException], bool] = lambda _: False,
    ) -> None:
        """`on_step(instance_id, outputs)` tells news, `on_failure(instance_id, error)` a failure.

        When a step or an order fails, all of the instance's sequences end with FinishReason.ERROR, its KV pages are
        given back, it is no longer active, and then on_failure is called. An error that `is_fatal` ends the thread.
        """
        self._on_step = on_step
        self._on_failure = on_failure
        self._is_fatal = is_fatal
        self._active: dict[str, _Active] = {}  # changed by the engine's thread only
        self._under_way: deque[_Active] = deque()  # whose steps are, in the device's order
        self._behind: list[_Active] = []  # whose steps wait for weights; the device has only their first layers
        self._looked = False  # whether weights may have arrived since they were looked at
        self._served = 0.0  # the largest share at which a step was begun: where those that were idle go on
        self._jobs: deque[_Job] = deque()
        self._commands: deque[_Command] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.ended: Future[None] = Future()
        """Done when the thread has ended; it fails with what the thread died of."""

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs; False after a stop or a crash."""
        return self._thread.is_alive()

    @property
    def computing(self) -> bool:
        """Whether steps are under way."""
        return bool(self._under_way)

    def activate(self, instance: Instance) -> Future[None]:
        """Begins to run an instance. The future fails with ValueError where one with its id is active."""
        return self._do(lambda: self._activate(instance))

    def deactivate(self, instance_id: str) -> Future[None]:
        """Ends an instance, and what it still runs with FinishReason.ERROR. Nothing where it is not active.

        When the future is done, the engine does not touch the model's weights any more.
        """
        return self._do(lambda: self._deactivate(instance_id, f"instance {instance_id} was deactivated"))

    def submit(self, instance_id: str, sequence: Sequence) -> None:
        """Gives a sequence to an instance. If it is not active, the sequence ends with FinishReason.ERROR."""
        self._do(lambda: self._submit(instance_id, sequence))

    def cancel(self, request_id: str) -> None:
        """Ends a request, wherever it runs. It still gets its last output."""
        self._do(lambda: self._cancel(request_id))

    def expect(self, instance_id: str, sequences: float) -> None:
        """Tells an instance how many sequences the forecast has it run at once. Nothing where it is not active."""
        self._do(lambda: self._expect(instance_id, sequences))

    def work(self, piece: Callable[[], bool]) -> Future[None]:
        """Calls `piece` in the engine's thread between steps, until it returns False. Several such jobs take turns.

        For work that only this thread may do but that must not hold up the instances. The future fails with what
        `piece` raises, and with EngineStopped where the thread ends before that.
        """
        job = _Job(piece, Future())
        job.done.set_running_or_notify_cancel()
        with self._changed:
            self._check_running()
            self._jobs.append(job)
            self._changed.notify()
        return job.done

    def look(self) -> None:
        """Says that more weights are resident, for which a step may wait."""
        with self._changed:
            self._looked = True
            self._changed.notify()

    def stats(self, instance_id: str) -> InstanceStats | None:
        """Counts of an instance; None where it is not active."""
        active = self._active.get(instance_id)
        return active.instance.stats if active else None

    def new_pace(self, instance_id: str) -> Pace | None:
        """How long an instance's sequences wait for their next tokens, where that has changed since it was asked."""
        active = self._active.get(instance_id)
        return active.instance.meter.news() if active else None

    def stop(self) -> None:
        """Ends all instances and the thread, and waits for it. Stopping twice is stopping once."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join()

    def _do(self, run: Callable[[], None]) -> Future[None]:
        command = _Command(run, Future())
        command.done.set_running_or_notify_cancel()  # an order once given cannot be cancelled
        with self._changed:
            self._check_running()
            self._commands.append(command)
            self._changed.notify()
        return command.done

    def _check_running(self) -> None:
        if self._ended or self._stopping:
            raise EngineStopped("the engine has stopped")

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            _log.exception("the engine's thread died")
            self.ended.set_exception(error)
        else:
            self.ended.set_result(None)

    def _work(self) -> None:
        try:
            while self._wait():
                self._obey()
                self._turn()
            # What was submitted just before the stop gets its last output too.
            self._obey()
            for instance_id in list(self._active):
                self._deactivate(instance_id, "the agent is stopping")
        finally:
            with self._changed:
                self._ended = True
                orphans = [command.done for command in self._commands] + [job.done for job in self._jobs]
                self._commands.clear()
                self._jobs.clear()
            for orphan in orphans:
                orphan.set_exception(EngineStopped("the engine has stopped"))

    def _turn(self) -> None:
        """Begins a step of the instance that has had least of the device, then ends the oldest step, if that is due.

        So that the device need not wait, the next step, of the same instance or of another, is begun before the one
        that it works on has ended.
        """
        for waiting in list(self._behind):
            self._guard(waiting, self._advance)
        if active := self._next():
            self._guard(active, self._launch)
        if self._under_way and self._next() is None:
            self._guard(self._under_way[0], self._collect)
        for active in list(self._active.values()):
            if news := active.instance.news():
                self._on_step(active.instance.id, news)
        if self._jobs:
            self._continue(self._jobs[0])
            self._look_again()  # pages may have come back meanwhile

    def _next(self) -> _Active | None:
        """Whose step is to be begun now; None where enough are under way, or nobody has anything to compute."""
        busy = [active for active in self._active.values() if active.instance.has_work]
        shared = len(busy) > 1
        most = max((active.instance.runner_depth if shared else active.instance.depth for active in busy), default=0)
        if len(self._under_way) >= most:
            return None
        may = [active for active in busy if not active.stalled and active.instance.in_flight < active.instance.depth]
        return min(may, key=lambda active: active.share, default=None)

    def _launch(self, active: _Active) -> None:
        others_wait = any(other is not active and other.instance.has_work for other in self._active.values())
        if active.instance.launch(others_wait):
            self._served = max(self._served, active.share)
            active.expected.append(active.last)
            active.share += active.last
            if active.instance.is_behind:
                self._behind.append(active)
                self._advance(active)
            else:
                self._under_way.append(active)
        else:
            # Whatever it waits for: results of its own, or pages, which may take a while and earns it no claim.
            active.stalled = True
            active.share = max(active.share, self._served)

    def _advance(self, active: _Active) -> None:
        if active.instance.advance():
            self._behind.remove(active)
            self._under_way.append(active)

    def _collect(self, active: _Active) -> None:
        before = active.instance.device_seconds
        self._under_way.popleft()
        active.instance.collect()
        took = active.instance.device_seconds - before
        active.share += took - active.expected.popleft()
        active.last = took
        for other in self._active.values():
            if other is not active:
                other.instance.gave_way(took)
        self._look_again()

    def _look_again(self) -> None:
        for active in self._active.values():
            active.stalled = False

    def _guard(self, active: _Active, part: Callable[[_Active], None]) -> None:
        """Carries out a part of a step, or an order. Where it fails its instance ends, and the others go on.

        Unless all is lost. The orders are those nobody waits for: a request whose order failed unseen would never end.
        """
        instance = active.instance
        try:
            part(active)
        except Exception as error:
            if self._is_fatal(error):
                raise
            _log.exception("instance %s of %s failed", instance.id, instance.model_name)
            self._deactivate(instance.id, f"{instance.model_name} failed: {error}")
            self._on_failure(instance.id, error)

    def _continue(self, job: _Job) -> None:
        try:
            more = job.piece()
        except Exception as error:
            self._jobs.popleft()
            job.done.set_exception(error)
            if self._is_fatal(error):
                raise
        else:
            if more:
                self._jobs.rotate(-1)
            else:
                self._jobs.popleft()
                job.done.set_result(None)

    def _wait(self) -> bool:
        """Waits until there is something to do. False when it is time to end."""
        with self._changed:
            while not (self._stopping or self._commands or self._under_way or self._jobs or self._looked):
                # Whose step waits for weights has nothing to do until some arrive.
                waiting = self._behind
                busy = [a for a in self._active.values() if a.instance.has_work and a not in waiting]
                if any(not active.stalled for active in busy):
                    break
                self._changed.wait(_STALL_S if busy else None)
                for active in busy:
                    active.stalled = False
                if busy:
                    break
            self._looked = False
            return not self._stopping

    def _obey(self) -> None:
        while True:
            with self._changed:
                if not self._commands:
                    return
                command = self._commands.popleft()
            try:
                command.run()
            except BaseException as error:
                command.done.set_exception(error)
                if not isinstance(error, ValueError):
                    raise
            else:
                command.done.set_result(None)

    def _activate(self, instance: Instance) -> None:
        if instance.id in self._active:
            raise ValueError(f"instance {instance.id} is active already")
        self._active[instance.id] = _Active(instance)

    def _deactivate(self, instance_id: str, error: str) -> None:
        active = self._active.pop(instance_id, None)
        if active is None:
            return
        self._under_way = deque(other for other in self._under_way if other is not active)
        self._behind = [other for other in self._behind if other is not active]
        outputs = active.instance.close(error)
        if outputs:
            self._on_step(instance_id, outputs)

    def _submit(self, instance_id: str, sequence: Sequence) -> None:
        active = self._active.get(instance_id)
        if active is not None:
            if not active.instance.has_work:
                # Having been idle, or not yet there, earns no claim on the others' time: they may be idle too just now.
                active.share = max(active.share, self._served)
            active.stalled = False
            self._guard(active, lambda there: there.instance.add(sequence))
            return
        output = SequenceOutput(
            sequence.request_id,
            sequence.attempt,
            [],
            sequence.num_generated,
            FinishReason.ERROR,
            f"instance {instance_id} is not active",
        )
        self._on_step(instance_id, [output])

    def _expect(self, instance_id: str, sequences: float) -> None:
        if active := self._active.get(instance_id):
            self._guard(active, lambda there: there.instance.expect(sequences))

    def _cancel(self, request_id: str) -> None:
        for active in list(self._active.values()):
            self._guard(active, lambda there: there.instance.cancel(request_id))
        self._look_again()
