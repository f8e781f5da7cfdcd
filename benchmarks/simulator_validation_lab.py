"""What `python -m benchmarks.simulator_validation` measures of a running cluster, one request or batch at a time."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from launcher.replay import Outcome, replay
from services.placer.snapshot import Rules
from simulator.cost import CostModel, Measurement, fit
from simulator.spec import Delays, ModelSpec
from warmserve import AsyncClient
from warmserve.cluster.keys import Keys
from warmserve.cluster.store import Store, decode
from warmserve.traces import Request
from warmserve.v1 import cluster_pb2

PROMPTS = (8, 64, 160)
BATCHES = (1, 4, 8)
REPEATS = 5
WAKES = 12
TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Machine:
    """What was measured."""

    cost: CostModel
    fit_error: float  # mean of the relative errors' sizes
    wake_s: tuple[float, float]  # from the order until requests are taken; lower and upper quartile
    load_gbps: float

    def slower(self, prompts: float, tokens: float) -> Machine:
        """What prompts cost takes `prompts` times as long, what each step costs `tokens`. Wakes and loads are as they
        were: others worked while they were measured, too."""
        cost = self.cost
        cost = replace(
            cost,
            per_layer=tokens * cost.per_layer,
            per_weight_byte=tokens * cost.per_weight_byte,
            per_sequence=tokens * cost.per_sequence,
            per_kv_byte=tokens * cost.per_kv_byte,
            per_operation=prompts * cost.per_operation,
            per_activation_byte=prompts * cost.per_activation_byte,
            per_attention_operation=prompts * cost.per_attention_operation,
            per_prefill_layer=prompts * cost.per_prefill_layer,
        )
        return replace(self, cost=cost)


def machine_of(
    models: Sequence[ModelSpec], steps: Sequence[Measurement], wakes_s: Sequence[float], loads_s: Sequence[float]
) -> Machine:
    """What the measurements say. `wakes_s`: how much later requests to models without an instance were taken than those
    to active ones. `loads_s`: what agents took to load a whole replica."""
    cost, delays = fit(steps), Delays()
    # What is in the way drains first, which the simulator counts too; the load goes on while the instance opens.
    other_s = delays.ask_s + delays.replan_s
    quarters = [max(0.0, quarter - other_s) for quarter in statistics.quantiles(wakes_s, n=4)]
    shard = statistics.mean(model.shard_bytes for model in models)
    errors = [abs(error) for error in cost.error(steps)]
    load_gbps = shard / min(loads_s) / 1e9  # others have built the model too
    return Machine(cost, statistics.mean(errors), (quarters[0], quarters[2]), load_gbps)


class Lab:
    """Measures a running cluster, as a client sees it."""

    def __init__(self, address: str, etcd_address: str, models: Sequence[ModelSpec]) -> None:
        self._address = address
        self._etcd_address = etcd_address
        self._models = models
        self._seed = 0
        self._hop_s: dict[str, float] = {}  # seconds until an active instance takes a request

    async def steps(self) -> list[Measurement]:
        """Of all models, each active and alone."""
        return [step for model in self._models for step in await self._steps(model)]

    async def wakes(self) -> list[float]:
        """Seconds until requests to models without an instance are taken, beyond those to active ones.

        Idle instances stay until somebody wants their pages, so what is in the way drains first, as in the replay.
        """
        wakes_s = [await self._wake() for _ in range(len(self._models) + WAKES)]
        return wakes_s[len(self._models) :]  # the first ones also build models

    async def loads(self) -> list[float]:
        """Seconds that agents took for their last load of each model from the beginning."""
        store = Store([self._etcd_address])
        try:
            found, _ = await store.snapshot(Keys().residencies())
        finally:
            await store.close()
        records = [decode(item.value, cluster_pb2.AgentResidency) for item in found if item.value is not None]
        return [shard.cold_load_ms / 1000 for record in records for shard in record.shards if shard.cold_load_ms]

    async def _steps(self, model: ModelSpec) -> list[Measurement]:
        steps = []
        asked = [(prompt, await self._active(model, prompt, 1, REPEATS, 1)) for prompt in PROMPTS]
        # The least: what an agent says of having taken a request may come no sooner than its first token.
        hop_s = self._hop_s[model.name] = min(one.queue_s for _, outcomes in asked for one in outcomes)
        for prompt, outcomes in asked:
            taken = statistics.median(one.router_ttft_s - hop_s for one in outcomes)
            steps.append(Measurement(model, taken, prefill=prompt))
        for batch in BATCHES:
            outcomes = await self._active(model, PROMPTS[0], 40, 2, batch)
            token = statistics.median((one.total_s - one.ttft_s) / (one.output_tokens - 1) for one in outcomes)
            steps.append(Measurement(model, token, decodes=batch, context=PROMPTS[0] + 20))
        return steps

    async def _active(self, model: ModelSpec, prompt: int, output: int, repeats: int, batch: int) -> list[Outcome]:
        """Outcomes of `repeats` batches that found an active instance."""
        outcomes: list[Outcome] = []
        while len(outcomes) < repeats * batch:
            found = await self._ask([Request(0.0, model.name, prompt, output)] * batch)
            if all(one.found_state == "active" for one in found):
                outcomes += found
        return outcomes

    async def _wake(self) -> float:
        await asyncio.sleep(2 * Rules().min_stay_s)  # then instances may go
        name = await self._inactive()
        (outcome,) = await self._ask([Request(0.0, name, PROMPTS[0], 1)])
        return max(0.0, outcome.queue_s - self._hop_s[name])

    async def _inactive(self) -> str:
        """The name of a model without an instance: agents have room for all models but one."""
        async with AsyncClient(self._address) as client, asyncio.timeout(TIMEOUT_S):
            while True:
                for info in await client.models():
                    if info.state in ("warm", "cold"):
                        return info.name
                await asyncio.sleep(0.1)

    async def _ask(self, requests: Sequence[Request]) -> list[Outcome]:
        self._seed += 1  # no prompt twice: its beginning would be remembered
        outcomes = await replay(
            self._address,
            requests,
            timeout_s=TIMEOUT_S,
            seed=self._seed,
            on_sent=lambda request: None,
            on_outcome=lambda outcome: None,
        )
        if lost := [one.error for one in outcomes if one.lost]:
            raise RuntimeError(f"a request was lost while measuring: {lost[0]}")
        return outcomes
