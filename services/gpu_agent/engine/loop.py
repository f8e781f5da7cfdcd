"""The engine's thread: the steps of all active instances, one after another."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from services.gpu_agent.engine.instance import Instance, InstanceStats
from services.gpu_agent.engine.sequence import FinishReason, Sequence, SequenceOutput

_log = logging.getLogger(__name__)

# How long an instance that is short of KV pages waits before it looks again. Pages come back without a word when the
# loader's thread evicts weights.
_STALL_S = 0.005


class EngineStopped(RuntimeError):
    """The engine's thread has ended."""


@dataclass(frozen=True)
class _Command:
    run: Callable[[], None]
    done: Future[None]


class EngineLoop:
    """Owns the one engine thread of an agent. All methods may be called from any thread and return at once.

    Both callbacks run in the engine's thread and must neither block nor raise: hand over with
    `loop.call_soon_threadsafe`.
    """

    def __init__(
        self,
        on_step: Callable[[str, list[SequenceOutput]], None],
        on_failure: Callable[[str, Exception], None],
    ) -> None:
        """`on_step(instance_id, outputs)` tells news, `on_failure(instance_id, error)` a failed step.

        When a step fails, all of the instance's sequences end with FinishReason.ERROR, its KV pages are given back,
        it is no longer active, and then on_failure is called.
        """
        self._on_step = on_step
        self._on_failure = on_failure
        self._instances: dict[str, Instance] = {}  # changed by the engine's thread only
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

    def stats(self, instance_id: str) -> InstanceStats | None:
        """Counts of an instance; None where it is not active."""
        instance = self._instances.get(instance_id)
        return instance.stats if instance else None

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
            if self._ended or self._stopping:
                raise EngineStopped("the engine has stopped")
            self._commands.append(command)
            self._changed.notify()
        return command.done

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
                for instance in list(self._instances.values()):
                    if instance.has_work:
                        self._step(instance)
            # What was submitted just before the stop gets its last output too.
            self._obey()
            for instance_id in list(self._instances):
                self._deactivate(instance_id, "the agent is stopping")
        finally:
            with self._changed:
                self._ended = True
                orphans = list(self._commands)
                self._commands.clear()
            for command in orphans:
                command.done.set_exception(EngineStopped("the engine has stopped"))

    def _wait(self) -> bool:
        """Waits until there is something to do. False when it is time to end."""
        with self._changed:
            while not self._stopping and not self._commands:
                busy = [instance for instance in self._instances.values() if instance.has_work]
                if any(not instance.stalled for instance in busy):
                    break
                self._changed.wait(_STALL_S if busy else None)
                if busy:
                    break
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

    def _step(self, instance: Instance) -> None:
        began = time.monotonic()
        try:
            outputs = instance.step()
        except Exception as error:  # one instance's failure, of whatever kind, is not the others'
            _log.exception("instance %s of %s failed after %.3f s", instance.id, instance.model_name, _since(began))
            self._deactivate(instance.id, f"a step of {instance.model_name} failed: {error}")
            self._on_failure(instance.id, error)
            return
        if outputs:
            self._on_step(instance.id, outputs)

    def _activate(self, instance: Instance) -> None:
        if instance.id in self._instances:
            raise ValueError(f"instance {instance.id} is active already")
        self._instances[instance.id] = instance

    def _deactivate(self, instance_id: str, error: str) -> None:
        instance = self._instances.pop(instance_id, None)
        if instance is None:
            return
        outputs = instance.close(error)
        if outputs:
            self._on_step(instance_id, outputs)

    def _submit(self, instance_id: str, sequence: Sequence) -> None:
        instance = self._instances.get(instance_id)
        if instance is not None:
            instance.add(sequence)
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

    def _cancel(self, request_id: str) -> None:
        for instance in self._instances.values():
            instance.cancel(request_id)


def _since(began: float) -> float:
    return time.monotonic() - began
