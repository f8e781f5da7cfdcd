"""What one instance carries, by the cost model: the figures that a running system measures."""

from __future__ import annotations

from dataclasses import dataclass

from simulator.cost import StepCost
from simulator.spec import ClusterSpec, ModelSpec

_SLOWDOWN = 2.5  # of the time per token, which a model without a target of its own may suffer beside others


@dataclass(frozen=True)
class Carries:
    """What an instance carries of requests of mean length."""

    capacity: int  # requests at a time, within the time per token
    most: int  # requests at a time for which there are slots and KV pages
    service_s: float  # how long a request is in progress at half of that


def carries(
    cluster: ClusterSpec, model: ModelSpec, cost: StepCost, prompt_tokens: float, output_tokens: float
) -> Carries:
    """Of a model alone on its GPUs.

    In a step each of b sequences gets a token, and b / output_tokens prompts are read.
    """
    context = prompt_tokens + output_tokens / 2
    prompt_s = cost.prefill(int(prompt_tokens)) - cost.base
    answer = max(output_tokens, 1.0)
    pages = cluster.pages - model.shard_pages(cluster.page_bytes)
    kv_tokens = pages * model.tokens_per_page(cluster.page_bytes)
    limit = model.tpot_s or _SLOWDOWN * cost.decode(1, context)

    def per_token(batch: int) -> float:
        return cost.decode(batch, batch * context) + batch / answer * prompt_s

    most = max(1, min(model.max_batch, int(kv_tokens / (prompt_tokens + output_tokens))))
    capacity = 1
    while capacity < most and per_token(capacity + 1) <= limit:
        capacity += 1
    half = max(1, capacity // 2)
    return Carries(capacity, most, cost.base + prompt_s + answer * per_token(half))
