"""One run: a cluster, models, requests and a policy in, results out."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from simulator.capacity import carries
from simulator.clock import Clock
from simulator.cluster import Cluster
from simulator.control import Controller
from simulator.engine import Job
from simulator.forecasts import Forecasts
from simulator.policies.base import Future, Policy
from simulator.replica import ModelState, Replica
from simulator.requests import Listener
from simulator.results import Floats, Ints, Results, Wakes
from simulator.spec import ClusterSpec, ModelSpec, Settings, check
from warmserve.traces import Request

_PROGRESS_EVERY = 5000  # arrivals


def simulate(
    cluster: ClusterSpec,
    models: Sequence[ModelSpec],
    requests: Iterable[Request],
    policy: Policy,
    *,
    settings: Settings | None = None,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> Results:
    """Runs `requests`, in order of time, through the cluster. `progress` is told the share of arrivals done, 0 to 1.

    The same arguments give the same results, but for the real seconds in them. Raises ImpossibleError where the cluster
    cannot run a model, and ValueError where the requests are out of order, of an unknown model or longer than its
    context.
    """
    settings = settings or Settings()
    check(cluster, models)
    began = time.perf_counter()
    run = _Run(cluster, models, _Columns(models, requests), policy, settings, seed)
    gc.freeze()  # a million requests need not be looked at again and again
    try:
        run.go(progress or (lambda share: None))
    finally:
        gc.unfreeze()
    return run.results(time.perf_counter() - began)


class _Columns:
    """Requests as arrays."""

    def __init__(self, models: Sequence[ModelSpec], requests: Iterable[Request]) -> None:
        known = {model.name: index for index, model in enumerate(models)}
        times: list[float] = []
        model: list[int] = []
        prompt: list[int] = []
        output: list[int] = []
        for request in requests:
            if request.model not in known:
                names = ", ".join(list(known)[:5])
                raise ValueError(f"request {len(times) + 1} is for {request.model!r}, which is not among {names} ...")
            times.append(request.time_s)
            model.append(known[request.model])
            prompt.append(max(1, request.prompt_tokens))
            output.append(max(1, request.output_tokens))
        self.time_s: Floats = np.array(times, dtype=np.float64)
        self.model: Ints = np.array(model, dtype=np.int64)
        self.prompt: Ints = np.array(prompt, dtype=np.int64)
        self.output: Ints = np.array(output, dtype=np.int64)
        if not times:
            raise ValueError("there are no requests")
        backwards = np.flatnonzero(np.diff(self.time_s) < 0)
        if backwards.size:
            first = int(backwards[0]) + 2
            raise ValueError(f"requests must be in order of time; number {first} arrives before the one before it")
        limits = np.array([spec.context_tokens for spec in models])
        long = np.flatnonzero(self.prompt + self.output > limits[self.model])
        if long.size:
            first = int(long[0])
            name = models[int(self.model[first])].name
            raise ValueError(
                f"request {first + 1} has {self.prompt[first]} + {self.output[first]} tokens; the context of {name} "
                f"holds {limits[self.model[first]]} ({long.size} requests are longer than their model's)"
            )

    def means(self, model: int) -> tuple[float, float]:
        """Mean tokens of a model's prompts and answers; some figure where it has no requests."""
        own = self.model == model
        if not own.any():
            return 512.0, 128.0
        return float(self.prompt[own].mean()), float(self.output[own].mean())


class _Run(Listener):
    def __init__(
        self,
        cluster: ClusterSpec,
        models: Sequence[ModelSpec],
        columns: _Columns,
        policy: Policy,
        settings: Settings,
        seed: int,
    ) -> None:
        self._columns = columns
        self._policy = policy
        self._settings = settings
        self._seed = seed
        self._clock = Clock(float(columns.time_s[0]) - settings.warmup_s)
        self._models = [self._deploy(cluster, spec, index) for index, spec in enumerate(models)]
        self._cluster = Cluster(
            self._clock,
            cluster,
            self._models,
            settings,
            start_s=policy.start_s,
            lends=policy.lends,
            seed=seed,
            news=self,
        )
        for model in self._models:
            nodes = self._cluster.nodes.values()
            model.load_s = min(
                loads.seconds(model, loads.tier(model, self._cluster.groups(model.spec.tp)[0])) for loads in nodes
            )
        self._forecasts = Forecasts(settings.forecasting, self._models, self._clock.now)
        self._meters = self._forecasts.meters
        count = len(columns.time_s)
        self._first = [float("inf")] * count
        self._finished = [float("inf")] * count
        self._taken = [float("inf")] * count
        self._begun = [float("inf")] * count
        self._short: set[int] = set()
        self._found = [0] * count
        self._open = count  # requests that have not ended
        self._failed = 0

    def _deploy(self, cluster: ClusterSpec, spec: ModelSpec, index: int) -> ModelState:
        cost = self._settings.cost.steps(spec)
        prompt, output = self._columns.means(index)
        carried = carries(cluster, spec, cost, prompt, output)
        return ModelState(
            spec,
            index,
            cost,
            shard_pages=spec.shard_pages(cluster.page_bytes),
            tokens_per_page=spec.tokens_per_page(cluster.page_bytes),
            capacity=carried.capacity,
            most=carried.most,
            service_s=carried.service_s,
            tokens=prompt + output,
        )

    def go(self, progress: Callable[[float], None]) -> None:
        """Runs to the end."""
        clock, columns = self._clock, self._columns
        service = np.array([model.service_s for model in self._models])[columns.model]
        self._policy.begin(self._cluster, Future(columns.time_s, columns.model, service))
        self._cluster.kv_pages = self._policy.kv_pages
        first_end = self._forecasts.begin(float(columns.time_s[0]), clock.now)
        clock.at(first_end, self._window_ended)
        self._controller = Controller(clock, self._cluster, self._policy, self._settings)
        hop = self._settings.delays.hop_s
        times = (columns.time_s + hop).tolist()
        model, prompt, output = columns.model.tolist(), columns.prompt.tolist(), columns.output.tolist()
        end = times[-1] + self._settings.drain_s
        index, count = 0, len(times)
        due_first = times[0]
        while self._open:
            due = clock.next_due
            if due_first <= due:
                clock.now = due_first
                if not index:
                    self._cluster.begin_accounts()
                self._arrive(Job(index, model[index], prompt[index], output[index], due_first))
                index += 1
                due_first = times[index] if index < count else float("inf")
                if index % _PROGRESS_EVERY == 0:
                    progress(index / count)
            elif due > end:
                clock.now = end
                break
            else:
                clock.step()
        self._cluster.settle_accounts()
        progress(1.0)

    def _arrive(self, job: Job) -> None:
        model = self._models[job.model]
        self._meters[job.model].arrived(job, self._clock.now)
        self._found[job.index] = self._cluster.requests.arrived(model, job)
        if model.queue:
            if model.instances:
                self._controller.crowded()
            else:
                self._controller.need(model)

    def _window_ended(self) -> None:
        self._forecasts.window_ended(self._clock.now)
        self._clock.at(self._clock.now + self._settings.forecasting.window_s, self._window_ended)

    # News from the cluster

    def first_token(self, job: Job) -> None:
        """See Listener."""
        self._first[job.index] = self._clock.now
        self._taken[job.index] = job.taken
        self._begun[job.index] = job.begun
        if job.short:
            self._short.add(job.index)

    def finished(self, job: Job) -> None:
        """See Listener."""
        self._finished[job.index] = self._clock.now
        self._meters[job.model].ended(job, self._clock.now)
        self._open -= 1

    def failed(self, job: Job) -> None:
        """See Listener."""
        self._first[job.index] = float("inf")
        self._meters[job.model].ended(job, self._clock.now)
        self._open -= 1

    def changed(self, replica: Replica) -> None:
        """See Listener."""
        self._controller.changed()
        if replica.model.queue and not replica.model.instances:
            self._controller.need(replica.model)

    def results(self, wall_seconds: float) -> Results:
        """What came of it."""
        columns, delays, models = self._columns, self._settings.delays, self._models
        finished = np.array(self._finished) + delays.reply_s
        first = np.array(self._first) + delays.reply_s
        first[~np.isfinite(finished)] = np.inf  # cut off in the middle
        served = finished[np.isfinite(finished)]
        end = float(served.max()) if served.size else self._clock.now
        unloaded_ttft, unloaded_tpot = self._unloaded()
        wakes = [model.wakes for model in models]
        return Results(
            policy=self._policy.name,
            models=[model.name for model in models],
            duration_s=end - float(columns.time_s[0]),
            gpus=self._cluster.spec.gpus,
            model=columns.model,
            arrival_s=columns.time_s,
            ttft_s=first - columns.time_s,
            finished_s=finished,
            prompt_tokens=columns.prompt,
            output_tokens=columns.output,
            found=np.array(self._found, dtype=np.int64),
            taken_s=np.array(self._taken),
            begun_s=np.array(self._begun),
            short=np.isin(np.arange(len(self._first)), list(self._short)),
            unloaded_ttft_s=unloaded_ttft,
            unloaded_tpot_s=unloaded_tpot,
            busy_gpu_s=np.array([model.busy_gpu_s for model in models]),
            active_gpu_s=np.array([model.active_gpu_s for model in models]),
            resident_gpu_s=np.array([model.resident_gpu_s for model in models]),
            wakes=Wakes(sum(w.warm for w in wakes), sum(w.partial for w in wakes), sum(w.cold for w in wakes)),
            wakes_by_model=wakes,
            copied_bytes=dict(self._cluster.copied),
            wasted_bytes=self._cluster.arenas.wasted_bytes,
            preemptions=self._cluster.counts.preemptions,
            drains=self._cluster.counts.drains,
            plans=self._controller.plans,
            plan_seconds=self._controller.plan_seconds,
            wall_seconds=wall_seconds,
            seed=self._seed,
        )

    def _unloaded(self) -> tuple[Floats, Floats]:
        """Of each request: its time to the first token and per further token alone on an idle instance."""
        columns, delays, budget = self._columns, self._settings.delays, self._settings.prefill_budget
        steps = [model.cost for model in self._models]

        def of(name: str) -> Floats:
            return np.array([getattr(cost, name) for cost in steps])[columns.model]

        chunks = np.ceil(columns.prompt / budget)
        prompt = chunks * of("base") + of("prefill_base") + columns.prompt * of("per_prompt_token")
        prompt += columns.prompt.astype(np.float64) ** 2 * of("per_prompt_square")
        context = columns.prompt + columns.output / 2
        token = of("base") + of("per_sequence") + context * of("per_context")
        return prompt + delays.hop_s + delays.reply_s, token
