"""How large steps are made for a model and a workspace."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, MixtralConfig, Qwen3MoeConfig

from services.gpu_agent.engine.cuda.limits import bytes_per_token, step_limits

GIB = 1 << 30
LARGE = LlamaConfig(hidden_size=4096, intermediate_size=14336)


def test_a_large_workspace_leaves_the_budgets_as_they_are() -> None:
    limits = step_limits(LARGE, torch.bfloat16, GIB, 64)
    assert (limits.max_batch, limits.token_budget, limits.prefill_budget) == (64, 2048, 4096)


def test_a_small_workspace_makes_steps_smaller() -> None:
    limits = step_limits(LARGE, torch.bfloat16, GIB // 5, 64)
    assert 256 <= limits.token_budget == limits.prefill_budget < 2048
    assert limits.prefill_budget * bytes_per_token(LARGE, torch.bfloat16) <= GIB // 5


def test_no_room_for_the_batch_is_refused_with_what_to_do() -> None:
    with pytest.raises(ValueError, match="larger workspace_bytes"):
        step_limits(LARGE, torch.bfloat16, 1 << 20, 64)


def test_experts_are_counted_each() -> None:
    mixtral = MixtralConfig(hidden_size=4096, intermediate_size=14336, num_experts_per_tok=2)
    small_experts = Qwen3MoeConfig(
        hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_experts_per_tok=8
    )
    assert bytes_per_token(mixtral, torch.bfloat16) > 1.9 * bytes_per_token(LARGE, torch.bfloat16)
    assert bytes_per_token(small_experts, torch.bfloat16) >= 2 * 3 * 8 * (768 + 2048)


@given(st.integers(1, 4 * GIB), st.integers(1, 512))
def test_budgets_are_ordered_and_fit(room: int, max_batch: int) -> None:
    try:
        limits = step_limits(LARGE, torch.bfloat16, room, max_batch)
    except ValueError:
        assert room // bytes_per_token(LARGE, torch.bfloat16) < max_batch + 256
        return
    assert max_batch <= limits.token_budget <= limits.prefill_budget
    assert limits.prefill_budget * bytes_per_token(LARGE, torch.bfloat16) <= room
