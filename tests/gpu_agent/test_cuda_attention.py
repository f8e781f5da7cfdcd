"""Paged attention in Triton against float64: on a GPU, and in Triton's interpreter where there is none."""

from __future__ import annotations

import random
from collections.abc import Sequence as Many
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.gpu_agent.engine.cuda.attention import (
    TILE,
    PagedKv,
    StepTensors,
    Workspace,
    attend,
    spare_pieces,
)
from services.gpu_agent.engine.cuda.fused import rotate_and_store
from services.gpu_agent.engine.cuda.pack import cut
from services.gpu_agent.engine.kv_spec import KvSpec
from services.gpu_agent.engine.kv_tensors import KvTensors

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
LAYERS = 2
ALLOWED = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}  # relative errors

interpreted = pytest.mark.skipif(GPU, reason="is for Triton's interpreter, which is used where there is no GPU")
DEVICES = [pytest.param("cuda", marks=pytest.mark.gpu), pytest.param("cpu", marks=interpreted)]
# Padding rows of a tile, which are not stored, may divide 0 by 0.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in divide:RuntimeWarning")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def store(kv: PagedKv, layer: int, step: StepTensors, key: torch.Tensor, value: torch.Tensor) -> None:
    """Writes a step's keys and values, rotated already."""
    rotate_and_store(kv, layer, step.slots, key, key, value, None)


@dataclass(frozen=True)
class Case:
    """`spans` are (position of the first token, tokens)."""

    spans: Many[tuple[int, int]]
    kv_heads: int = 2
    group: int = 1
    head_dim: int = 64
    dtype: torch.dtype = torch.float16
    scaling: float = 0.125
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    padding: int = 0
    seed: int = 0

    def features(self) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(self.seed + 1)
        sinks = torch.randn(self.kv_heads * self.group, generator=generator).to(DEVICE) if self.sinks else None
        return {"scaling": self.scaling, "window": self.window, "softcap": self.softcap, "sinks": sinks}


def expected(case: Case, query: torch.Tensor, keys: Many[torch.Tensor], values: Many[torch.Tensor]) -> torch.Tensor:
    """The same in float64, sequence by sequence. keys, values: (all tokens, kv_heads, head_dim) of each sequence."""
    sinks = case.features()["sinks"]
    rows, outputs = 0, []
    for (start, length), key, value in zip(case.spans, keys, values, strict=True):
        k, v = (t.double().repeat_interleave(case.group, 1) for t in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query[rows : rows + length].double(), k) * case.scaling
        if case.softcap is not None:
            scores = case.softcap * torch.tanh(scores / case.softcap)
        q_at = torch.arange(start, start + length, device=DEVICE)[:, None]
        k_at = torch.arange(start + length, device=DEVICE)[None, :]
        sees = k_at <= q_at
        if case.window is not None:
            sees &= k_at > q_at - case.window
        scores = scores.masked_fill(~sees, float("-inf"))
        if sinks is not None:
            scores = torch.cat([scores, sinks.double()[:, None, None].expand(-1, length, 1)], 2)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1)[:, :, : start + length], v))
        rows += length
    return torch.cat(outputs)


class Step:
    """The tensors of one step: random queries, keys and values; sequences' blocks strewn over pages full of NaN."""

    def __init__(self, case: Case) -> None:
        self.case = case
        generator = torch.Generator(DEVICE).manual_seed(case.seed)
        rng = random.Random(case.seed)
        self.spec = KvSpec(LAYERS, case.kv_heads, case.head_dim, case.dtype)
        block_elements = self.spec.block_bytes // case.dtype.itemsize
        slots_per_page = 3
        page_elements = slots_per_page * block_elements + 8 * 7  # the end of a page belongs to no block
        counts = [self.spec.blocks_for(start + length) for start, length in case.spans]
        pages = -(-sum(counts) // slots_per_page) + 2
        memory = torch.full((pages * page_elements,), float("nan"), dtype=case.dtype, device=DEVICE)
        self.kv = PagedKv(memory, self.spec, page_elements, slots_per_page)
        self.tensors_of_kv = KvTensors(memory, page_elements * case.dtype.itemsize, slots_per_page, self.spec)
        numbers = rng.sample(range(pages * slots_per_page), sum(counts))
        self.lists = [numbers[sum(counts[:i]) :][:count] for i, count in enumerate(counts)]

        def normal(tokens: int, heads: int) -> torch.Tensor:
            return torch.randn(tokens, heads, case.head_dim, generator=generator, device=DEVICE).to(case.dtype)

        self.heads = case.kv_heads * case.group
        self.rows = sum(length for _, length in case.spans)
        self.query = normal(self.rows + case.padding, self.heads)
        self.keys = [normal(start + length, case.kv_heads) for start, length in case.spans]
        self.values = [normal(start + length, case.kv_heads) for start, length in case.spans]

    def ints(self, values: Any) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=DEVICE)

    def slots(self, sequence: int, begin: int, end: int) -> list[int]:
        return [self.lists[sequence][p // 16] * 16 + p % 16 for p in range(begin, end)]

    def tensors(self) -> StepTensors:
        """What the CPU side of an engine prepares."""
        slots: list[int] = []
        pieces: list[tuple[int, int, int, int, int]] = []
        tiles: list[tuple[int, int, int, int]] = []
        decoded = [start + 1 for start, length in self.case.spans if length == 1]
        cuts = iter(cut(decoded, spare_pieces(self.case.kv_heads)))
        row = begins = 0
        for i, (start, length) in enumerate(self.case.spans):
            slots += self.slots(i, start, start + length)
            if length == 1:
                count = next(cuts)
                pieces += [(row, start + 1, begins, piece, count) for piece in range(count)]
            else:
                tiles += [(row + t, min(TILE, length - t), start + t, begins) for t in range(0, length, TILE)]
            row += length
            begins += len(self.lists[i])
        slots += [-1] * self.case.padding
        pieces += [(0, 0, 0, 0, 0)] * self.case.padding
        tiles += [(0, 0, 0, 0)] * self.case.padding
        return StepTensors(
            self.ints(slots),
            self.ints([number for numbers in self.lists for number in numbers]),
            self.ints(pieces).view(-1, 5),
            self.ints(tiles).view(-1, 4),
        )

    def write(self, layer: int, tensors: StepTensors) -> None:
        """The earlier tokens' keys and values, as the CPU's code writes them, then this step's."""
        before = [start for start, _ in self.case.spans]
        slots = [slot for i, start in enumerate(before) for slot in self.slots(i, 0, start)]
        if slots:
            earlier = self.ints(slots).long()
            keys, values = ([t[:n] for t, n in zip(all_, before, strict=True)] for all_ in (self.keys, self.values))
            index = self.tensors_of_kv.token_index(earlier // 16, earlier % 16)
            self.tensors_of_kv.write(layer, index, torch.cat(keys), torch.cat(values))
        nothing = torch.full((self.case.padding, *self.keys[0].shape[1:]), float("nan"), device=DEVICE)
        keys, values = ([t[n:] for t, n in zip(all_, before, strict=True)] for all_ in (self.keys, self.values))
        nothing = nothing.to(self.case.dtype)
        store(self.kv, layer, tensors, torch.cat([*keys, nothing]), torch.cat([*values, nothing]))

    def workspace(self, tensors: StepTensors) -> Workspace:
        return Workspace(max(1, len(tensors.pieces)) * self.heads, self.case.head_dim, DEVICE)

    def run(self, layer: int = 1) -> torch.Tensor:
        tensors = self.tensors()
        self.write(layer, tensors)
        out = torch.full_like(self.query, float("nan"))
        workspace = self.workspace(tensors)
        attend(self.kv, layer, tensors, self.query, out, workspace, **self.case.features())
        assert not workspace.arrivals.any()  # ready for the next layer
        return out


def check(case: Case) -> None:
    step = Step(case)
    out = step.run()
    wanted = expected(case, step.query, step.keys, step.values)
    error = (out[: step.rows].double() - wanted).norm() / wanted.norm()
    assert error < ALLOWED[case.dtype], f"{error:.2e} for {case}"
    assert torch.isfinite(out[: step.rows]).all()
    assert out[step.rows :].isnan().all()  # not written


SMALL = ((0, 1), (16, 1), (200, 1), (0, 140), (37, 2))
FEATURES: list[dict[str, Any]] = [
    {},
    {"window": 1},
    {"window": 100},
    {"softcap": 3.0},
    {"sinks": True},
    {"window": 17, "softcap": 2.0, "sinks": True, "padding": 3},
]


@interpreted
@pytest.mark.parametrize(
    ("kv_heads", "group", "features"),
    [*((1, 4, features) for features in FEATURES), (2, 1, FEATURES[-1]), (1, 6, FEATURES[-1])],
    ids=str,
)
def test_features(kv_heads: int, group: int, features: dict[str, Any]) -> None:
    check(Case(SMALL, kv_heads, group, dtype=torch.float32, **features))


@interpreted
@pytest.mark.parametrize("head_dim", [8, 64, 80, 96, 112, 128, 256])
def test_head_sizes(head_dim: int) -> None:
    check(Case(((129, 1), (30, 20), (0, 1)), 1, 8, head_dim, window=50, sinks=True, padding=1))


@interpreted
def test_a_long_context() -> None:
    """It is cut into more parts than are added up at once."""
    check(Case([(2000, 1)], 1, 4, 16, torch.float32, scaling=1.0, sinks=True))


@interpreted
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    spans=st.lists(st.tuples(st.integers(0, 150), st.sampled_from([1, 1, 2, 17, 64, 130])), min_size=1, max_size=4),
    group=st.sampled_from([1, 2, 3]),
    head_dim=st.sampled_from([16, 48]),
    window=st.none() | st.integers(1, 200),
    softcap=st.none() | st.floats(0.5, 50),
    sinks=st.booleans(),
    padding=st.integers(0, 2),
    seed=st.integers(0, 1000),
)
def test_any_step(spans: list[tuple[int, int]], **features: Any) -> None:
    check(Case(spans, 1, dtype=torch.float32, **features))


RAGGED = ((0, 1), (4095, 1), (0, 1000), (511, 1), (777, 333), (9000, 1), (16, 1), (63, 1), (64, 2), (3000, 129))
GPU_FEATURES = [*FEATURES, {"window": 128, "sinks": True}, {"window": 1024, "softcap": 50.0}]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("kv_heads", "group", "features"),
    [*((8, 4, features) for features in GPU_FEATURES), (8, 1, FEATURES[-1]), (2, 8, FEATURES[-1]), (4, 7, {})],
    ids=str,
)
def test_features_on_a_gpu(kv_heads: int, group: int, features: dict[str, Any]) -> None:
    check(Case(RAGGED, kv_heads, group, 128, torch.bfloat16, **features))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("features", "dtype"),
    [({}, torch.bfloat16), (FEATURES[-1], torch.bfloat16), (FEATURES[-1], torch.float16)],
    ids=str,
)
@pytest.mark.parametrize("head_dim", [16, 32, 64, 80, 96, 112, 128, 256])
def test_head_sizes_on_a_gpu(head_dim: int, features: dict[str, Any], dtype: torch.dtype) -> None:
    check(Case(RAGGED, 4, 2, head_dim, dtype, **features))


@pytest.mark.gpu
@pytest.mark.parametrize("spans", [1, 3, 64, 200])
def test_decoding_on_a_gpu(spans: int) -> None:
    rng = random.Random(spans)
    ragged = [(rng.choice([0, 100, 1000, 5000]) + rng.randrange(100), 1) for _ in range(spans - 1)]
    check(Case([*ragged, (30_000, 1)], 8, 4, 128))


@pytest.mark.gpu
def test_a_graph_serves_later_steps() -> None:
    """Captured over padding, it serves a step whose facts are put into the same tensors; always with the same bits."""
    step = Step(Case([(3000, 1), (5, 1), (700, 150)], 8, 4, 128, torch.bfloat16))
    tensors = step.tensors()
    step.write(1, tensors)
    # More room than the step needs, and nothing but padding while it is captured.
    held = StepTensors(
        slots=step.ints([-1] * 512),
        blocks=step.ints([0] * 512),
        pieces=step.ints([[0] * 5] * 50),
        tiles=step.ints([[0] * 4] * 4),
    )
    query = torch.zeros(512, 32, 128, dtype=torch.bfloat16, device=DEVICE)
    out = torch.zeros_like(query)
    workspace = Workspace(50 * 32, 128, DEVICE)

    def run() -> None:
        attend(step.kv, 1, held, query, out, workspace, scaling=0.125)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for name in ("blocks", "pieces", "tiles"):
        source = getattr(tensors, name)
        getattr(held, name)[: len(source)] = source
    query[: step.rows] = step.query
    results = []
    for _ in range(5):
        out.zero_()
        graph.replay()
        results.append(out[: step.rows].clone())
    wanted = expected(step.case, step.query, step.keys, step.values)
    assert (results[0].double() - wanted).norm() / wanted.norm() < ALLOWED[torch.bfloat16]
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("device", DEVICES)
def test_written_where_kv_tensors_reads(device: str) -> None:
    """The arena's layout is one, whoever reads it; and nothing else is touched."""
    case = Case([(0, 5), (0, 1), (0, 40)], padding=2, head_dim=80, dtype=torch.float16)
    step = Step(case)
    tensors = step.tensors()
    step.write(1, tensors)
    reader = step.tensors_of_kv
    for i, (start, length) in enumerate(case.spans):
        index = reader.block_index(torch.tensor([step.lists[i]], device=device))
        keys, values = reader.read(1, index)
        assert torch.equal(keys[0, : start + length], step.keys[i])
        assert torch.equal(values[0, : start + length], step.values[i])
        assert keys[0, start + length :].isnan().all()
        assert reader.read(0, index)[1].isnan().all()
    written = (~step.kv.pages.isnan()).sum().item()
    assert written == sum(t.numel() for t in [*step.keys, *step.values])


@pytest.mark.parametrize("device", DEVICES)
def test_slices_of_a_fused_projection(device: str) -> None:
    """Queries, keys and values may lie side by side in one tensor, and need not be copied apart."""
    case = Case([(0, 7), (0, 1), (0, 1)], kv_heads=2, group=3, head_dim=64)
    step = Step(case)
    tensors = step.tensors()
    fused = torch.cat([step.query, torch.cat(step.keys), torch.cat(step.values)], 1).to(device)
    query, key, value = fused.split([6, 2, 2], 1)
    assert not query.is_contiguous()
    store(step.kv, 0, tensors, key, value)
    out = torch.empty_like(step.query)
    attend(step.kv, 0, tensors, query, out, step.workspace(tensors), **case.features())
    wanted = expected(case, step.query, step.keys, step.values)
    assert (out.double() - wanted).norm() / wanted.norm() < ALLOWED[case.dtype]


def test_what_does_not_fit_is_refused() -> None:
    step = Step(Case([(5, 1), (9, 1)], kv_heads=2, group=2))
    tensors = step.tensors()
    out = torch.empty_like(step.query)
    enough = step.workspace(tensors)
    with pytest.raises(ValueError, match="lanes"):
        attend(step.kv, 0, tensors, step.query, out, Workspace(4, 64, DEVICE), scaling=1.0)
    with pytest.raises(ValueError, match="heads"):
        attend(step.kv, 0, tensors, step.query[:, :3], out[:, :3].contiguous(), enough, scaling=1.0)
    with pytest.raises(ValueError, match="unfit"):
        attend(step.kv, 0, tensors, step.query, out[:1], enough, scaling=1.0)
    with pytest.raises(ValueError, match="scaling"):
        attend(step.kv, 0, tensors, step.query, out, enough, scaling=0.0)
    with pytest.raises(ValueError, match="257"):
        replace(step.kv, spec=KvSpec(1, 2, 257, torch.float16))
    with pytest.raises(ValueError, match="32 tokens"):
        replace(step.kv, spec=KvSpec(1, 2, 64, torch.float16, block_tokens=32))


@given(keys=st.lists(st.integers(1, 50_000), min_size=1, max_size=99), kv_heads=st.integers(1, 32))
def test_a_workspace_holds_all_pieces(keys: list[int], kv_heads: int) -> None:
    pieces = sum(cut(keys, spare_pieces(kv_heads)))
    assert pieces * 4 * kv_heads <= Workspace.lanes_for(len(keys), 4 * kv_heads, kv_heads)
