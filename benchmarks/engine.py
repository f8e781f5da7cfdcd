"""The engine on one GPU, beside the limits of its memory bus and tensor cores, and beside transformers.

    python -m benchmarks.engine [--json FILE]

Models have the shapes of Llama 3.1 8B and Llama 3.2 1B with random weights in bf16. Times are wall times of the engine
as an agent runs it: scheduling, the step, attention, sampling, and the answer back on the CPU.
"""

from __future__ import annotations

import argparse
import gc
import random
import threading
import time
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from benchmarks.gpu_limits import DEVICE, Limits, beside_floors, floor_rows, gpu_time, measure_limits
from benchmarks.models import ArenaModel, llama_1b, llama_8b, place
from benchmarks.report import Row, report
from services.gpu_agent.arena.arena import Arena
from services.gpu_agent.arena.cuda import CudaMemory
from services.gpu_agent.engine.cuda.backend import CudaBackend, CudaProgram
from services.gpu_agent.engine.instance import Instance
from services.gpu_agent.engine.kv import KvCache
from services.gpu_agent.engine.loop import EngineLoop
from services.gpu_agent.engine.sampling_params import SamplingParams
from services.gpu_agent.engine.sequence import Sequence, SequenceOutput

PAGE_BYTES = 32 << 20
ARENA_BYTES = 44 << 30  # leaves room for transformers' own copy of the model
WORKSPACE_BYTES = 4 << 30
CONTEXT = 8192
VOCABULARY = 100_000  # prompts are drawn from these
DECODES = ((1, 512), (32, 512), (64, 1024))  # sequences, tokens of context
PREFILLS = (128, 1024, 4096)


@dataclass
class Served:
    """A model on the engine."""

    name: str
    placed: ArenaModel
    program: CudaProgram
    arena: Arena
    capture_s: float = 0.0
    made: int = 0

    def instance(self) -> Instance:
        """A new instance."""
        self.made += 1
        name = f"{self.name}-{self.made}"
        limits = self.program.limits
        return Instance(
            name,
            self.name,
            self.program.runner(frozenset()),
            KvCache(self.arena, name, self.program.model.kv_spec),
            vocab_size=self.program.model.vocab_size,
            eos_ids=(),
            context_tokens=CONTEXT,
            max_batch=limits.max_batch,
            token_budget=limits.token_budget,
            max_prefills=limits.max_prefills,
            prefill_budget=limits.prefill_budget,
        )


@dataclass
class Listener:
    """Hears an engine's news: when each step told something, and when a number of sequences has ended."""

    waits_for: int
    times: list[float] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)
    failure: Exception | None = None

    def on_step(self, _: str, outputs: list[SequenceOutput]) -> None:
        self.times.append(time.perf_counter())
        for output in outputs:
            if output.error:
                self.failure = RuntimeError(output.error)
            self.waits_for -= output.finish_reason is not None
        if self.waits_for <= 0:
            self.ended.set()

    def on_failure(self, _: str, error: Exception) -> None:
        self.failure = error
        self.ended.set()


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    torch.cuda.set_device(DEVICE)
    limits = measure_limits()
    gc.collect()
    gc.freeze()  # as services do, so that no collection walks what was imported
    torch.cuda.empty_cache()  # what was measured with must not count as the agent's
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.set_per_process_memory_fraction(WORKSPACE_BYTES / total, DEVICE)  # as an agent does
    arena = Arena(CudaMemory(PAGE_BYTES, ARENA_BYTES // PAGE_BYTES, 0))
    backend = CudaBackend(arena, DEVICE, WORKSPACE_BYTES)
    large = serve(arena, backend, "8B", llama_8b())
    steps = step_rows(large, limits, (6.6, 7.6, 10.5))
    prefills = prefill_rows(large, limits, (11, 27, 105))
    burst = throughput(large)
    outside = memory_rows(backend)
    rows = with_floors(large, steps, prefills)
    rows += [*burst, Row("8B: graphs captured once for all batches", large.capture_s, "s"), *outside]
    large.placed.weights.remove()
    small = [serve(arena, backend, f"1B-{i}", llama_1b()) for i in range(4)]
    rows += with_floors(
        small[0], step_rows(small[0], limits, like=steps), prefill_rows(small[0], limits, like=prefills)
    )
    rows += together(small)
    arena.close()
    del small, large, backend, arena
    gc.unfreeze()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1.0, DEVICE)
    rows += transformers_rows(burst[0])
    report("engine", rows, arguments.json)


def serve(arena: Arena, backend: CudaBackend, name: str, config: Any) -> Served:
    """Places a model and captures its graphs."""
    placed = place(arena, name, config)
    program = backend.program(config, placed.layout, placed.weights, None, CONTEXT)
    began = time.perf_counter()
    while program.prepare():
        pass
    torch.cuda.synchronize()
    gc.freeze()  # as an agent does
    return Served(name, placed, program, arena, time.perf_counter() - began)


def prompt(tokens: int, seed: int) -> list[int]:
    """Random token ids."""
    return random.Random(seed).choices(range(5, VOCABULARY), k=tokens)


def request(tokens: int, seed: int, answer: int, **options: Any) -> Sequence:
    """A greedy request."""
    sampling = SamplingParams(answer, temperature=0.0, **options)
    return Sequence(f"{tokens}-{seed}-{answer}", 0, prompt(tokens, seed), sampling)


def allowed(index: int, limit: float, targets: Many[float] | None, like: Many[Row]) -> float:
    """A row's target: given, or as far from its limit as that of another model's row."""
    if targets is not None:
        return targets[index]
    other = like[index]
    assert other.target is not None
    assert other.limit is not None
    return limit * other.target / other.limit


def step_rows(served: Served, limits: Limits, targets: Many[float] | None = None, like: Many[Row] = ()) -> list[Row]:
    """Decode steps, as an engine's loop goes on from step to step. targets in ms, one for each of DECODES."""
    rows = []
    idle = 0.0
    for index, (batch, context) in enumerate(DECODES):
        wall, device = decode_step(served, batch, context)
        kv = batch * context * served.program.model.kv_spec.bytes_per_token
        limit = (served.placed.step_bytes + kv) / limits.bytes_per_s * 1e3
        target = allowed(index, limit, targets, like)
        what = f"{served.name}: decode step, {batch} x {context}"
        rows.append(Row(what, wall * 1e3, "ms", limit, "bytes over the bus", target))
        idle = max(0.0, 1 - device / wall)
    rows.append(Row(f"{served.name}: GPU idle between steps, 64 x 1024", idle * 100, "%", None, None, 5))
    sampled, _ = decode_step(served, 64, 1024, temperature=0.8, top_p=0.9, top_k=50)
    greedy = rows[2].value
    rows.append(Row(f"{served.name}: the same, top_k and top_p", sampled * 1e3, "ms", greedy, "greedy, this run"))
    return rows


def decode_step(served: Served, batch: int, context: int, steps: int = 120, **sampling: Any) -> tuple[float, float]:
    """Wall and device seconds of a step with `batch` sequences, around `context` tokens long."""
    instance = served.instance()
    options = {"temperature": 0.0, **sampling}
    for i in range(batch):
        ids = prompt(context - steps // 2, i)
        instance.add(Sequence(f"{batch}-{i}", 0, ids, SamplingParams(4 * steps, seed=i, **options)))
    while instance.stats.waiting or instance.stats.generated_tokens < batch * 2:
        instance.step()
    for _ in range(5):
        instance.step()
    instance.launch()
    device, began = instance.device_seconds, time.perf_counter()
    for _ in range(steps):
        instance.launch()
        instance.collect()
        instance.news()
    wall = (time.perf_counter() - began) / steps
    busy = (instance.device_seconds - device) / steps
    instance.close("measured")
    return wall, busy


def prefill_rows(served: Served, limits: Limits, targets: Many[float] | None = None, like: Many[Row] = ()) -> list[Row]:
    """From a request's arrival at an idle instance to its first token, and the GPU's part of it.

    targets in ms, one for each of PREFILLS.
    """
    matrices = (served.placed.step_bytes - served.placed.layout.place("lm_head.weight").nbytes) // 2
    rows: list[Row] = []
    device: list[Row] = []
    for index, tokens in enumerate(PREFILLS):
        times, busy = [], []
        for repeat in range(9):
            instance = served.instance()
            instance.add(request(tokens, repeat, 2))
            began = time.perf_counter()
            while not any(output.token_ids for output in instance.step()):
                pass
            times.append(time.perf_counter() - began)
            busy.append(instance.device_seconds)
            instance.close("measured")
        products, weights = 2 * matrices * tokens / limits.flops_per_s, served.placed.step_bytes / limits.bytes_per_s
        limit = max(products, weights) * 1e3
        source = "matrix products" if products > weights else "weights over the bus"
        target = allowed(index, limit, targets, like)
        what = f"{served.name}: prefill {tokens}"
        rows.append(Row(what, median(times) * 1e3, "ms", limit, source, target))
        device.append(Row(f"{what}, on the GPU", median(busy) * 1e3, "ms", rows[-1].value, "wall time"))
    return rows + device


def with_floors(served: Served, steps: Many[Row], prefills: Many[Row]) -> list[Row]:
    """The rows of step_rows and prefill_rows, and the floors, which tell which of their targets are out of reach."""
    floors = floor_rows(served.placed, served.name, DECODES, PREFILLS)
    decodes, mixed = len(DECODES), len(PREFILLS)
    return [
        *beside_floors(steps[:decodes], floors[:decodes]),
        *steps[decodes:],
        *beside_floors(prefills[:mixed], floors[decodes:]),
        *prefills[mixed:],
        *floors,
    ]


def throughput(served: Served) -> list[Row]:
    """64 requests of 512 tokens and 128 answered, submitted at once."""
    rates = []
    for repeat in range(3):
        listener = Listener(64)
        engine = EngineLoop(listener.on_step, listener.on_failure)
        instance = served.instance()
        engine.activate(instance)
        engine.start()
        began = time.perf_counter()
        for i in range(64):
            engine.submit(instance.id, request(512, 1000 * repeat + i, 128))
        listener.ended.wait()
        rates.append(64 * 128 / (time.perf_counter() - began))
        engine.stop()
        if listener.failure:
            raise listener.failure
    return [Row(f"{served.name}: 64 requests of 512 + 128 at once", median(rates), "tokens/s", None, None, 3500)]


def together(models: list[Served]) -> list[Row]:
    """Four instances at once, against what each would do with a quarter of the time."""
    alone = [shared_rate([model]) for model in models]
    rate = shared_rate(models)
    fair = sum(alone) / len(alone)
    return [
        Row("1B: four instances together, 16 requests each", rate, "tokens/s", fair, "mean of them alone", 0.9 * fair)
    ]


def shared_rate(models: list[Served]) -> float:
    """Tokens per second of instances decoding 16 sequences each."""
    listener = Listener(16 * len(models))
    engine = EngineLoop(listener.on_step, listener.on_failure)
    for model in models:
        instance = model.instance()
        engine.activate(instance)
        for i in range(16):
            engine.submit(instance.id, request(256, i, 256))
    began = time.perf_counter()
    engine.start()
    listener.ended.wait()
    seconds = time.perf_counter() - began
    engine.stop()
    if listener.failure:
        raise listener.failure
    return 16 * 256 * len(models) / seconds


def memory_rows(backend: CudaBackend) -> list[Row]:
    """What torch holds outside the arena, after serving."""
    held = backend.outside.held / 1e9
    return [
        Row(
            "outside the arena: held by torch",
            held,
            "GB",
            WORKSPACE_BYTES / 1e9,
            "workspace_bytes",
            WORKSPACE_BYTES / 1e9,
        ),
        Row("outside the arena: grown while serving", backend.outside.grown / 1e9, "GB", None, None, 0),
    ]


def transformers_rows(ours: Row) -> list[Row]:
    """transformers on the same shape: eager, and its continuous batching."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(llama_8b(), dtype=torch.bfloat16, attn_implementation="sdpa")
    model = model.to_empty(device=DEVICE).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02)
    # Its frequencies are computed when it is made, which the meta device does not do.
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(DEVICE)
    rows = []
    with torch.inference_mode():
        for tokens in (128, 1024):
            ids = torch.randint(5, VOCABULARY, (1, tokens), device=DEVICE)
            seconds = gpu_time(lambda ids=ids: model(ids, use_cache=False, logits_to_keep=1), 7)  # type: ignore[misc]
            rows.append(Row(f"peer: transformers eager, prefill {tokens}", seconds * 1e3, "ms"))
    config = GenerationConfig(max_new_tokens=128, do_sample=False, eos_token_id=-1, pad_token_id=0)
    model.set_attn_implementation("paged|sdpa")
    began = time.perf_counter()
    answers = model.generate_batch(
        inputs=[prompt(512, i) for i in range(64)], generation_config=config, progress_bar=False
    )
    tokens = sum(len(answer.generated_tokens) for answer in answers.values())
    rate = tokens / (time.perf_counter() - began)
    rows.append(Row("peer: transformers' continuous batching, the same 64 requests", rate, "tokens/s"))
    rows.append(Row("8B: the same against it", ours.value, "tokens/s", rate, "transformers, this run", 9 * rate))
    return rows


if __name__ == "__main__":
    main()
