"""Who holds the arenas' pages: replicas' weights, engines' KV, and what goes when others need room."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from services.placer.snapshot import State
from simulator.clock import Clock
from simulator.engine import Engine
from simulator.memory import Gpu
from simulator.replica import Replica
from simulator.spec import ClusterSpec


class Arenas:
    """All GPUs' pages, counted one by one. Engines get their KV here: see simulator.engine.Memory."""

    def __init__(self, clock: Clock, spec: ClusterSpec) -> None:
        self.gpus = {
            gpu.id: gpu
            for node in range(spec.nodes)
            for gpu in (Gpu(f"n{node}g{i}", f"n{node}", i, spec.pages) for i in range(spec.gpus_per_node))
        }
        self.wasted_bytes = 0.0  # copied and evicted without having served
        self._clock = clock
        self._pages = spec.pages

    # Weights

    def hold(self, replica: Replica, pages: int) -> None:
        """Sets the pages that a replica holds or was promised; there must be room."""
        self.account(replica)
        for gpu in replica.gpus:
            gpu.weights += pages - replica.pages
        freed = pages < replica.pages
        replica.pages = pages
        if freed:
            self._wake_starved(replica.gpus)

    def cut(self, replica: Replica, keep: int) -> None:
        """Leaves the first `keep` pages of a warm replica. Without pages it is cold, and no more."""
        keep = min(keep, replica.resident)
        if replica.resident > keep:
            wasted = replica.unused_bytes * (1 - keep / replica.resident)
            self.wasted_bytes += wasted
            replica.unused_bytes -= wasted
        replica.resident = keep
        self.hold(replica, keep)
        if not keep:
            del replica.model.replicas[replica.group]
            for gpu in replica.gpus:
                del gpu.replicas[replica.model.name]

    def make_room(self, group: Sequence[Gpu], pages: int, but: Replica | None = None) -> bool:
        """Evicts warm weights, those unused for longest first and from their ends, until so many pages are free.

        False, with nothing done, where that does not suffice.
        """
        if any(gpu.free + _evictable(gpu, but) < pages for gpu in group):
            return False
        for gpu in group:
            if gpu.free >= pages:
                continue
            warm = [replica for replica in gpu.replicas.values() if replica.state is State.WARM and replica is not but]
            for replica in sorted(warm, key=lambda replica: (replica.used_at, replica.model.index)):
                lacking = pages - gpu.free
                if lacking <= 0:
                    break
                self.cut(replica, max(0, replica.pages - lacking))
        return True

    # KV

    def resize(self, engine: Engine, pages: int) -> bool:
        """See simulator.engine.Memory."""
        more = pages - engine.kv_pages
        if more == 0:
            return True
        if pages > engine.most:
            return False
        if more > 0 and any(gpu.free < more for gpu in engine.gpus) and not self.make_room(engine.gpus, more):
            return False
        if engine.replica is not None:
            self.account(engine.replica)
        for gpu in engine.gpus:
            gpu.kv += more
        engine.kv_pages = pages
        if more < 0:
            self._wake_starved(engine.gpus)
        return True

    def room(self, engine: Engine) -> int:
        """See simulator.engine.Memory."""
        return min(engine.most, engine.kv_pages + min(gpu.free + _evictable(gpu) for gpu in engine.gpus))

    def limit(self, engine: Engine) -> int:
        """See simulator.engine.Memory."""
        return min(engine.most, *(_limit(engine, gpu) for gpu in engine.gpus))

    def account(self, replica: Replica) -> None:
        """Counts, up to now, the pages that a replica and its engine hold."""
        kv = replica.engine.kv_pages if replica.engine is not None else 0
        share = (replica.pages + kv) / self._pages * len(replica.gpus)
        replica.model.resident_gpu_s += share * (self._clock.now - replica.accounted)
        replica.accounted = self._clock.now

    def _wake_starved(self, group: Iterable[Gpu]) -> None:
        for gpu in group:
            for replica in gpu.replicas.values():
                if replica.engine is not None and replica.engine.starved:
                    self._clock.at(self._clock.now, replica.engine.look_again)


def _evictable(gpu: Gpu, but: Replica | None = None) -> int:
    return sum(r.pages for r in gpu.replicas.values() if r.state is State.WARM and r is not but)


def _limit(engine: Engine, gpu: Gpu) -> int:
    others = (replica.engine for replica in gpu.replicas.values())
    reserved = sum(other.reserve for other in others if other is not None and other is not engine)
    return gpu.pages - gpu.weights + _evictable(gpu) - reserved
