"""What is simulated: a cluster's hardware, the models on it, and how the run goes. Plain values, checked at once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from services.forecaster.predictors import Predictor
from services.placer.groups import is_power_of_two
from services.placer.snapshot import Rules
from simulator.cost import H100, CostModel

GB = 1e9


class ImpossibleError(ValueError):
    """The setting cannot be simulated; the text says which model or which number is to blame."""


@dataclass(frozen=True)
class ClusterSpec:
    """Nodes that are alike. The default is an H100 SXM machine, with the speeds of benchmarks/results/engine-h100.json
    and of the design's measurements; `node_gbps` is what two GPUs copied from the host at once."""

    nodes: int = 1
    gpus_per_node: int = 8
    arena_bytes: int = 72_000_000_000  # of each GPU, for weights and KV; what torch needs outside is not in it
    page_bytes: int = 32 << 20
    host_bytes: int = 512_000_000_000  # of each node, for images in pinned memory; the least lately used go
    pcie_gbps: float = 55.0  # host to one GPU, GB/s
    node_gbps: float = 110.0  # host to all GPUs of a node together
    nvlink_gbps: float = 329.0  # into and out of one GPU, from others of its node; 0: there is none
    disk_gbps: float = 1.67  # of a node

    @property
    def gpus(self) -> int:
        """All of them."""
        return self.nodes * self.gpus_per_node

    @property
    def pages(self) -> int:
        """Pages of one GPU's arena."""
        return self.arena_bytes // self.page_bytes


@dataclass(frozen=True)
class ModelSpec:
    """One model. Sizes are of the whole model, not of a shard."""

    name: str
    parameters: int
    layers: int
    kv_bytes_per_token: int
    tp: int = 1  # GPUs of one replica: 1, 2, 4 or 8
    hidden: int = 0  # width; 0: as a dense transformer of so many parameters and layers has it
    bytes_per_parameter: float = 2.0
    max_batch: int = 64  # sequences that an instance runs at a time
    context_tokens: int = 8192  # prompt and answer; also what an instance's KV can hold at least
    ttft_s: float = 0.0  # target for the time to the first token, 95th percentile; 0: none
    tpot_s: float = 0.0  # target for the time per further token; 0: none
    priority: float = 1.0
    min_replicas: int = 0
    max_replicas: int = 0  # 0: no bound

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        return math.ceil(self.parameters * self.bytes_per_parameter)

    @property
    def shard_bytes(self) -> int:
        """Bytes of one of its `tp` shards."""
        return math.ceil(self.weight_bytes / self.tp)

    @property
    def width(self) -> int:
        """`hidden`, or the estimate: 12 x layers x width^2 parameters."""
        return self.hidden or max(1, round(math.sqrt(self.parameters / (12 * self.layers))))

    def shard_pages(self, page_bytes: int) -> int:
        """Pages of one shard."""
        return math.ceil(self.shard_bytes / page_bytes)

    def tokens_per_page(self, page_bytes: int) -> int:
        """Tokens whose KV, of one shard, fits into one page."""
        return int(page_bytes * self.tp // self.kv_bytes_per_token)


def llama2_7b(name: str = "llama-2-7b") -> ModelSpec:
    """Llama 2 7B: keys and values of all 32 heads, 512 KiB per token."""
    return ModelSpec(name, 6_738_415_616, 32, 32 * 2 * 4096 * 2, 1, 4096, context_tokens=4096)


def llama2_13b(name: str = "llama-2-13b") -> ModelSpec:
    """Llama 2 13B over two GPUs."""
    return ModelSpec(name, 13_015_864_320, 40, 40 * 2 * 5120 * 2, 2, 5120, context_tokens=4096)


def llama2_70b(name: str = "llama-2-70b") -> ModelSpec:
    """Llama 2 70B over four GPUs; eight KV heads."""
    return ModelSpec(name, 68_976_648_192, 80, 80 * 2 * 1024 * 2, 4, 8192, context_tokens=4096)


@dataclass(frozen=True)
class Delays:
    """What happens between processes, in seconds. Measured on two CPU cores (the design's section 11)."""

    hop_s: float = 0.00047  # router -> Redis stream -> instance
    reply_s: float = 0.0005  # a token's way from the instance to the client's stream
    wake_s: tuple[float, float] = (0.005, 0.010)  # order -> serving, of a replica all resident; uniformly between
    replan_s: float = 0.02  # changes that come together are answered by one plan
    ask_s: float = 0.003  # a router's wake request -> the placer's order


@dataclass(frozen=True)
class Forecasting:
    """Where the planner's forecasts come from.

    `predictor`: one of services.forecaster's; None: there are no forecasts, and planners react only. `history`: per
    model what was counted before the run, (windows, 5), columns as services.forecaster's QUANTITIES, oldest first, NaN
    in gaps; it ends where the window begins that holds the first arrival. Models that are missing in it are new.
    """

    predictor: Predictor | None = None
    history: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    window_s: float = 300.0
    horizon: int = 12
    silent_from_s: float = math.inf  # the forecaster dies at this time of the trace
    silent_to_s: float = math.inf  # and is back at this one


@dataclass(frozen=True)
class Settings:
    """How a run goes."""

    tick_s: float = 5.0  # seconds between plans when nothing happens
    busy_tick_s: float = 1.0  # the same while requests wait that no instance takes
    warmup_s: float = 600.0  # policies place models for so long before the first request
    drain_s: float = 600.0  # after the last arrival: what has not ended by then is unserved
    forecasting: Forecasting = field(default_factory=Forecasting)
    delays: Delays = field(default_factory=Delays)
    cost: CostModel = H100
    rules: Rules = field(default_factory=Rules)
    token_budget: int = 2048  # tokens of a step in which sequences decode, as the engine's
    prefill_budget: int = 4096  # tokens of a step in which none does
    under_way: int = 2  # steps that an engine begins before the first of them has ended; one without a GPU 1
    behind_s: float = 1.0  # before its last weights come, a waking instance takes requests and computes behind the copy
    first_load_s: float = 0.0  # on a GPU where a model was never resident: building its program, capturing its graphs


def check(cluster: ClusterSpec, models: Sequence[ModelSpec]) -> None:
    """Raises ImpossibleError where no run can be made of this: bad numbers, or a model that fits nowhere."""
    if cluster.nodes < 1 or cluster.gpus_per_node < 1:
        raise ImpossibleError(f"a cluster of {cluster.nodes} nodes with {cluster.gpus_per_node} GPUs each has no GPU")
    if cluster.page_bytes < 1 or cluster.pages < 2:
        raise ImpossibleError(f"an arena of {cluster.arena_bytes} bytes has no two pages of {cluster.page_bytes} bytes")
    for name in ("pcie_gbps", "node_gbps", "disk_gbps"):
        if not getattr(cluster, name) > 0:
            raise ImpossibleError(f"{name} must be above 0, not {getattr(cluster, name)}: nothing could be loaded")
    if not models:
        raise ImpossibleError("there is no model")
    seen = set()
    for model in models:
        if model.name in seen:
            raise ImpossibleError(f"two models are called {model.name}")
        seen.add(model.name)
        _check_model(cluster, model)


def _check_model(cluster: ClusterSpec, model: ModelSpec) -> None:
    if min(model.parameters, model.layers, model.kv_bytes_per_token, model.max_batch, model.context_tokens) < 1:
        raise ImpossibleError(
            f"{model.name}: parameters, layers, kv_bytes_per_token, max_batch and context_tokens must be above 0"
        )
    if not is_power_of_two(model.tp):
        raise ImpossibleError(f"{model.name}: tp must be a power of two, not {model.tp}")
    if model.tp > cluster.gpus_per_node:
        raise ImpossibleError(
            f"{model.name} is spread over {model.tp} GPUs of one node (tp: {model.tp}), and a node has "
            f"{cluster.gpus_per_node}: give more GPUs, or a smaller tp"
        )
    per_page = model.tokens_per_page(cluster.page_bytes)
    if per_page < 1:
        raise ImpossibleError(f"{model.name}: one token's KV does not fit into a page of {cluster.page_bytes} bytes")
    weights = model.shard_pages(cluster.page_bytes)
    if weights >= cluster.pages:
        wanted = next((tp for tp in (1, 2, 4, 8) if model.weight_bytes / tp < cluster.arena_bytes * 0.9), None)
        help_ = f"tp: {wanted} would fit" if wanted else "no group of up to 8 such GPUs holds it"
        raise ImpossibleError(
            f"{model.name} is too large: a shard has {model.shard_bytes / GB:.1f} GB, the arena of a GPU "
            f"{cluster.arena_bytes / GB:.1f} GB for weights and KV; {help_}"
        )
