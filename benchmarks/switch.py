"""Switching models on one GPU, as a client sees it: wakes of warm, half resident, host-tier and disk models, evictions.

    python -m benchmarks.switch [--json FILE] [--switches 200]

An agent and a router as processes of their own, with a real etcd and Redis; this process gives the placer's orders and
is the client, over gRPC. On a GPU the models have the shapes of Llama 3.1 8B and Llama 3.2 1B in bf16; on a machine
without one they are tiny, which shows that everything works, not how fast it is. Limits and peers are measured too.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path

import torch
from transformers import LlamaConfig

from benchmarks.models import llama_1b, llama_3b, llama_8b
from benchmarks.one_agent import Cluster, running
from benchmarks.random_checkpoint import write_checkpoint
from benchmarks.report import Row, report
from benchmarks.switch_peers import peers
from benchmarks.timed_agent import step_gaps
from services.gpu_agent.weights.direct import DirectFile
from warmserve.v1 import cluster_pb2

SEED = 7
ON_GPU = torch.cuda.is_available()


@dataclass(frozen=True)
class Scale:
    """What is measured on this machine."""

    large: LlamaConfig
    medium: LlamaConfig
    small: LlamaConfig
    smalls: int  # how many small models take turns with the other two
    arena: str
    tier: str
    repeats: int


def scale() -> Scale:
    """8B, 3B and 1B on a GPU, else tiny ones."""
    if ON_GPU:
        return Scale(llama_8b(), llama_3b(), llama_1b(), 4, "56GiB", "40GiB", 7)

    def tiny(layers: int, hidden: int) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=2048,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
        )

    return Scale(tiny(16, 512), tiny(8, 384), tiny(4, 256), 4, "512MiB", "256MiB", 5)


async def warm_switches(cluster: Cluster, specs: list[cluster_pb2.ModelSpec], switches: int) -> list[Row]:
    """Wakes of warm models that take turns, beside the same prefill where the model serves already."""
    prefills = []
    for n in range(9):
        await cluster.wake(specs[0])
        prefills.append((await cluster.first_token(specs[0].name, n))[0])
    await cluster.rest(specs[0].name)
    prefill = statistics.median(prefills)
    chosen, wakes, first = random.Random(SEED), [], []
    for n in range(switches):
        spec = chosen.choice(specs)
        first.append(await cluster.switch(spec, n))
        await cluster.rest(spec.name)
        wakes.append(await cluster.wake(spec))
        await cluster.rest(spec.name)
    p99 = sorted(first)[min(len(first) - 1, int(0.99 * len(first)))]
    return [
        Row("wake of a warm model: RPC to answer, p50", statistics.median(wakes), "ms", None, None, 10),
        Row(
            f"TTFT on that path, {len(specs)} models, p50",
            statistics.median(first),
            "ms",
            prefill,
            "that prefill, model active",
            prefill + 15,
        ),
        Row("the same, p99", p99, "ms", prefill, "that prefill, model active", prefill + 60),
    ]


async def loads(cluster: Cluster, spec: cluster_pb2.ModelSpec, chosen: Scale, bus: float) -> list[Row]:
    """Loads from the host tier: whole, half, and evictions. `bus` is what copies reach, in bytes per second."""
    name, nbytes = spec.name, spec.facts.shard_bytes
    await cluster.residency.wait_for(
        lambda items: any(i.name.startswith(spec.facts.fingerprint[:32]) for i in items["g0"].host_tier.images)
    )
    ready, whole, half, evictions = [], [], [], []
    for n in range(chosen.repeats):
        await cluster.switch(spec, n)
        await cluster.rest(name)
        await cluster.evict(name)
        await cluster.warm(spec)
        ready.append(cluster.shard(name).cold_load_ms)
        evictions.append(await cluster.evict(name))
        whole.append(await cluster.switch(spec, n))
        await cluster.rest(name)
        await cluster.evict(name, keep=0.5)
        half.append(await cluster.switch(spec, n))
        await cluster.rest(name)
        await cluster.evict(name)
    limit = nbytes / bus * 1e3
    time_to_ready, ttft = statistics.median(ready), statistics.median(whole)
    source = "copy from pinned memory" if ON_GPU else "copy in memory"
    large = (
        name == "large"
    )  # for which targets are set: of small models, what does not depend on their size weighs more
    return [
        Row(f"{name}: host tier to ready", time_to_ready, "ms", limit, source, limit / 0.95 if large else None),
        Row(f"{name}: host tier to ready, rate", nbytes / time_to_ready / 1e6, "GB/s", bus / 1e9, source),
        Row(f"{name}: TTFT on that path", ttft, "ms", time_to_ready, "time to ready", time_to_ready + 10),
        Row(
            f"{name}: half resident, TTFT",
            statistics.median(half),
            "ms",
            ttft,
            "all missing",
            0.55 * ttft if large else None,
        ),
        Row(f"{name}: evict", statistics.median(evictions), "ms", None, None, 20),
    ]


async def beside(cluster: Cluster, specs: list[cluster_pb2.ModelSpec], tokens: int) -> list[Row]:
    """Steps of a running instance, and their tokens at the client, while another model is warmed and evicted beside.

    The target is the decode step's. Its token has an event loop, two gRPC streams and this process before it.
    """
    serving, warmed = specs[0], specs[1]
    await cluster.evict(warmed.name)
    await cluster.wake(serving)
    await cluster.first_token(serving.name, 0, 32)

    async def decoded(seed: int) -> tuple[list[float], list[float]]:
        """Times between the ends of the engine's steps, and between tokens, in ms."""
        began = time.monotonic()
        gaps = (await cluster.first_token(serving.name, seed, tokens))[1]
        return step_gaps(cluster.step_times, began, time.monotonic()), gaps

    steps_alone, tokens_alone = await decoded(1)
    async with _warmed_and_evicted(cluster, warmed) as evictions:
        steps, answer = await decoded(2)
    await cluster.rest(serving.name)
    if not evictions:
        raise RuntimeError(f"{warmed.name} was not warmed and evicted once beside {tokens} tokens")
    step, token = quantile(steps_alone, 0.99), quantile(tokens_alone, 0.99)
    told = f"the other one warmed and evicted {len(evictions)} times beside {len(steps)} steps"
    return [
        Row("decode step beside warming, p99", quantile(steps, 0.99), "ms", step, "alone", 1.05 * step, note=told),
        Row("the longest of them", max(steps), "ms", max(steps_alone), "alone"),
        Row("its tokens at the client, p99", quantile(answer, 0.99), "ms", token, "alone"),
    ]


async def evictions_beside(
    cluster: Cluster, evicted: cluster_pb2.ModelSpec, serving: cluster_pb2.ModelSpec, tokens: int
) -> list[Row]:
    """Evictions of a model while another one's instance steps."""
    await cluster.evict(evicted.name)
    await cluster.wake(serving)
    async with _warmed_and_evicted(cluster, evicted) as evictions:
        while len(evictions) < 5:
            await cluster.first_token(serving.name, len(evictions), tokens)
    await cluster.rest(serving.name)
    what = f"{evicted.name}: evict while {serving.name} steps"
    return [Row(what, statistics.median(evictions), "ms", None, None, 20, note=f"the longest {max(evictions):.1f} ms")]


@asynccontextmanager
async def _warmed_and_evicted(cluster: Cluster, spec: cluster_pb2.ModelSpec) -> AsyncIterator[list[float]]:
    """Within it a model that is cold is warmed and evicted, again and again; gives how long evictions took, in ms.

    An order that fails ends what is within it: its error comes out, in an ExceptionGroup.
    """
    evictions: list[float] = []

    async def warm_and_evict() -> None:
        while True:
            await cluster.warm(spec)
            evictions.append(await cluster.evict(spec.name))

    async with asyncio.TaskGroup() as group:
        warming = group.create_task(warm_and_evict())
        yield evictions
        warming.cancel()


def quantile(values: list[float], share: float) -> float:
    """The value below or at which so many of them lie."""
    return sorted(values)[int(share * (len(values) - 1))]


async def from_disk(chosen: Scale, folder: Path, source: Path) -> list[Row]:
    """Loads with a cold page cache and without a host tier, beside reading the bytes alone."""
    times, reads = [], []
    async with running(chosen.arena, "0", folder / "disk") as cluster:
        spec = await cluster.deploy("large", source)
        (path,) = (folder / "images").glob(f"{spec.facts.fingerprint[:32]}*.image")
        await cluster.warm(spec)
        for _ in range(2):
            await cluster.evict("large")
            _forget(path)
            await cluster.warm(spec)
            times.append(cluster.shard("large").cold_load_ms)
            _forget(path)
            reads.append(_read_time(path))
    limit = statistics.median(reads)
    return [Row("disk to ready, cold page cache", statistics.median(times), "ms", limit, "reading alone", 1.05 * limit)]


def copy_rate() -> float:
    """Bytes per second of copies from pinned memory to the GPU, or within memory where there is none."""
    nbytes = 1 << (30 if ON_GPU else 26)
    source = torch.empty(nbytes, dtype=torch.uint8, pin_memory=ON_GPU).fill_(1)
    target = torch.empty(nbytes, dtype=torch.uint8, device="cuda" if ON_GPU else "cpu")
    rates = []
    for _ in range(5):
        began = time.perf_counter()
        target.copy_(source, non_blocking=True)
        if ON_GPU:
            torch.cuda.synchronize()
        rates.append(nbytes / (time.perf_counter() - began))
    return statistics.median(rates)


def _forget(path: Path) -> None:
    """Has the page cache forget a file."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def _read_time(path: Path) -> float:
    """Milliseconds that reading a file's bytes takes, past the page cache, four parts at a time."""
    part, size = 16 << 20, path.stat().st_size
    buffers = [mmap(-1, part) for _ in range(4)]

    def read(lane: int) -> None:
        for offset in range(lane * part, size, 4 * part):
            file.read(offset, memoryview(buffers[lane])[: min(part, size - offset)])

    began = time.perf_counter()
    with DirectFile(path) as file, ThreadPoolExecutor(4) as lanes:
        list(lanes.map(read, range(4)))
    return (time.perf_counter() - began) * 1e3


async def measure(switches: int, folder: Path) -> list[Row]:
    """All rows. `folder` holds the models twice over: checkpoints and images."""
    chosen, bus = scale(), copy_rate()
    shapes = [("large", chosen.large), ("medium", chosen.medium)]
    shapes += [(f"small{n}", chosen.small) for n in range(chosen.smalls)]
    say("writing checkpoints")
    for seed, (name, config) in enumerate(shapes):
        write_checkpoint(folder / name, config, seed)
    rows: list[Row] = []

    def tell(found: list[Row]) -> None:
        rows.extend(found)
        for row in found:
            say(row.what if row.value is None else f"{row.what}: {row.value:.4g} {row.unit}")

    async with running(chosen.arena, chosen.tier, folder / "main") as cluster:
        say("preparing images")
        specs = await asyncio.gather(*(cluster.deploy(name, folder / name) for name, _ in shapes))
        tell(await loads(cluster, specs[0], chosen, bus))
        tell(await loads(cluster, specs[2], chosen, bus))
        for spec in specs:
            await cluster.warm(spec)
        tell(await warm_switches(cluster, specs, switches))
        tell(await beside(cluster, specs, 800))
        tell(await evictions_beside(cluster, specs[0], specs[1], 800))
    tell(await from_disk(chosen, folder, folder / "large"))
    tell(peers(folder / "large"))
    return rows


def say(what: str) -> None:
    """What is being done, for those who wait."""
    print(f"{time.strftime('%H:%M:%S')} {what}", flush=True)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the result there")
    parser.add_argument("--switches", type=int, default=200, help="wakes of warm models")
    parser.add_argument("--folder", type=Path, help="where checkpoints and images go; by default a temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        report("switch", asyncio.run(measure(arguments.switches, Path(folder))), arguments.json)


if __name__ == "__main__":
    main()
