"""What the floors of benchmarks.engine hold: run eagerly on the CPU, with every operation written down."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import gpu_limits
from benchmarks.gpu_limits import beside_floors, floor_rows
from benchmarks.models import place
from benchmarks.report import Row
from tests.gpu_agent.checkpoints import CONFIGS, HIDDEN, VOCAB
from tests.gpu_agent.serving import arena

LAYERS, INTERMEDIATE, KV_HEADS, HEAD_DIM = 2, 128, 2, 16
QKV = (4 + 2 * KV_HEADS) * HEAD_DIM


class Written(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes copied, rows times weights of the products, and attentions."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.copied = self.products = self.attentions = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name == "aten::copy_":
            self.copied += args[0].nbytes + args[1].nbytes
        if name == "aten::mm":
            self.products += args[0].shape[0] * args[1].numel()
        self.attentions += "scaled_dot_product" in name
        return func(*args, **(kwargs or {}))


def test_a_floor_holds_what_every_step_must_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products; bytes between them, of keys and values, of logits, and of tokens that come and go."""
    torch.set_num_threads(1)
    seen: list[Written] = []

    def fastest_time(work: Callable[[], object]) -> float:
        with Written() as written:
            work()
        seen.append(written)
        return len(seen) * 1e-3

    monkeypatch.setattr(gpu_limits, "fastest_time", fastest_time)
    monkeypatch.setattr(gpu_limits, "DEVICE", torch.device("cpu"))
    memory = arena(8)
    placed = place(memory, "m", CONFIGS["llama"]())
    rows = floor_rows(placed, "1B", [(1, 30), (3, 500)], [5, 20])
    assert [(row.what, row.value, row.limit) for row in rows] == [
        ("1B: floor of a decode step, 1 x 30", 2.0, 1.0),
        ("1B: floor of a decode step, 3 x 500", 4.0, 3.0),
        ("1B: floor of a prefill of 5", 6.0, 5.0),
        ("1B: floor of a prefill of 20", 8.0, 7.0),
    ]
    matrices = HIDDEN * (QKV + HIDDEN + 3 * INTERMEDIATE)
    between = 2 * 4 * HIDDEN + 2 * QKV + 3 * INTERMEDIATE
    for index, (tokens, logits, context) in enumerate([(1, 1, 30), (3, 3, 500), (5, 1, 0), (20, 1, 0)]):
        alone, whole = seen[2 * index : 2 * index + 2]
        assert alone.products == whole.products == LAYERS * tokens * matrices + logits * HIDDEN * VOCAB
        assert alone.copied == alone.attentions == 0
        kv = 2 * KV_HEADS * HEAD_DIM * context
        ids = 2 * 8 * (tokens + logits)
        assert whole.copied == 2 * (LAYERS * tokens * (between + kv) + logits * (4 * HIDDEN + VOCAB)) + ids
        assert bool(whole.attentions) == (context == 0)
    placed.weights.remove()
    memory.close()


def test_a_target_below_its_floor_is_said_to_be_out_of_reach() -> None:
    rows = [Row("a", 4.4, "ms", target=3.76), Row("b", 2.3, "ms", target=2.06), Row("c", 1.0, "ms")]
    floors = [Row("floor of a", 3.9134, "ms"), Row("floor of b", 2.0, "ms"), Row("floor of c", 0.9, "ms")]
    noted = beside_floors(rows, floors)
    assert [row.note for row in noted] == ["out of reach: the floor is 3.91 ms", None, None]
    assert [row.what for row in noted] == ["a", "b", "c"]
