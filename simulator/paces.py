"""What the planner is told of instances' pace: measured, told and counted by the code of agents and placer."""

from __future__ import annotations

from services.placer.paces import Paces
from simulator.replica import ModelState
from warmserve.v1 import cluster_pb2

_LOOK_S = 1.0  # how often an instance looks whether its pace has changed
_DEVICE = ""  # all GPUs are alike


class Told:
    """By model, the requests that one instance carries. Only models with a target for the time per token measure."""

    def __init__(self) -> None:
        self._paces = Paces()
        self._instances: dict[str, dict[str, cluster_pb2.InstanceRecord]] = {}  # by model
        self._due: dict[str, float] = {}

    def capacity(self, model: ModelState, now: float) -> int:
        """As computed, until an instance has told its pace; then as many as keep the target by that."""
        target_s = model.spec.tpot_s
        if not target_s:
            return model.capacity
        if now >= self._due.get(model.name, now):
            self._due[model.name] = now + _LOOK_S
            self._look(model)
        kept = self._paces.within(model.name, _DEVICE, target_s * 1e3, model.most)
        return model.capacity if kept is None else kept

    def _look(self, model: ModelState) -> None:
        present = {",".join(replica.group): replica.engine for replica in model.instances}
        known = self._instances.setdefault(model.name, {})
        for name in known.keys() - present.keys():
            self._paces.gone(name, known.pop(name))
        for name, engine in present.items():
            pace = engine.meter.news() if engine is not None and engine.meter is not None else None
            if pace is not None:
                told = cluster_pb2.Pace(base_ms=pace.base_s * 1e3, per_sequence_ms=pace.per_sequence_s * 1e3)
                known[name] = cluster_pb2.InstanceRecord(id=name, model=model.name, pace=told)
                self._paces.learn(name, known[name], _DEVICE, present)
