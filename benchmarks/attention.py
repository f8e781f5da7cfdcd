"""Paged attention on a GPU, beside the memory bus, the tensor cores and torch's own attention.

    python -m benchmarks.attention [--json FILE] [--sweep]

All is measured in this run, as CUDA graphs over all layers of an 8B Llama shape, so that no layer finds its keys and
values in the L2 cache. torch's attention gets its keys and values contiguous, which paged attention does not.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from triton.runtime.errors import OutOfResources

from benchmarks.report import Row, report, table
from services.gpu_agent.engine.cuda import attention
from services.gpu_agent.engine.cuda.attention import (
    TILE,
    PagedKv,
    StepTensors,
    Tuning,
    Workspace,
    attend,
    spare_pieces,
)
from services.gpu_agent.engine.cuda.fused import rotate_and_store
from services.gpu_agent.engine.cuda.pack import cut
from services.gpu_agent.engine.kv_spec import KvSpec

HEADS = 32
SPEC = KvSpec(layers=32, kv_heads=8, head_dim=128, dtype=torch.bfloat16)
SCALING = SPEC.head_dim**-0.5
SPARE = spare_pieces(SPEC.kv_heads)
PAGE_BYTES = 32 << 20
VARLEN = inspect.signature(varlen_attn).parameters  # it gained arguments from release to release

Layer = Callable[[int], object]  # the attention of one layer


@dataclass(frozen=True)
class Shape:
    """`spans` sequences, `new` tokens of each of which attend to `context` keys, their own included."""

    spans: int
    new: int
    context: int
    target: float | None
    """Microseconds (decode) or TFLOP/s (prefill)."""

    @property
    def name(self) -> str:
        if self.new == 1:
            return f"decode {self.spans} x {self.context}"
        return f"prefill {self.new}" + (f" after {self.context - self.new}" if self.context > self.new else "")

    @property
    def kv_bytes(self) -> int:
        """What a layer has to read."""
        return self.spans * self.context * SPEC.bytes_per_token // SPEC.layers

    @property
    def flops(self) -> int:
        """What a layer has to compute: two products over the keys that each query sees."""
        pairs = self.new * (self.context - self.new) + self.new * (self.new + 1) // 2
        return self.spans * 4 * pairs * HEADS * SPEC.head_dim


SHAPES = [
    Shape(1, 1, 512, None),
    Shape(1, 1, 32_768, 60),
    Shape(32, 1, 512, 32),
    Shape(64, 1, 1024, 110),
    Shape(1, 128, 128, None),
    Shape(1, 1024, 1024, None),
    Shape(1, 4096, 4096, 350),
    Shape(1, 512, 4096, None),
]


def seconds(run: Callable[[], object]) -> float:
    """How long `run` takes on the GPU as a graph: the median of some replays."""
    run()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for _ in range(2):
        graph.replay()
    times: list[float] = []
    for _ in range(9):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return median(times)


def seconds_of_layer(layer: Layer) -> float:
    """The same for one layer of many."""
    return seconds(lambda: [layer(number) for number in range(SPEC.layers)]) / SPEC.layers


def copy_bandwidth() -> float:
    """Bytes read and written per second."""
    source = torch.empty(2 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source))


def gemm_rate() -> float:
    """bf16 operations per second of a large matrix product."""
    left, right = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    product = torch.empty_like(left)
    return 2 * 8192**3 / seconds(lambda: torch.mm(left, right, out=product))


@dataclass(frozen=True)
class Paged:
    """A step of a shape, its KV in blocks strewn over pages."""

    kv: PagedKv
    step: StepTensors
    query: torch.Tensor
    out: torch.Tensor
    workspace: Workspace

    @classmethod
    def of(cls, shape: Shape, spare: int) -> Paged:
        """spare: pieces of contexts that there is room for beside one of each."""
        each = SPEC.blocks_for(shape.context)
        slots_per_page = SPEC.slots_per_page(PAGE_BYTES)
        pages = -(-shape.spans * each // slots_per_page)
        page_elements = PAGE_BYTES // SPEC.dtype.itemsize
        memory = torch.empty(pages * page_elements, dtype=SPEC.dtype, device="cuda").normal_()
        blocks = torch.randperm(pages * slots_per_page)[: shape.spans * each]
        start = shape.context - shape.new
        positions = torch.arange(start, shape.context)
        slots = blocks.view(shape.spans, each)[:, positions // 16] * 16 + positions % 16
        cuts = cut([shape.context] * shape.spans, spare) if shape.new == 1 else []
        pieces = [(i, shape.context, i * each, piece, count) for i, count in enumerate(cuts) for piece in range(count)]
        pieces += [(0, 0, 0, 0, 0)] * (len(cuts) + spare - len(pieces) if cuts else 0)
        tiles = [
            (span * shape.new + t, min(TILE, shape.new - t), start + t, span * each)
            for span in range(shape.spans if shape.new > 1 else 0)
            for t in range(0, shape.new, TILE)
        ]
        query = torch.randn(shape.spans * shape.new, HEADS, SPEC.head_dim, dtype=SPEC.dtype, device="cuda")
        return cls(
            PagedKv(memory, SPEC, page_elements, slots_per_page),
            StepTensors(
                slots=_ints(slots.flatten()),
                blocks=_ints(blocks),
                pieces=_ints(torch.tensor(pieces).view(-1, 5)),
                tiles=_ints(torch.tensor(tiles).view(-1, 4)),
            ),
            query,
            torch.empty_like(query),
            Workspace((shape.spans + spare) * HEADS, SPEC.head_dim, "cuda"),
        )

    def attend(self, layer: int) -> None:
        attend(self.kv, layer, self.step, self.query, self.out, self.workspace, scaling=SCALING)

    def write(self, layer: int) -> None:
        new = self.query[:, : SPEC.kv_heads]
        rotate_and_store(self.kv, layer, self.step.slots, new, new, new, None)


def _ints(values: torch.Tensor) -> torch.Tensor:
    return values.to("cuda", torch.int32)


def peers(shape: Shape) -> Iterator[tuple[str, Layer]]:
    """torch's attention functions that can do the same."""
    decode = shape.new == 1
    # A prefill computes more than it reads: its keys may be repeated for each query head.
    heads = SPEC.kv_heads if decode else HEADS
    kv = torch.empty(
        SPEC.layers, 2, shape.spans, shape.context, heads, SPEC.head_dim, dtype=SPEC.dtype, device="cuda"
    ).normal_()
    query = torch.randn(shape.spans, shape.new, HEADS, SPEC.head_dim, dtype=SPEC.dtype, device="cuda")
    # In a decode, the query heads that share a KV head are rows of one small matrix: nothing to mask or to repeat.
    rows = query.view(shape.spans, heads, -1, SPEC.head_dim) if decode else query.transpose(1, 2)
    whole = shape.new == shape.context
    mask = None if decode or whole else causal_lower_right(shape.new, shape.context)

    def sdpa(layer: int) -> torch.Tensor:
        key, value = kv[layer, 0].transpose(1, 2), kv[layer, 1].transpose(1, 2)
        return scaled_dot_product_attention(rows, key, value, attn_mask=mask, is_causal=whole and not decode)

    yield "torch SDPA", sdpa
    causal: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in VARLEN else {"is_causal": True}
    if decode:
        if "enable_gqa" not in VARLEN:
            return
        causal["enable_gqa"] = True
    begins = torch.arange(shape.spans + 1)
    where = (_ints(begins * shape.new), _ints(begins * shape.context), shape.new, shape.context)

    def varlen(layer: int) -> object:
        key, value = kv[layer, 0].flatten(0, 1), kv[layer, 1].flatten(0, 1)
        return varlen_attn(query.flatten(0, 1), key, value, *where, **causal)

    yield "torch varlen_attn", varlen


def row(shape: Shape, what: str, layer_s: float, bandwidth: float, flops: float, target: float | None) -> Row:
    """A decode is bound by the memory bus, a prefill by the tensor cores."""
    if shape.new == 1:
        return Row(what, layer_s * 1e6, "us", shape.kv_bytes / bandwidth * 1e6, "copy bandwidth", target)
    return Row(what, shape.flops / layer_s / 1e12, "TFLOP/s", flops / 1e12, "bf16 GEMM of 8192", target)


def measure() -> list[Row]:
    """All shapes, each beside torch's attention."""
    bandwidth, flops = copy_bandwidth(), gemm_rate()
    rows = [Row("copy, read + write", bandwidth / 1e9, "GB/s"), Row("bf16 GEMM of 8192", flops / 1e12, "TFLOP/s")]
    for shape in SHAPES:
        paged = Paged.of(shape, SPARE)
        rows.append(row(shape, shape.name, seconds_of_layer(paged.attend), bandwidth, flops, shape.target))
        if shape.new > 1 or shape.spans > 1:
            rows.append(Row(f"{shape.name}: write KV", seconds_of_layer(paged.write) * 1e6, "us"))
        del paged
        for name, peer in peers(shape):
            rows.append(row(shape, f"{shape.name}: {name}", seconds_of_layer(peer), bandwidth, flops, None))
        torch.cuda.empty_cache()
    return rows


def sweep() -> list[Row]:
    """Other tunings and ways to split, fastest first, for whoever fills in the table in attention.py."""
    decodes = [Tuning(16, keys, warps, stages) for keys in (32, 64, 128) for warps in (2, 4, 8) for stages in (2, 3, 4)]
    prefills = [
        Tuning(queries, keys, warps, stages)
        for queries, warps in ((64, 4), (128, 4), (128, 8))
        for keys in (32, 64, 128)
        for stages in (2, 3, 4)
    ]
    rows = []
    for shape in SHAPES:
        paged = Paged.of(shape, SPARE)
        decode = shape.new == 1
        tunings = attention.DECODE_TUNING if decode else attention.PREFILL_TUNING
        kept = tunings[SPEC.head_dim]
        timed = []
        for tuning in decodes if decode else prefills:
            tunings[SPEC.head_dim] = tuning
            try:
                timed.append((seconds_of_layer(paged.attend), f"{shape.name}: {tuning}"))
            except OutOfResources:  # needs more shared memory than a multiprocessor has
                continue
        tunings[SPEC.head_dim] = kept
        rows += [row(shape, what, layer_s, 1e12, 1e15, None) for layer_s, what in sorted(timed)[:6]]
        if decode:
            timed = []
            for spare in (1, 4, 8, 16, 24, 32, 48, 64, 96, 128):
                paged = Paged.of(shape, spare)
                timed.append((seconds_of_layer(paged.attend), f"{shape.name}: room for {spare} pieces more"))
            rows += [row(shape, what, layer_s, 1e12, 1e15, None) for layer_s, what in sorted(timed)[:6]]
        del paged
        torch.cuda.empty_cache()
        print(table(rows[-12 if decode else -6 :]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    parser.add_argument("--sweep", action="store_true", help="compare tunings instead")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    if arguments.sweep:
        sweep()
    else:
        report("attention", measure(), arguments.json)


if __name__ == "__main__":
    main()
