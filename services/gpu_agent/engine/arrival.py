"""Computing with weights that are still on their way: a forward pass that stops before each layer until it is there.

The pass runs in a thread of its own, but only while the engine's thread waits in `Behind.advance`, so that it is as if
that thread did it: between two layers other instances' steps take their turns.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

from services.gpu_agent.arena.weight_range import WeightRange
from services.gpu_agent.engine.step import Pending, StepResult
from services.gpu_agent.weights.layout import ImageLayout


@dataclass(frozen=True)
class Gate:
    """A module that may begin when the first `pages` pages of the weights are resident."""

    module: nn.Module
    pages: int


def find_gates(module: nn.Module, layout: ImageLayout, in_order: bool) -> tuple[Gate, ...]:
    """The gates of a model: one for each layer, and for each module beside the layers that has weights.

    in_order: whether its forward pass enters each of them before it uses its weights (see enters_before_use); where it
    does not, there is one gate, and nothing begins before all is there.
    """
    if not in_order:
        return (Gate(module, layout.num_pages),)
    ends: dict[str, int] = {}
    for name in module.state_dict():
        place = layout.place(name)
        ends[name] = -(-(place.offset + place.nbytes) // layout.page_bytes)
    gates = []
    for name, unit in _units(module):
        prefix = f"{name}." if name else ""
        pages = max((end for tensor, end in ends.items() if tensor.startswith(prefix)), default=0)
        if pages:
            gates.append(Gate(unit, pages))
    return tuple(gates)


def with_norms_behind(gates: tuple[Gate, ...]) -> tuple[Gate, ...]:
    """The gates of a model whose layers also compute the norm that follows them, in the next layer or behind the last.

    So each layer waits for what comes next too.
    """
    return tuple(
        replace(gate, pages=max(gate.pages, following.pages))
        for gate, following in zip(gates, [*gates[1:], gates[-1]], strict=True)
    )


def enters_before_use(module: nn.Module, forward: Callable[[], object]) -> bool:
    """Whether `forward`, a pass on the meta device, touches weights only of modules with a gate that it has entered."""
    gated: dict[int, set[str]] = {}
    units = _units(module)
    for name, unit in units:
        for parameter in unit.state_dict(keep_vars=True).values():
            gated.setdefault(id(parameter), set()).add(name)
    entered: set[str] = set()
    handles = [unit.register_forward_pre_hook(lambda *_, name=name: entered.add(name)) for name, unit in units]
    try:
        with _Uses(gated, entered) as uses:
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return not uses.early


def _units(module: nn.Module, name: str = "") -> list[tuple[str, nn.Module]]:
    """The layers, and the smallest modules beside them that hold parameters, in the model's order."""
    is_layer = name.rpartition(".")[2].isdecimal()
    children = [(child_name, child) for child_name, child in module.named_children() if child.state_dict()]
    if is_layer or not children or module._parameters:
        return [(name, module)] if module.state_dict() else []
    return [
        unit for child_name, child in children for unit in _units(child, f"{name}.{child_name}" if name else child_name)
    ]


class _Uses(TorchFunctionMode):
    """Notes whether a parameter is used whose modules were not entered."""

    def __init__(self, gated: dict[int, set[str]], entered: set[str]) -> None:
        super().__init__()
        self._gated = gated
        self._entered = entered
        self.early = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for value in _flat((*args, *kwargs.values())):
            names = self._gated.get(id(value))
            if names is not None and not names & self._entered:
                self.early = True
        return func(*args, **kwargs)


def _flat(values: tuple[Any, ...]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from _flat(tuple(value))
        else:
            yield value


# A pass behind the copy is Python between the layers' kernels. Where all weights have come while more than this share
# of the layers is left, it is dropped for the whole step at once, if the device has that as one launch.
_LEFT_FOR_AT_ONCE = 0.25


class _Abandoned(Exception):
    """The pass is not wanted any more."""


class AllThere(Exception):
    """The pass is dropped, for the whole step is faster computed at once."""


class Behind:
    """A step that is computed behind the copy of its weights (see Pending). Used by the engine's thread alone."""

    def __init__(
        self,
        compute: Callable[[], Pending],
        gates: tuple[Gate, ...],
        weights: WeightRange,
        at_once: Callable[[], Pending] | None = None,
    ) -> None:
        """`compute` runs the forward pass, in another thread; it begins with the first `advance`.

        `at_once` computes the same step with all weights there, much faster; None where the device cannot.
        """
        self._compute = compute
        self._at_once = at_once
        self._gates = gates
        self._weights = weights
        self._needed = 0  # pages that the next layer needs
        self._seconds = 0.0
        self._pending: Pending | None = None
        self._error: BaseException | None = None
        self._abandoned = False
        self._dropped = False  # for the whole step at once
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, name="behind the copy", daemon=True)
        self.launched = False
        """Whether all of it was begun, or has failed, so that `result` waits for the device at most."""

    def advance(self) -> bool:
        """Computes the layers that are there; True once there is nothing left to wait for but the device."""
        if not self.launched and self._weights.resident_pages >= self._needed:
            began = time.monotonic()
            self._switch()
            self._seconds += time.monotonic() - began
        return self.launched

    def result(self) -> StepResult:
        """See Pending; only once it is launched. The seconds are those in which it computed, not those it waited."""
        if self._error is not None:
            raise self._error
        assert self._pending is not None
        result = self._pending.result()
        return replace(result, seconds=self._seconds + (result.seconds if self._dropped else 0.0))

    def abandon(self) -> None:
        """Ends it where it is; when this returns, nothing computes any more."""
        self._abandoned = True
        while not self.launched:
            self._switch()

    def _switch(self) -> None:
        if self._thread.ident is None:
            self._thread.start()
        self._go.release()
        self._stopped.acquire()

    def _run(self) -> None:
        self._go.acquire()
        try:
            if not self._abandoned:
                self._pending = self._computed()
        except BaseException as error:  # whatever it is, it is raised where the result is asked for
            self._error = error
        self.launched = True
        self._stopped.release()

    def _computed(self) -> Pending:
        with suppress(AllThere), self._gated():
            return self._compute()
        assert self._at_once is not None
        self._dropped = True
        return self._at_once()

    @contextmanager
    def _gated(self) -> Iterator[None]:
        handles = [
            gate.module.register_forward_pre_hook(self._hook(gate.pages, 1 - number / len(self._gates)))
            for number, gate in enumerate(self._gates)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, pages: int, left: float) -> Callable[[nn.Module, Any], None]:
        """Waits until so many pages are there; `left` is the share of the gates that this one and those behind are."""

        def wait(_: nn.Module, __: Any) -> None:
            if threading.current_thread() is not self._thread:
                return  # a pass of somebody else, such as one that is captured between two layers of this
            while self._weights.resident_pages < pages:
                self._needed = pages
                self._stopped.release()
                self._go.acquire()
                if self._abandoned:
                    raise _Abandoned
            if self._at_once is not None and left > _LEFT_FOR_AT_ONCE and self._weights.complete:
                raise AllThere

        return wait
