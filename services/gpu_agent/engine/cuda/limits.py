"""How large a model's steps may be on a GPU. Pure."""

from __future__ import annotations

from typing import Any

import torch

from services.gpu_agent.engine.backend import StepLimits
from services.gpu_agent.engine.cuda.pack import MAX_PREFILLS

_TOKEN_BUDGET = 2048
_PREFILL_BUDGET = 4096
_GRAIN = 256  # tokens


def step_limits(config: Any, dtype: torch.dtype, activation_bytes: int, max_batch: int) -> StepLimits:
    """The limits of a model whose activations have so much room; config is transformers'.

    ValueError where not even max_batch sequences that decode would fit.
    """
    tokens = activation_bytes // bytes_per_token(config, dtype) // _GRAIN * _GRAIN
    if tokens < max_batch:
        raise ValueError(
            f"its activations take {bytes_per_token(config, dtype)} bytes for each token, which leaves room for "
            f"{tokens} in a step; start the agent with a larger workspace_bytes, or deploy with a smaller max_batch"
        )
    token_budget = max(max_batch, min(_TOKEN_BUDGET, tokens))
    return StepLimits(max_batch, token_budget, max(token_budget, min(_PREFILL_BUDGET, tokens)), MAX_PREFILLS)


def bytes_per_token(config: Any, dtype: torch.dtype) -> int:
    """What the activations of one token take at their peak, about: in a feed-forward, beside the residual."""
    text = config.get_text_config()
    experts = int(getattr(text, "num_experts_per_tok", None) or 0)
    inner = int(getattr(text, "intermediate_size", None) or 4 * text.hidden_size)
    if experts:
        # Each of a token's experts has its own row, in and out; some models have a dense feed-forward besides.
        own = int(getattr(text, "moe_intermediate_size", None) or inner)
        inner = max(inner, experts * (own + text.hidden_size))
    # Gate and up projection, their product, and some rows as wide as the model.
    return dtype.itemsize * (3 * inner + 6 * int(text.hidden_size))
