"""Workloads to compare policies in: the paper's setting, sixty fine-tunes, a flash crowd, a silent forecaster, and
traffic of our own making for people without traces."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from simulator import servegen
from simulator.arrivals import (
    POISSON,
    Floats,
    Gaps,
    Integers,
    Lengths,
    counts_of,
    in_window,
    load_windows,
    merge,
    rotated,
    thinned,
)
from simulator.spec import ClusterSpec, ModelSpec
from simulator.workloads import Traffic, Workload
from warmserve.traces import read_requests

DAY_S = 86_400.0
PAPER_CLUSTER = ClusterSpec(nodes=2, gpus_per_node=8)

Columns = tuple[Floats, Integers, Integers]  # times, prompt tokens, output tokens
ServiceTime = Callable[[ModelSpec, Integers, Integers], Floats]
"""Seconds that requests of these lengths are in progress when nothing hinders them."""


# The paper's setting


def llama2(name: str, size: str) -> ModelSpec:
    """Llama-2 of 7B (TP 1), 13B (TP 2) or 70B (TP 4) in 16 bits; the first two keep keys and values of every head."""
    parameters, layers, kv_width, tp = {
        "7b": (6.738e9, 32, 4096, 1),
        "13b": (13.016e9, 40, 5120, 2),
        "70b": (68.977e9, 80, 1024, 4),
    }[size]
    return ModelSpec(name, parameters=parameters, layers=layers, kv_bytes_per_token=2 * layers * kv_width * 2, tp=tp)


LLAMA2_CONTEXT = 4096
PAPER_MODELS = (
    # The more popular a model the smaller, and each service asks one small and one large model.
    (llama2("7b-chat", "7b"), "conv"),
    (llama2("7b-code", "7b"), "code"),
    (llama2("13b-chat", "13b"), "conv"),
    (llama2("70b-code", "70b"), "code"),
)
POPULARITY_EXPONENT = 1.0
TRACE_S = 1800.0
LEARN_SHARE = 1 / 3


def paper(traces: Path, rate_per_s: float, seed: int, service_time: ServiceTime) -> Workload:
    """Azure's conversations and code completions of one half-hour over four models, `rate_per_s` in all.

    A model's share of the rate falls with its rank as rank ** -POPULARITY_EXPONENT. Each model has the trace of its
    service, begun at a point of its own (drawn from the seed; a trace goes round). Where a model's rate is below its
    trace's, requests are left out at random; where it is above, **time is compressed**, by one factor for all models,
    so that bursts keep their shape and follow one another faster, and the setting takes that much less time. Lengths
    are the trace's, cut to Llama-2's context of 4,096 tokens.

    There are no earlier days to learn from: the first third of the trace is what the forecaster knows at time 0.
    """
    random = np.random.default_rng(seed)
    services = {name: azure(traces / f"azure_2023_{name}.csv.gz") for name in ("conv", "code")}
    popularity = np.arange(1, len(PAPER_MODELS) + 1) ** -POPULARITY_EXPONENT
    rates = rate_per_s * popularity / popularity.sum()
    own = np.array([len(services[service][0]) / TRACE_S for _, service in PAPER_MODELS])
    faster = max(1.0, float((rates / own).max()))
    parts: list[Columns] = []
    for (_, service), rate, usual in zip(PAPER_MODELS, rates, own, strict=True):
        times, prompt, output = services[service]
        times, order = rotated(times, TRACE_S, random.uniform(0, TRACE_S))
        stays = thinned(times, rate / (usual * faster), random)
        parts.append((times[stays] / faster, prompt[order][stays], output[order][stays]))
    models = tuple(model for model, _ in PAPER_MODELS)
    length_s = TRACE_S / faster
    return with_past(
        Workload(
            name=f"paper, {rate_per_s:g}/s",
            says=f"Azure's conversation and code traces over Llama-2 7B twice, 13B and 70B, {rate_per_s:g} requests/s"
            + (f", time compressed {faster:.2f} times" if faster > 1 else ", thinned"),
            cluster=PAPER_CLUSTER,
            models=models,
            traffic=traffic_of(models, parts),
            duration_s=length_s,
            seed=seed,
            window_s=10.0,
            season_windows=math.floor(length_s / 10.0),
        ),
        parts,
        LEARN_SHARE * length_s,
        service_time,
    )


def azure(file: Path) -> Columns:
    """Times since the trace's begin and token counts, cut to Llama-2's context: answers are kept whole."""
    requests = list(read_requests(file))
    times = np.array([request.time_s for request in requests])
    output = np.array([min(request.output_tokens, LLAMA2_CONTEXT // 2) for request in requests], dtype=np.int64)
    prompt = np.array([request.prompt_tokens for request in requests], dtype=np.int64)
    return times - times[0], np.minimum(prompt, LLAMA2_CONTEXT - output), output


# Sixty fine-tunes

FINE_TUNES = 60
SIZES = (
    # How many of the 60, parameters, layers, width of keys (KV heads x head size), TP degree. Shapes of Llama 3.2 1B
    # and 3B, Llama 3.1 8B, Qwen2.5 14B and 32B.
    ("1b", 12, 1.236e9, 16, 512, 1),
    ("3b", 12, 3.213e9, 28, 1024, 1),
    ("8b", 18, 8.030e9, 32, 1024, 1),
    ("14b", 12, 14.770e9, 48, 1024, 1),
    ("32b", 6, 32.764e9, 64, 1024, 2),
)


def fine_tuned() -> tuple[ModelSpec, ...]:
    """Sixty models of five sizes, 1.14 TB of weights in all, dealt in turn, so that popular ones are of every size."""
    left = [[size, count] for size, count in ((size, size[1]) for size in SIZES)]
    models: list[ModelSpec] = []
    while len(models) < FINE_TUNES:
        for entry in left:
            size, count = entry
            if count:
                label, _, parameters, layers, width, tp = size  # type: ignore[misc]
                entry[1] = count - 1  # type: ignore[operator]
                name = f"ft{len(models):02d}-{label}"
                kv = 2 * layers * width * 2
                models.append(ModelSpec(name, parameters=parameters, layers=layers, kv_bytes_per_token=kv, tp=tp))
    return tuple(models)
