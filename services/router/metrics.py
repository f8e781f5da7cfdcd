"""What a router counts for Prometheus. Label `model` is a deployed model's name, or empty."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

from warmserve.v1 import common_pb2

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)

REQUESTS = Counter(
    "warmserve_router_requests_total",
    "Requests ended, by outcome (stop, length, cancelled, deadline, failed, refused) and the state the model was in",
    ["model", "outcome", "found_state"],
)
TTFT = Histogram(
    "warmserve_router_ttft_seconds", "From arrival to the first token", ["model", "found_state"], buckets=_SECONDS
)
QUEUE = Histogram(
    "warmserve_router_queue_seconds",
    "From arrival to an instance taking the request, waking included",
    ["model", "found_state"],
    buckets=_SECONDS,
)
IN_PROGRESS = Gauge("warmserve_router_requests_in_progress", "Requests running and waiting", ["model"])
PROMPT_TOKENS = Counter("warmserve_router_prompt_tokens_total", "Tokens of prompts", ["model"])
OUTPUT_TOKENS = Counter("warmserve_router_output_tokens_total", "Tokens generated", ["model"])
RESUMES = Counter("warmserve_router_resumes_total", "Requests put back because their instance was lost", ["model"])
WAKES = Counter(
    "warmserve_router_wakes_total", "Calls to the placer for an instance, by what came of it", ["model", "outcome"]
)


def state_label(state: common_pb2.ReplicaState.ValueType) -> str:
    """cold, warming, warm or active."""
    return common_pb2.ReplicaState.Name(state).removeprefix("REPLICA_STATE_").lower()
