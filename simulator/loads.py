"""Making weights resident: which tier they come from, whose turn it is to copy, and how long it takes."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from services.placer.snapshot import Tier
from simulator.clock import Clock
from simulator.links import Flow, Links
from simulator.memory import Gpu
from simulator.replica import ModelState, Replica
from simulator.spec import GB, ClusterSpec


@dataclass(eq=False)
class Load:
    """A replica's missing pages, to be copied. Waits for its turn on all of its GPUs."""

    replica: Replica
    urgent: bool  # a wake goes before prewarming, and cuts it short
    order: int
    flow: Flow | None = None
    tier: Tier = Tier.HOST
    from_page: int = 0  # what was resident when the flow began
    began: float = 0.0  # when it did


class HostMemory:
    """The images in one node's memory, the least lately used of which go."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._images: OrderedDict[str, int] = OrderedDict()
        self._held = 0

    def __contains__(self, model: str) -> bool:
        return model in self._images

    def use(self, model: ModelState) -> None:
        """The model's image is read, and kept where there is room for it at all."""
        if model.name in self._images:
            self._images.move_to_end(model.name)
            return
        needed = model.spec.weight_bytes
        if needed > self.size:
            return
        while self._held + needed > self.size:
            self._held -= self._images.popitem(last=False)[1]
        self._images[model.name] = needed
        self._held += needed


@dataclass(eq=False)
class NodeLoads:
    """The loads of one node. One load at a time per GPU, urgent ones first, else in order."""

    clock: Clock
    spec: ClusterSpec
    node: str
    gpus: Sequence[Gpu]
    loaded: Callable[[Replica, float], None]  # all of it is resident, after so many seconds of copying
    copied: dict[str, float]  # bytes by tier, of all nodes
    host: HostMemory = field(init=False)
    _links: Links = field(init=False)
    _loads: list[Load] = field(default_factory=list)
    _orders: int = 0

    def __post_init__(self) -> None:
        capacity = {"node": self.spec.node_gbps * GB, "disk": self.spec.disk_gbps * GB}
        for gpu in self.gpus:
            capacity |= {f"pcie {gpu.id}": self.spec.pcie_gbps * GB}
            capacity |= {f"in {gpu.id}": self.spec.nvlink_gbps * GB, f"out {gpu.id}": self.spec.nvlink_gbps * GB}
        self._links = Links(self.clock, capacity)
        self.host = HostMemory(self.spec.host_bytes)

    def begin(self, replica: Replica, urgent: bool) -> None:
        """Queues the load of what is missing."""
        self._orders += 1
        replica.load = Load(replica, urgent, self._orders)
        self._loads.append(replica.load)
        self._next()

    def hurry(self, load: Load) -> None:
        """A prewarming has become a wake."""
        load.urgent = True
        self._next()

    def cancel(self, load: Load) -> None:
        """Ends a load; what was copied stays resident."""
        self._stop(load)
        self._loads.remove(load)
        load.replica.load = None
        self._next()

    def resident(self, replica: Replica) -> int:
        """Pages that are resident at this moment."""
        load = replica.load
        if load is None or load.flow is None:
            return replica.resident
        return min(replica.model.shard_pages, load.from_page + self._pages_done(load, self._links.left(load.flow)))

    def left_s(self, replica: Replica) -> float:
        """Seconds until all is resident, as fast as it comes now; inf where nothing comes."""
        flow = replica.load.flow if replica.load is not None else None
        if flow is None or not flow.rate:
            return 0.0 if replica.whole else math.inf
        return self._links.left(flow) / flow.rate

    def tier(self, model: ModelState, group: Sequence[Gpu]) -> Tier:
        """Where a load would come from now."""
        if self._peer(model, group) is not None:
            return Tier.PEER
        return Tier.HOST if model.name in self.host else Tier.DISK

    def seconds(self, model: ModelState, tier: Tier) -> float:
        """What a whole replica takes from a tier, with the links for itself."""
        return (
            model.spec.shard_bytes
            / min(
                {
                    Tier.PEER: [self.spec.nvlink_gbps],
                    Tier.HOST: [self.spec.pcie_gbps, self.spec.node_gbps / model.spec.tp],
                    Tier.DISK: [self.spec.pcie_gbps, self.spec.disk_gbps / model.spec.tp],
                }[tier]
            )
            / GB
        )

    def _next(self) -> None:
        """Begins what has its turn, and cuts short what has it no more."""
        self._loads.sort(key=lambda load: (not load.urgent, load.order))
        claimed: set[Gpu] = set()
        for load in self._loads:
            turn = claimed.isdisjoint(load.replica.gpus)
            claimed.update(load.replica.gpus)
            if not turn and load.flow is not None:
                self._stop(load)
        claimed.clear()
        for load in self._loads:
            turn = claimed.isdisjoint(load.replica.gpus)
            claimed.update(load.replica.gpus)
            if turn and load.flow is None:
                self._start(load)

    def _start(self, load: Load) -> None:
        replica = load.replica
        load.tier = self.tier(replica.model, replica.gpus)
        load.from_page = replica.resident
        load.began = self.clock.now
        missing = replica.model.spec.shard_bytes - replica.resident * self.spec.page_bytes
        load.flow = Flow(self._uses(load), max(0.0, missing), lambda: self._ended(load))
        self._links.begin(load.flow)

    def _uses(self, load: Load) -> Mapping[str, float]:
        replica, tp = load.replica, float(load.replica.model.spec.tp)
        if load.tier is Tier.PEER:
            source = self._peer(replica.model, replica.gpus)
            assert source is not None
            uses = {f"in {gpu.id}": 1.0 for gpu in replica.gpus}
            return uses | {f"out {gpu.id}": 1.0 for gpu in source.gpus}
        uses = {f"pcie {gpu.id}": 1.0 for gpu in replica.gpus} | {"node": tp}
        return uses | {"disk": tp} if load.tier is Tier.DISK else uses

    def _peer(self, model: ModelState, group: Sequence[Gpu]) -> Replica | None:
        """A whole replica on other GPUs of the node."""
        if not self.spec.nvlink_gbps:
            return None
        for replica in model.replicas.values():
            if replica.whole and replica.gpus[0].node == self.node and replica.gpus[0] is not group[0]:
                return replica
        return None

    def _stop(self, load: Load) -> None:
        if load.flow is not None:
            left = self._links.end(load.flow)
            self._arrived(load, load.from_page + self._pages_done(load, left))

    def _ended(self, load: Load) -> None:
        self._arrived(load, load.replica.model.shard_pages)
        if load.tier is Tier.DISK or load.replica.model.name in self.host:
            self.host.use(load.replica.model)
        self._loads.remove(load)
        load.replica.load = None
        self.loaded(load.replica, self.clock.now - load.began)
        self._next()

    def _arrived(self, load: Load, resident: int) -> None:
        replica, load.flow = load.replica, None
        total = (resident - replica.resident) * self.spec.page_bytes * replica.model.spec.tp
        self.copied[load.tier.value] = self.copied.get(load.tier.value, 0.0) + total
        replica.unused_bytes += total
        replica.resident = resident

    def _pages_done(self, load: Load, left: float) -> int:
        """Whole pages that have come since the flow began."""
        missing = load.replica.model.spec.shard_bytes - load.from_page * self.spec.page_bytes
        return int((max(0.0, missing) - left) // self.spec.page_bytes)
