"""How long a request of a trace is in progress, which traces do not tell.

An 8B on one H100, as benchmarks/results/engine-h100.json has it: prompts at the rate of the step that prefills 4,096
tokens (105 ms), output tokens at the step of 64 sequences with contexts of 1,024 (9.73 ms). Waiting is left out.
"""

from __future__ import annotations

PREFILL_TOKENS_PER_S = 4096 / 0.105
SECONDS_PER_OUTPUT_TOKEN = 0.00973


def service_time_s(prompt_tokens: int, output_tokens: int) -> float:
    """Seconds from a request's first step to its last token."""
    return prompt_tokens / PREFILL_TOKENS_PER_S + output_tokens * SECONDS_PER_OUTPUT_TOKEN
