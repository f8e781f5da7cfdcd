"""Paged attention on a GPU: a step's queries attend to keys and values where they lie in the arena's pages.

A step's flattened batch holds spans of consecutive tokens of sequences. One-token spans go to the decode kernel, longer
ones are cut into tiles of up to TILE queries for the prefill kernel. All that changes from step to step lies in the
StepTensors, so both functions may be captured in a CUDA graph, which then serves any step within its capacities. The
first call for a model compiles; do that before capturing.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence as Many
from dataclasses import dataclass, replace

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from services.gpu_agent.engine.attention import LayerAttention
from services.gpu_agent.engine.cuda.attention_kernels import decode_kernel, prefill_kernel
from services.gpu_agent.engine.cuda.pack import LEAST_KEYS
from services.gpu_agent.engine.kv_spec import KvSpec

TILE = 128
"""The most queries of one tile."""

_log = logging.getLogger(__name__)

_LOG2E = 1.4426950408889634
_RESIDENT = 264  # programs of the decode kernel that an H100 runs at once: two on each multiprocessor
_MOST_SPARE = 128


@dataclass(frozen=True)
class Tuning:
    """How the programs of a kernel go over queries and keys."""

    queries: int
    """Rows of queries of one program, which tensor cores take 16 (decode) or 64 (prefill, a divisor of TILE) at least.
    Decode takes more where more heads share a KV head."""
    keys: int
    """Keys met at once: a power of 2, at least 16."""
    warps: int
    stages: int
    """Depth of the pipeline of loads."""


# By head dimension, rounded up to a power of 2. `python -m benchmarks.attention --sweep` shows others.
DECODE_TUNING = {
    16: Tuning(16, 64, 4, 3),
    32: Tuning(16, 64, 4, 3),
    64: Tuning(16, 64, 4, 3),
    128: Tuning(16, 64, 4, 3),
    256: Tuning(16, 32, 4, 3),
}
PREFILL_TUNING = {
    16: Tuning(128, 64, 8, 3),
    32: Tuning(128, 64, 8, 3),
    64: Tuning(128, 64, 8, 3),
    128: Tuning(128, 64, 8, 3),
    256: Tuning(128, 64, 8, 2),
}


@dataclass(frozen=True)
class PagedKv:
    """Where the KV of a model lies; made once per instance.

    Block b begins at element b // slots_per_page * page_elements + b % slots_per_page * block_elements of `pages`
    and holds, for each layer, keys (block_tokens, kv_heads, head_dim), then values.
    """

    pages: torch.Tensor
    """All pages of the arena as one 1-D tensor of the spec's dtype."""
    spec: KvSpec
    page_elements: int
    slots_per_page: int

    def __post_init__(self) -> None:
        """Raises ValueError for what the kernels cannot do."""
        if self.spec.head_dim > 256:
            raise ValueError(f"heads of more than 256 elements are not supported: {self.spec.head_dim}")
        if 16 % self.spec.block_tokens:
            raise ValueError(f"blocks of {self.spec.block_tokens} tokens do not fit tiles of 16; use 16")

    @property
    def block_elements(self) -> int:
        """Elements of one block, all layers."""
        return self.spec.block_bytes // self.spec.dtype.itemsize

    def starts(self, layer: int) -> tuple[int, int]:
        """Where the layer's keys and its values begin inside a block, in elements."""
        half = self.spec.block_tokens * self.spec.kv_heads * self.spec.head_dim
        return 2 * layer * half, (2 * layer + 1) * half


@dataclass(frozen=True)
class StepTensors:
    """What attention needs to know of a step: int32 tensors on the device, at fixed addresses, filled before each step.

    The sizes are capacities. What exceeds the step is padding: slots -1; pieces and tiles of zeros.
    """

    slots: torch.Tensor
    """(tokens,) Where each token's KV goes: block * block_tokens + row in the block. Below 0: it is not written."""
    blocks: torch.Tensor
    """Block numbers of all sequences, one sequence's list after another's; 1-D."""
    pieces: torch.Tensor
    """(N, 5) Pieces of the contexts of one-token spans, one span's after another's: the span's batch row; how many keys
    it sees, its own included (a window not counted), 0 in padding; where its sequence's list begins in `blocks`; which
    of the span's pieces this is; how many it has."""
    tiles: torch.Tensor
    """(N, 4) Tiles of the longer spans: row of the first query; number of queries, at most TILE, 0 in padding; position
    of the first query in its sequence; where the sequence's list begins in `blocks`. Longest contexts last."""


def spare_pieces(kv_heads: int) -> int:
    """How many pieces a step has room for beside one of each one-token span: with them, one context fills the GPU.

    Room that a step does not need costs time, a program of the decode kernel for each KV head.
    """
    return min(_MOST_SPARE, -(-_RESIDENT // kv_heads))


class Workspace:
    """Memory for what the programs of a context in pieces hand to one another, allocated once.

    Steps that run one after another on one stream share it, whatever their models.
    """

    def __init__(self, lanes: int, head_dim: int, device: torch.device | str) -> None:
        """Room for `lanes` (see lanes_for) of `head_dim` or less."""
        self.lanes = lanes
        self.head_dim = head_dim
        self.acc = torch.empty(lanes * head_dim, dtype=torch.float32, device=device)
        self.total = torch.empty(lanes, dtype=torch.float32, device=device)
        self.peak = torch.empty(lanes, dtype=torch.float32, device=device)
        self.arrivals = torch.zeros(lanes, dtype=torch.int32, device=device)  # 0 again after each kernel

    @staticmethod
    def lanes_for(spans: int, heads: int, kv_heads: int) -> int:
        """Lanes that decoding up to `spans` at once takes: one for each query head and piece."""
        return (spans + spare_pieces(kv_heads)) * heads

    @property
    def bytes(self) -> int:
        """Device memory that it holds."""
        return self.acc.nbytes + self.total.nbytes + self.peak.nbytes + self.arrivals.nbytes


def attend(
    kv: PagedKv,
    layer: int,
    step: StepTensors,
    query: torch.Tensor,
    out: torch.Tensor,
    workspace: Workspace,
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> None:
    """Attention of a step's queries to keys and values in the pages, its own included (see fused.rotate_and_store).

    A query at position p sees the keys at positions (p - window, p], or [0, p]. Its scores are scaling * q.k, capped to
    softcap * tanh(score / softcap); `sinks`, (heads,), are one more logit of each head in the softmax's denominator.

    query: (tokens, heads, head_dim) with contiguous heads; out: the same shape, contiguous. Rows of `out` that
    belong to no span are not written. Raises ValueError where the tensors do not fit.
    """
    _, heads, head_dim = query.shape
    group = heads // kv.spec.kv_heads
    if query.stride(2) != 1 or not out.is_contiguous() or out.shape != query.shape:
        raise ValueError(f"unfit tensors: query strides {query.stride()}, out {tuple(out.shape)} {out.stride()}")
    if group * kv.spec.kv_heads != heads or head_dim != kv.spec.head_dim:
        raise ValueError(f"queries of {heads} heads of {head_dim} do not fit {kv.spec}")
    if scaling <= 0:
        raise ValueError(f"scaling must be above 0, not {scaling}")
    scale = scaling if softcap is not None else scaling * _LOG2E
    width = max(16, _power_of_2(head_dim))  # tensor cores multiply 16 elements at least
    key_start, value_start = kv.starts(layer)
    where = (query.stride(0), query.stride(1), key_start, value_start, kv.page_elements, kv.block_elements)
    pieces = len(step.pieces)
    if pieces > 0:
        if pieces * heads > workspace.lanes or head_dim > workspace.head_dim:
            raise ValueError(
                f"the workspace has {workspace.lanes} lanes of {workspace.head_dim}; {pieces} pieces of {heads} heads "
                f"take {pieces * heads} of {head_dim} (see Workspace.lanes_for)"
            )
        tuning = _fitted(DECODE_TUNING[width], kv.spec)
        members = _power_of_2(group)
        decode_kernel[(kv.spec.kv_heads, pieces)](
            kv.pages,
            query,
            out,
            step.pieces,
            step.blocks,
            sinks,
            workspace.acc,
            workspace.total,
            workspace.peak,
            workspace.arrivals,
            *where,
            scale,
            softcap,
            window,
            LEAST_KEYS,
            SLOTS_PER_PAGE=kv.slots_per_page,
            BLOCK_TOKENS=kv.spec.block_tokens,
            KV_HEADS=kv.spec.kv_heads,
            GROUP=group,
            HEAD_DIM=head_dim,
            BLOCK_M=max(tuning.queries, members),
            BLOCK_N=tuning.keys,
            BLOCK_D=width,
            BLOCK_G=members,
            GATHER=max(1, min(16, 8192 // (members * width))),
            num_warps=tuning.warps,
            num_stages=tuning.stages,
        )
    if len(step.tiles) > 0:
        tuning = _fitted(PREFILL_TUNING[width], kv.spec)
        parts = TILE // tuning.queries
        prefill_kernel[(heads, len(step.tiles) * parts)](
            kv.pages,
            query,
            out,
            step.tiles,
            step.blocks,
            sinks,
            *where,
            scale,
            softcap,
            window,
            SLOTS_PER_PAGE=kv.slots_per_page,
            BLOCK_TOKENS=kv.spec.block_tokens,
            KV_HEADS=kv.spec.kv_heads,
            GROUP=group,
            HEAD_DIM=head_dim,
            PARTS=parts,
            BLOCK_M=tuning.queries,
            BLOCK_N=tuning.keys,
            BLOCK_D=width,
            num_warps=tuning.warps,
            num_stages=tuning.stages,
        )


def takes_whole(layers: Many[LayerAttention], dtype: torch.dtype, tokens: int, device: torch.device) -> bool:
    """Whether attend_whole computes what these layers do for prompts of up to so many tokens: a small one is tried."""
    if dtype.itemsize != 2 or any(
        layer.softcap is not None or layer.sinks or (layer.window is not None and layer.window < tokens)
        for layer in layers
    ):
        return False
    first = layers[0]
    query, key = (
        torch.ones(1, n, 16, first.head_dim, dtype=dtype, device=device) for n in (first.heads, first.kv_heads)
    )
    try:
        attend_whole(query, key, key, first.scaling)
    except RuntimeError as error:  # no kernel for such heads, or for this GPU
        _log.info("long prompts are attended to over pages, for torch has no fused attention for them: %s", error)
        return False
    return True


def attend_whole(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    """Causal attention of a prompt to itself, by torch's fused kernels: (1, heads, tokens, head_dim), like `query`.

    key, value: (1, kv_heads, tokens, head_dim). For prompts of thousands of tokens they are a third faster than ours;
    what pads the prompt lies behind it, where nothing of it looks.
    """
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)


def _power_of_2(number: int) -> int:
    """The smallest power of 2 that is not below it; at least 1."""
    return 1 << (number - 1).bit_length()


def _fitted(tuning: Tuning, spec: KvSpec) -> Tuning:
    """The table is for 2-byte elements; wider ones take as much shared memory with fewer keys."""
    return replace(tuning, keys=max(16, tuning.keys * 2 // spec.dtype.itemsize))
