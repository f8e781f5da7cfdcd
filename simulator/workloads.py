"""What a setting is made of: models, a cluster, who asks when, and what a forecaster had recorded before."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from simulator.arrivals import Floats, Integers, load_windows
from simulator.spec import ClusterSpec, ModelSpec
from warmserve.traces import Request

TYPICAL_PREFILL_TOKENS_PER_S = 30_000.0
TYPICAL_TOKEN_S = 0.012


def typical_time_s(prompt_tokens: Integers, output_tokens: Integers) -> Floats:
    """Seconds that requests are in progress on an instance that is neither idle nor full: an H100 with an 8B reads
    30,000 tokens/s of prompts and makes a token in 6 to 10 ms (benchmarks/results/engine-h100.json). Only histories
    before a run are made with it; in a run, loads are what the simulated routers count."""
    return np.asarray(prompt_tokens / TYPICAL_PREFILL_TOKENS_PER_S + output_tokens * TYPICAL_TOKEN_S)


@dataclass(frozen=True)
class Traffic:
    """Requests as columns, in order of time. A million of them are made in a moment, and read one by one."""

    models: tuple[str, ...]
    times_s: Floats
    model: Integers  # index into `models`
    prompt_tokens: Integers
    output_tokens: Integers

    def __len__(self) -> int:
        return len(self.times_s)

    def __iter__(self) -> Iterator[Request]:
        columns = (self.times_s, self.model, self.prompt_tokens, self.output_tokens)
        for time_s, model, prompt, output in zip(*(column.tolist() for column in columns), strict=True):
            yield Request(time_s, self.models[model], prompt, output)

    def between(self, begin_s: float, end_s: float) -> Traffic:
        """Those that arrive in [begin_s, end_s), with `begin_s` as the new zero."""
        part = slice(*np.searchsorted(self.times_s, (begin_s, end_s)))
        return replace(
            self,
            times_s=self.times_s[part] - begin_s,
            model=self.model[part],
            prompt_tokens=self.prompt_tokens[part],
            output_tokens=self.output_tokens[part],
        )

    def history(self, window_s: float, end_s: float) -> dict[str, Floats]:
        """What routers would have counted of each model from 0 to `end_s`: (windows, 5), the last row ending there.

        Columns as in `arrivals.load_windows`. A beginning shorter than a window is left out.
        """
        windows = int(end_s / window_s)
        begin_s = end_s - windows * window_s
        counted = {}
        for index, name in enumerate(self.models):
            mine = (self.model == index) & (self.times_s >= begin_s) & (self.times_s < end_s)
            starts, prompt, output = self.times_s[mine] - begin_s, self.prompt_tokens[mine], self.output_tokens[mine]
            ends = starts + typical_time_s(prompt, output)
            counted[name] = load_windows(starts, ends, prompt, output, window_s, windows)
        return counted


@dataclass(frozen=True)
class Workload:
    """One setting."""

    name: str
    says: str  # what it is and where its traffic is from, in a sentence or two
    cluster: ClusterSpec
    models: tuple[ModelSpec, ...]
    traffic: Traffic
    duration_s: float
    seed: int
    window_s: float  # of the forecasts
    season_windows: int  # windows after which traffic may repeat itself
    history: Mapping[str, Floats] = field(default_factory=dict)
    """What was recorded before time 0, by model: (windows, 5), the last row ending at 0; columns as in
    `arrivals.load_windows`, NaN where nothing was recorded."""
    silent: tuple[float, float] | None = None  # from when to when no forecasts are made

    @property
    def rate_per_s(self) -> float:
        """Requests per second on average."""
        return len(self.traffic) / self.duration_s


def traffic_of(models: Sequence[ModelSpec], parts: Sequence[tuple[Floats, Integers, Integers]]) -> Traffic:
    """The traffic of `models`, from times, prompts and outputs of each. Equal times keep the models' order."""
    times = np.concatenate([part[0] for part in parts])
    index = np.repeat(np.arange(len(parts)), [len(part[0]) for part in parts])
    order = np.lexsort((index, times))
    prompts, outputs = (np.concatenate([part[column] for part in parts])[order] for column in (1, 2))
    return Traffic(tuple(model.name for model in models), times[order], index[order], prompts, outputs)


def traffic_from(requests: Iterable[Request], models: Sequence[str] = ()) -> Traffic:
    """The same from requests in any order, times as they are; models in the order given, then as they first occur."""
    index = {name: at for at, name in enumerate(models)}
    rows = [
        (request.time_s, index.setdefault(request.model, len(index)), request.prompt_tokens, request.output_tokens)
        for request in requests
    ]
    columns = list(zip(*rows, strict=True)) if rows else [(), (), (), ()]
    times = np.array(columns[0], dtype=float)
    order = np.argsort(times, kind="stable")
    model, prompt, output = (np.array(column, dtype=np.int64)[order] for column in columns[1:])
    return Traffic(tuple(index), times[order], model, prompt, output)
