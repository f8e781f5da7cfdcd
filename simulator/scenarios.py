"""Settings to compare policies in: the paper's, sixty fine-tunes, a flash crowd, a silent forecaster, and traffic of
our own making for people without traces. Each follows from its seed, and from public traces where it says so."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from simulator import servegen
from simulator.arrivals import Floats, Gaps, Integers, Lengths, counts_of, in_window, rotated, thinned
from simulator.spec import ClusterSpec, ModelSpec, llama2_7b, llama2_13b, llama2_70b
from simulator.workloads import Traffic, Workload, traffic_of
from warmserve.traces import read_requests

Columns = tuple[Floats, Integers, Integers]  # times, prompt tokens, output tokens

DAY_S = 86_400.0
TWO_NODES = ClusterSpec(nodes=2, gpus_per_node=8, host_bytes=2_000_000_000_000)  # as DGX H100s have


# The paper's setting

PAPER_MODELS = (  # the more popular the smaller; each service asks a small and a large model
    (llama2_7b("7b-chat"), "conv"),
    (llama2_7b("7b-code"), "code"),
    (llama2_13b("13b-chat"), "conv"),
    (llama2_70b("70b-code"), "code"),
)
POPULARITY_EXPONENT = 1.0
LEARN_SHARE = 1 / 3
PAPER_WINDOW_S = 10.0
_AZURE_S = 1800.0


def paper(traces: Path, rate_per_s: float, seed: int) -> Workload:
    """Azure's conversations and code completions of one half-hour over four models, `rate_per_s` in all.

    A model's share of the rate is its rank to the power of -POPULARITY_EXPONENT. Each model has the trace of its
    service, begun at a point of its own that the seed draws (the trace goes round). Where a model's rate is below its
    trace's, requests are left out at random. Where any model's is above, time is compressed, by one factor for all
    models: bursts keep their shape, follow one another faster, and the whole takes that much less time. Lengths are
    the trace's, cut to Llama-2's context of 4,096 tokens.

    There are no earlier days to learn from: the first third of the trace is what the forecaster knows at time 0.
    """
    random = np.random.default_rng(seed)
    services = {name: _azure(traces / f"azure_2023_{name}.csv.gz") for name in ("conv", "code")}
    popularity = np.arange(1, len(PAPER_MODELS) + 1) ** -POPULARITY_EXPONENT
    rates = rate_per_s * popularity / popularity.sum()
    usual = np.array([len(services[service][0]) / _AZURE_S for _, service in PAPER_MODELS])
    faster = max(1.0, float((rates / usual).max()))
    parts: list[Columns] = []
    for (_, service), share in zip(PAPER_MODELS, rates / usual / faster, strict=True):
        times, prompt, output = services[service]
        times, order = rotated(times, _AZURE_S, random.uniform(0, _AZURE_S))
        stays = thinned(times, share, random)
        parts.append((times[stays] / faster, prompt[order][stays], output[order][stays]))
    models = tuple(model for model, _ in PAPER_MODELS)
    traffic, length_s = traffic_of(models, parts), _AZURE_S / faster
    learnt_s = round(LEARN_SHARE * length_s / PAPER_WINDOW_S) * PAPER_WINDOW_S
    return Workload(
        name=f"paper, {rate_per_s:g}/s",
        says="Azure's conversation and code traces over Llama-2 7B twice, 13B and 70B; "
        + (f"time compressed {faster:.2f} times" if faster > 1 else "thinned"),
        cluster=TWO_NODES,
        models=models,
        traffic=traffic.between(learnt_s, length_s),
        duration_s=length_s - learnt_s,
        seed=seed,
        window_s=PAPER_WINDOW_S,
        season_windows=round(_AZURE_S / PAPER_WINDOW_S),  # none that it could have seen
        history=traffic.history(PAPER_WINDOW_S, learnt_s),
    )


@functools.cache
def _azure(file: Path) -> Columns:
    """Times since the trace's begin and token counts, cut to the context: of the answer at most half of it."""
    requests = list(read_requests(file))
    context = PAPER_MODELS[0][0].context_tokens
    times = np.array([request.time_s for request in requests])
    output = np.array([max(1, min(request.output_tokens, context // 2)) for request in requests], dtype=np.int64)
    prompt = np.array([max(1, request.prompt_tokens) for request in requests], dtype=np.int64)
    return times - times[0], np.minimum(prompt, context - output), output


# Sixty fine-tunes

Size = tuple[str, int, int, int, int, int, int]
FINE_TUNES: tuple[Size, ...] = (
    # How many, parameters, layers, width, KV heads x head size, TP degree: shapes of Llama 3.2 1B and 3B, Llama 3.1 8B,
    # Qwen2.5 14B and 32B. 60 models with 1.44 TB of weights, where 16 arenas have 1.15 TB for weights and KV.
    ("1b", 8, 1_235_814_400, 16, 2048, 512, 1),
    ("3b", 10, 3_212_749_824, 28, 3072, 1024, 1),
    ("8b", 18, 8_030_261_248, 32, 4096, 1024, 1),
    ("14b", 14, 14_770_033_664, 48, 5120, 1024, 1),
    ("32b", 10, 32_763_876_352, 64, 5120, 1024, 2),
)
SMALL_FINE_TUNES: tuple[Size, ...] = tuple(  # 0.73 TB, so that all sixty fit at once, and KV beside them
    (size[0], count, *size[2:]) for size, count in zip(FINE_TUNES, (16, 20, 16, 6, 2), strict=True)
)
FIRST_TEST_DAY = 8
FINE_TUNES_PER_S = 11.6  # about a million requests a day


def fine_tuned(sizes: Sequence[Size] = FINE_TUNES) -> tuple[ModelSpec, ...]:
    """The sixty models. Sizes are dealt in turn, so that the popular ones are of every size."""
    left = {label: count for label, count, *_ in sizes}
    models: list[ModelSpec] = []
    while any(left.values()):
        for label, _, parameters, layers, width, kv_width, tp in sizes:
            if left[label]:
                left[label] -= 1
                kv_bytes = 2 * layers * kv_width * 2  # keys and values of all layers in 16 bits
                models.append(ModelSpec(f"ft{len(models):02d}-{label}", parameters, layers, kv_bytes, tp, width))
    return tuple(models)


def fine_tunes(
    traces: Path,
    seed: int,
    *,
    rate_per_s: float = FINE_TUNES_PER_S,
    first_day: int = FIRST_TEST_DAY,
    from_hour: float = 0.0,
    hours: float = 72.0,
    window_s: float = servegen.WINDOW_S,
    sizes: Sequence[Size] = FINE_TUNES,
) -> Workload:
    """ServeGen's sixty busiest clients of three production models as sixty fine-tunes on 16 GPUs.

    From `from_hour` of `first_day` on; all time before it is the forecaster's history. All rates are multiplied by one
    factor, so that the sixty together had `rate_per_s` over the days before; windows keep their fitted shape of gaps,
    as ServeGen's own generator scales them, so bursts within a window stay as bursty. Which sixty is chosen by the days
    before, too. A window in which the collection failed has the rate of the last one that was collected. Lengths are
    drawn from their model's published quantiles, answers at most half of a context of 8,192 tokens.
    """
    random = np.random.default_rng(seed)
    models = fine_tuned(sizes)
    past_windows = first_day * servegen.DAY_WINDOWS
    begin_windows = past_windows + round(from_hour * 3600 / servegen.WINDOW_S)
    windows = begin_windows + round(hours * 3600 / servegen.WINDOW_S)
    clients = servegen.busiest(_clients(traces / "servegen_windows.csv.gz"), len(models), past_windows)
    lengths = servegen.read_lengths(traces / "servegen_lengths.csv.gz")
    factor = rate_per_s / sum(float(np.nanmean(client.rates[:past_windows])) for client in clients)
    if windows > len(clients[0].rates):
        raise ValueError(f"the trace ends after {len(clients[0].rates) // servegen.DAY_WINDOWS} days")
    parts = []
    for model, client in zip(models, clients, strict=True):
        counts = counts_of(_filled(client.rates[:windows]) * factor, servegen.WINDOW_S, random)
        times = _times(counts, client.gaps, random)
        drawn = [lengths[client.model, field].draw(len(times), random) for field in ("input_tokens", "output_tokens")]
        parts.append((times, *_within(drawn[0], drawn[1], model.context_tokens)))
    begin_s = begin_windows * servegen.WINDOW_S
    everything = traffic_of(models, parts)
    history = everything.history(window_s, begin_s)
    if window_s == servegen.WINDOW_S:  # other windows would blur where the gaps are
        for model, client in zip(models, clients, strict=True):
            history[model.name][np.isnan(client.rates[:begin_windows])] = np.nan
    return Workload(
        name="sixty fine-tunes",
        says=f"ServeGen's sixty busiest clients from day {first_day} on as models of 1B to 32B; rates x {factor:.4g}",
        cluster=TWO_NODES,
        models=models,
        traffic=everything.between(begin_s, windows * servegen.WINDOW_S),
        duration_s=hours * 3600,
        seed=seed,
        window_s=window_s,
        season_windows=round(DAY_S / window_s),
        history=history,
    )


@functools.cache
def _clients(file: Path) -> list[servegen.Client]:
    return servegen.read_clients(file)


def _filled(rates: Floats) -> Floats:
    """Rates with the last known one in each gap, 0 before the first."""
    known = ~np.isnan(rates)
    last = np.maximum.accumulate(np.where(known, np.arange(len(rates)), 0))
    return np.nan_to_num(rates[last])


def _times(counts: Integers, gaps: Sequence[Gaps], random: np.random.Generator) -> Floats:
    times = [
        window * servegen.WINDOW_S + in_window(int(counts[window]), servegen.WINDOW_S, gaps[window], random)
        for window in np.flatnonzero(counts).tolist()
    ]
    return np.concatenate(times) if times else np.empty(0)


def _within(prompt: Integers, output: Integers, context: int) -> tuple[Integers, Integers]:
    """Lengths cut to a context, of which answers may take half."""
    output = np.minimum(output, context // 2)
    return np.minimum(prompt, context - output), output


# Variations


def flash_crowd(
    base: Workload, model: str, at_s: float, *, rate_per_s: float, ramp_s: float = 60.0, lasts_s: float = 900.0
) -> Workload:
    """`base`, and from `at_s` on a crowd that nobody foresaw: Poisson arrivals at one model that grow over `ramp_s`
    seconds to `rate_per_s`, stay, and end after `lasts_s`; with lengths drawn from that model's own requests."""
    random = np.random.default_rng((base.seed, 1))
    at = base.traffic.models.index(model)
    count = random.poisson(rate_per_s * (lasts_s - ramp_s / 2))
    grown = ramp_s / 2 / (lasts_s - ramp_s / 2)  # the share of them that comes while it grows
    shares = np.sort(random.uniform(size=count))
    times = np.where(
        shares < grown,
        ramp_s * np.sqrt(shares / grown),
        ramp_s + (shares - grown) / (1 - grown) * (lasts_s - ramp_s),
    )
    own = np.flatnonzero(base.traffic.model == at)
    if not len(own):
        raise ValueError(f"{model} has no requests in {base.name!r} to draw lengths from")
    like = own[random.integers(len(own), size=count)]
    old = base.traffic
    all_times = np.concatenate((old.times_s, at_s + times))
    order = np.argsort(all_times, kind="stable")
    crowd = (np.full(count, at), old.prompt_tokens[like], old.output_tokens[like])
    columns = (
        np.concatenate((before, more))[order]
        for before, more in zip((old.model, old.prompt_tokens, old.output_tokens), crowd, strict=True)
    )
    return replace(
        base,
        name=f"{base.name}, flash crowd",
        says=f"{base.says}; {rate_per_s:g} further requests/s for {model} from {at_s:g} s on, for {lasts_s:g} s",
        traffic=Traffic(old.models, all_times[order], *columns),
    )


def silent_forecaster(base: Workload, from_s: float, to_s: float) -> Workload:
    """`base`, but nothing is forecast between these times: planners go on with the last forecasts."""
    return replace(
        base,
        name=f"{base.name}, silent forecaster",
        says=f"{base.says}; no forecasts from {from_s:g} s to {to_s:g} s",
        silent=(from_s, to_s),
    )


# Without traces

_GENERATED_WINDOW_S = 300.0
_PROMPT = Lengths((0.05, 0.5, 0.95, 0.99), (60, 500, 2400, 4000))
_OUTPUT = Lengths((0.05, 0.5, 0.95, 0.99), (10, 130, 500, 900))


def generated(
    models: Sequence[ModelSpec],
    cluster: ClusterSpec,
    seed: int,
    *,
    rate_per_s: float,
    hours: float = 24.0,
    past_days: int = 3,
) -> Workload:
    """Traffic of our own making, like that of production models in shape: for tests, and where there are no traces.

    Popularity falls as 1/rank. Each model has a day of its own (a sine wave of its own phase and depth), times noise
    that lasts for some windows, times bursts: about four a day, three to ten times as much for 5 to 30 minutes.
    Arrivals within a window have gamma gaps with a coefficient of variation of 2; lengths are those of chats.
    """
    random = np.random.default_rng(seed)
    past_s, length_s = past_days * DAY_S, hours * 3600
    windows = round((past_s + length_s) / _GENERATED_WINDOW_S)
    popularity = 1.0 / np.arange(1, len(models) + 1)
    parts = []
    for model, share in zip(models, popularity / popularity.sum(), strict=True):
        rates = rate_per_s * share * _shape(windows, random)
        counts = counts_of(rates, _GENERATED_WINDOW_S, random)
        gaps = Gaps("Gamma", 0.25)
        times = [
            window * _GENERATED_WINDOW_S + in_window(int(counts[window]), _GENERATED_WINDOW_S, gaps, random)
            for window in np.flatnonzero(counts)
        ]
        joined = np.concatenate(times) if times else np.empty(0)
        lengths = _PROMPT.draw(len(joined), random), _OUTPUT.draw(len(joined), random)
        parts.append((joined, *_within(*lengths, model.context_tokens)))
    traffic = traffic_of(models, parts)
    return Workload(
        name="generated",
        says=f"made up: {rate_per_s:g} requests/s over {len(models)} models with days and bursts of their own",
        cluster=cluster,
        models=tuple(models),
        traffic=traffic.between(past_s, past_s + length_s),
        duration_s=length_s,
        seed=seed,
        window_s=_GENERATED_WINDOW_S,
        season_windows=round(DAY_S / _GENERATED_WINDOW_S),
        history=traffic.history(_GENERATED_WINDOW_S, past_s) if past_s else {},
    )


def _shape(windows: int, random: np.random.Generator) -> Floats:
    """A model's rate per window, 1 on average."""
    day = DAY_S / _GENERATED_WINDOW_S
    phase, depth = random.uniform(0, 2 * np.pi), random.uniform(0.3, 0.95)
    wave = 1 + depth * np.sin(2 * np.pi * np.arange(windows) / day + phase)
    steps = random.normal(scale=0.15, size=windows)
    noise = np.zeros(windows)
    for at in range(1, windows):
        noise[at] = 0.9 * noise[at - 1] + steps[at]
    bursts = np.ones(windows)
    for begin in np.flatnonzero(random.uniform(size=windows) < 4 / day):
        bursts[begin : begin + random.integers(1, 7)] *= random.uniform(3, 10)
    shape = wave * np.exp(noise) * bursts
    return np.asarray(shape / shape.mean())
