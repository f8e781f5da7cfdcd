"""What a GPU does at best, measured: its bus, its tensor cores, and what no kernel of ours is in."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass, replace
from statistics import median

import torch
from torch.nn import functional

from benchmarks.models import ArenaModel
from benchmarks.report import Row
from services.gpu_agent.engine.cuda.attention import attend_whole
from services.gpu_agent.weights.layout import fused

DEVICE = torch.device("cuda", 0)


@dataclass(frozen=True)
class Limits:
    """What the device does at best, measured."""

    bytes_per_s: float
    flops_per_s: float


def measure_limits() -> Limits:
    """Bandwidth of a large device copy, counting reads and writes; rate of a large bf16 matrix product."""
    rate = product_rate()  # first, for cuBLAS keeps a workspace, which would hold a part of the copy's memory
    torch.cuda.empty_cache()
    return Limits(copy_bandwidth(), rate)


def copy_bandwidth() -> float:
    """Bytes read and written per second."""
    source, target = (torch.empty(2 << 30, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    return 2 * source.nbytes / gpu_time(lambda: target.copy_(source))


def product_rate() -> float:
    """Operations per second of a bf16 matrix product."""
    left, right = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / gpu_time(lambda: left @ right)


def gpu_time(work: Callable[[], object], repeats: int = 15) -> float:
    """Median seconds of work on the GPU."""
    work()
    times: list[float] = []
    for _ in range(repeats):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        began.record()
        work()
        ended.record()
        ended.synchronize()
        times.append(began.elapsed_time(ended) / 1e3)
    return median(times)


def floor_rows(placed: ArenaModel, name: str, decodes: Many[tuple[int, int]], prefills: Many[int]) -> list[Row]:
    """What a step takes at least with matrix products that somebody else made, as graphs with no kernel of ours.

    Beside the products there is one pass over what lies between two of them and before the logits (as many bytes as a
    norm with its residual sum, the rotation and the gate must read and write); one over the logits for the choice of
    tokens; what no step is without (its tokens come from the CPU and are looked up, those chosen go back); and
    attention: in each layer of a decode step (sequences, tokens of context) one pass over as many bytes as its keys and
    values have; for prefills torch's fused attention, which reads no pages. A pass over so many bytes is a copy of half
    as many, which reads the one half and writes the other. Rows in the order of `decodes` and then `prefills`.
    """
    config, weights, layout = placed.config, placed.weights, placed.layout
    kv_heads = config.num_key_value_heads
    layers = [
        [
            matrix_over(placed, [f"model.layers.{layer}.{part}.weight" for part in names])
            for names in (
                ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                ("self_attn.o_proj",),
                ("mlp.gate_proj", "mlp.up_proj"),
                ("mlp.down_proj",),
            )
        ]
        for layer in range(config.num_hidden_layers)
    ]
    place = layout.place("lm_head.weight")
    head = weights.tensor(place.dtype, place.shape, place.offset)
    most = max(*prefills, *(batch for batch, _ in decodes))
    inputs = {matrix.shape[1]: bf16(most, matrix.shape[1]) for matrix in layers[0]}
    heads = [bf16(1, number, most, config.head_dim) for number in (config.num_attention_heads, kv_heads, kv_heads)]
    # Numbers, all of bf16: of a token between two products, read and written; of a token's keys and values in a layer.
    norm, rotation = 4 * config.hidden_size, 2 * layers[0][0].shape[0]
    between = [norm, rotation, norm, 3 * config.intermediate_size]
    kv = 2 * kv_heads * config.head_dim
    place = layout.place("model.embed_tokens.weight")
    table = weights.tensor(place.dtype, place.shape, place.offset)
    asked, chosen = (torch.zeros(most, dtype=torch.int64, pin_memory=DEVICE.type == "cuda") for _ in range(2))
    ids = torch.zeros(most, dtype=torch.int64, device=DEVICE)
    largest = max(most * max(between), *(n * max(c * kv, len(head)) for n, c in decodes))
    source, target = (torch.empty(largest // 2, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))

    def pass_over(numbers: int, layer: int = 0) -> None:
        half = numbers // 2
        # Of each layer elsewhere, as far as there is room, so that a small one is not found in the GPU's cache.
        begin = layer % (len(source) // half) * half
        target[begin : begin + half].copy_(source[begin : begin + half])

    def products(tokens: int, rows: int) -> None:
        for matrices in layers:
            for matrix in matrices:
                functional.linear(inputs[matrix.shape[1]][:tokens], matrix)
        functional.linear(inputs[head.shape[1]][:rows], head)

    def step(tokens: int, rows: int, context: int) -> None:
        query, key, value = (states[:, :, :tokens] for states in heads)
        ids[:tokens].copy_(asked[:tokens], non_blocking=True)
        functional.embedding(ids[:tokens], table)
        for layer, matrices in enumerate(layers):
            for matrix, numbers in zip(matrices, between, strict=True):
                pass_over(tokens * numbers)
                functional.linear(inputs[matrix.shape[1]][:tokens], matrix)
            if context:
                pass_over(tokens * context * kv, layer)
            else:
                attend_whole(query, key, value, config.head_dim**-0.5)
        pass_over(rows * norm)
        functional.linear(inputs[head.shape[1]][:rows], head)
        pass_over(rows * len(head))
        chosen[:rows].copy_(ids[:rows], non_blocking=True)

    def row(what: str, tokens: int, rows: int, context: int = 0) -> Row:
        alone = fastest_time(lambda: products(tokens, rows))
        whole = fastest_time(lambda: step(tokens, rows, context))
        return Row(f"{name}: floor of {what}", whole * 1e3, "ms", alone * 1e3, "the products alone")

    return [
        *(row(f"a decode step, {n} x {c}", n, n, c) for n, c in decodes),
        *(row(f"a prefill of {tokens}", tokens, 1) for tokens in prefills),
    ]


def beside_floors(rows: Many[Row], floors: Many[Row]) -> list[Row]:
    """The rows, of which those say so whose target is below the floor that stands at the same place in `floors`."""
    return [
        replace(row, note=f"out of reach: the floor is {floor.value:.3g} {floor.unit}")
        if row.target is not None and floor.value is not None and row.target < floor.value
        else row
        for row, floor in zip(rows, floors, strict=True)
    ]


def fastest_time(work: Callable[[], object]) -> float:
    """graph_time with the faster of the two libraries that torch can multiply with."""
    before, times = torch.backends.cuda.preferred_blas_library(), []
    for library in ("cublas", "cublaslt"):
        torch.backends.cuda.preferred_blas_library(library)
        times.append(graph_time(work))
    torch.backends.cuda.preferred_blas_library(before)
    return min(times)


@torch.inference_mode()
def graph_time(work: Callable[[], object]) -> float:
    """Median seconds of work on the GPU as a graph of nothing else."""
    work()  # what sets itself up does so now
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return gpu_time(graph.replay)


def matrix_over(placed: ArenaModel, names: list[str]) -> torch.Tensor:
    """Weights that lie one behind the other, as one matrix."""
    over = fused([placed.layout.place(name) for name in names])
    assert over is not None
    return placed.weights.tensor(over.dtype, over.shape, over.offset)


def bf16(*shape: int) -> torch.Tensor:
    """Random numbers on the GPU."""
    return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16)
