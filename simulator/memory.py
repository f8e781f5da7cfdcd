"""The GPUs' arenas: whose pages are whose, exactly, at every event."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from simulator.engine import Engine
    from simulator.replica import Replica


@dataclass(eq=False)
class Gpu:
    """One GPU and its arena."""

    id: str
    node: str
    index: int  # on its node
    pages: int
    weights: int = 0  # pages that replicas hold or were promised
    kv: int = 0  # pages that engines hold
    replicas: dict[str, Replica] = field(default_factory=dict)  # by model; at most one of each
    busy: dict[Engine, None] = field(default_factory=dict)  # engines that use the device

    @property
    def free(self) -> int:
        """Pages that nobody has."""
        return self.pages - self.weights - self.kv
