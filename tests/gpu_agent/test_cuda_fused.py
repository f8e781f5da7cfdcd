"""The small kernels against plain torch: on a GPU, or in Triton's interpreter where there is none (see conftest)."""

from __future__ import annotations

import math

import pytest
import torch

from services.gpu_agent.engine.cuda.attention import PagedKv
from services.gpu_agent.engine.cuda.fused import (
    cosines_and_sines,
    gate,
    resolve_ids,
    rms_norm,
    rotate_and_store,
    store_tokens,
)
from services.gpu_agent.engine.kv_spec import KvSpec
from services.gpu_agent.engine.kv_tensors import KvTensors

GPU = torch.cuda.is_available()
interpreted = pytest.mark.skipif(GPU, reason="is for Triton's interpreter, which is used where there is no GPU")
WHERE = [
    pytest.param("cpu", torch.float32, marks=interpreted, id="interpreted-float32"),
    pytest.param("cpu", torch.float16, marks=interpreted, id="interpreted-float16"),
    pytest.param("cuda", torch.float32, marks=pytest.mark.gpu, id="float32"),
    pytest.param("cuda", torch.bfloat16, marks=pytest.mark.gpu, id="bfloat16"),
    pytest.param("cuda", torch.float16, marks=pytest.mark.gpu, id="float16"),
]
pytestmark = [
    pytest.mark.parametrize(("device", "dtype"), WHERE),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),  # 1 / (1 + inf) is 0, as it should
]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def random(*shape: int, device: str, dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(*shape) * 2).to(device, dtype)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to within a rounding or two of its dtype; in half precision, nearly everywhere rounded the same way."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    # A GPU's exponential is a few units off in float32, which half precision does not show.
    step = (16 if found.dtype == torch.float32 else 4) * torch.finfo(found.dtype).eps
    torch.testing.assert_close(found, expected, rtol=step, atol=step)
    if found.dtype != torch.float32:
        assert int((found != expected).sum()) <= 2 + found.numel() // 50


def normed(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: bool, rounds: bool) -> torch.Tensor:
    """As transformers computes it."""
    unit = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    if offset:
        return ((1 + weight.float()) * unit).to(x.dtype)
    return weight * unit.to(x.dtype) if rounds else (weight.float() * unit).to(x.dtype)


STYLES = [(False, True), (False, False), (True, False)]


@pytest.mark.parametrize(("offset", "rounds"), STYLES)
@pytest.mark.parametrize("shape", [(5, 64), (1, 3, 100), (1, 1, 1)])
def test_norm(shape: tuple[int, ...], offset: bool, rounds: bool, device: str, dtype: torch.dtype) -> None:
    x, weight = random(*shape, device=device, dtype=dtype), random(shape[-1], device=device, dtype=dtype)
    before = x.clone()
    close(rms_norm(x, weight, 1e-2, offset=offset, rounds=rounds), normed(x, weight, 1e-2, offset, rounds))
    assert torch.equal(x, before)


def test_norm_of_heads_wherever_they_lie(device: str, dtype: torch.dtype) -> None:
    """Heads of one projection over queries, keys and values; token by token, and head by head."""
    whole = random(1, 5, 6 * 48, device=device, dtype=dtype)
    weight = random(48, device=device, dtype=dtype)
    for heads in (whole[..., : 4 * 48].view(1, 5, 4, 48), whole[..., 4 * 48 :].view(1, 5, 2, 48)):
        for x in (heads, heads.transpose(1, 2)):
            close(rms_norm(x, weight, 1e-6, offset=True, rounds=False), normed(x, weight, 1e-6, True, False))


@pytest.mark.parametrize(("offset", "rounds"), STYLES)
def test_norm_of_a_sum(offset: bool, rounds: bool, device: str, dtype: torch.dtype) -> None:
    """The sum is rounded to its dtype before it is normalised, as a sum by itself would be."""
    x, residual = (random(1, 4, 200, device=device, dtype=dtype) for _ in range(2))
    weight = random(200, device=device, dtype=dtype)
    total = x + residual
    found = rms_norm(x, weight, 1e-6, offset=offset, rounds=rounds, residual=residual)
    assert torch.equal(residual, total)
    close(found, normed(total, weight, 1e-6, offset, rounds))


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("shape", [(3, 24), (1, 2, 2 * 1030)])
def test_gate(activation: str, shape: tuple[int, ...], device: str, dtype: torch.dtype) -> None:
    fused = random(*shape, device=device, dtype=dtype) * 3
    left, right = fused.double().chunk(2, dim=-1)
    # 1 + tanh(z) = 2 * sigmoid(2 z), which keeps its digits far out, where torch's own gelu loses them even in float64.
    inner = left if activation == "silu" else math.sqrt(8 / math.pi) * (left + 0.044715 * left**3)
    acted = left * torch.sigmoid(inner)
    close(gate(fused, activation), (acted.to(dtype) * right).to(dtype))


def test_gate_far_out(device: str, dtype: torch.dtype) -> None:
    """Where the cube is large, nothing overflows into NaN."""
    fused = torch.tensor([[-200.0, -30.0, 0.0, 30.0, 200.0, *[1.0] * 5]], device=device, dtype=dtype)
    for activation in ("silu", "gelu_tanh"):
        close(gate(fused, activation), torch.tensor([[0.0, 0.0, 0.0, 30.0, 200.0]], device=device, dtype=dtype))


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("size", [32, 20, 1])
@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
def test_cosines_and_sines(integer: torch.dtype, size: int, copies: int, device: str, dtype: torch.dtype) -> None:
    """Far out too, where an angle has many whole turns: the product is a float32's, and exact from there on."""
    positions = torch.tensor([[0, 1, 2, 511, 8191], [131_071, 1_000_003, 5, 6, 7]], dtype=integer, device=device)
    frequencies = 500_000.0 ** -(torch.arange(size, device=device) / size)
    angles = (positions[..., None].float() * frequencies).double()
    found = cosines_and_sines(positions, frequencies, 1.25, copies, dtype)
    for table, exact in zip(found, (angles.cos(), angles.sin()), strict=True):
        close(table, torch.cat([exact.float() * 1.25] * copies, dim=-1).to(dtype))


def test_cosines_and_sines_of_a_row_among_facts(device: str, dtype: torch.dtype) -> None:
    """Positions as a step has them: a part of a larger buffer; and where they lie apart."""
    facts = torch.arange(100, dtype=torch.int32, device=device)
    frequencies = torch.tensor([1.0, 0.01], device=device)
    for positions in (facts[32:40][None], facts[::7][None]):
        cos, sin = cosines_and_sines(positions, frequencies, 1.0, 1, dtype)
        angles = positions[..., None].float() * frequencies
        close(cos, angles.cos().to(dtype))
        close(sin, angles.sin().to(dtype))


@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize("rope", ["half", "whole", None])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 2, 16), (20, 10, 24), (1, 1, 64)])
def test_rotate_and_store(
    heads: int, kv_heads: int, size: int, rope: str | None, by_head: bool, device: str, dtype: torch.dtype
) -> None:
    """Keys and values lie where the CPU's code finds them; all else in the pages stays as it was."""
    spec = KvSpec(layers=3, kv_heads=kv_heads, head_dim=size, dtype=dtype, block_tokens=4)
    slots_per_page, pages, tokens, layer = 3, 4, 7, 1
    page_elements = slots_per_page * spec.block_bytes // dtype.itemsize + 6 * 8
    memory = torch.full((pages * page_elements,), 9.0, device=device, dtype=dtype)
    # As one projection gives them: each token's heads with others' between, or each head's tokens together.
    whole = random(tokens, (heads + 2 * kv_heads) * size, device=device, dtype=dtype)
    query, key, value = (
        part.view(tokens, -1, size)
        for part in whole.split([heads * size, kv_heads * size, kv_heads * size], dim=1)  # type: ignore[no-untyped-call]
    )
    if by_head:
        query, key, value = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (query, key, value))
    angles = torch.rand(tokens, size // 2, device=device) * 6
    given = torch.cat((angles, angles), dim=1) if rope == "whole" else angles
    cos, sin = given.cos().to(dtype), given.sin().to(dtype)
    if by_head:  # as frequencies times positions come, transposed
        cos, sin = cos.T.contiguous().T, sin.T.contiguous().T

    def turned(x: torch.Tensor) -> torch.Tensor:
        if rope is None:
            return x.clone()
        low, high = x.float().chunk(2, dim=-1)
        c, s = (t[:, None, : size // 2].float() for t in (cos, sin))
        return torch.cat((low * c - high * s, high * c + low * s), dim=-1).to(dtype)

    expected_query, expected_key, expected_value = turned(query), turned(key), value.clone()
    blocks = torch.tensor([10, 10, 3, 0, 5, 11, 0])
    rows = torch.tensor([3, 0, 1, 2, 0, 3, 0])
    slots = (blocks * 4 + rows).to(device, torch.int32)
    slots[4] = -1
    expected = memory.clone()
    tensors = KvTensors(expected, page_elements * dtype.itemsize, slots_per_page, spec)
    stored = [i for i in range(tokens) if i != 4]
    index = tensors.token_index(blocks[stored].to(device), rows[stored].to(device))
    tensors.write(layer, index, expected_key[stored], expected_value[stored])

    rotate_and_store(
        PagedKv(memory, spec, page_elements, slots_per_page),
        layer,
        slots,
        query,
        key,
        value,
        None if rope is None else (cos, sin),
    )
    close(query, expected_query)
    close(memory, expected)
    assert torch.equal(memory == 9.0, expected == 9.0)


def test_cosines_that_lie_unlike_sines_are_refused(device: str, dtype: torch.dtype) -> None:
    spec = KvSpec(layers=1, kv_heads=1, head_dim=16, dtype=dtype, block_tokens=4)
    x, table = random(3, 1, 16, device=device, dtype=dtype), random(3, 16, device=device, dtype=dtype)
    memory, slots = torch.zeros(spec.block_bytes, device=device, dtype=dtype), torch.zeros(3, dtype=torch.int32)
    with pytest.raises(ValueError, match="lie differently"):
        rotate_and_store(
            PagedKv(memory, spec, len(memory), 1), 0, slots.to(device), x, x, x, (table, table.T.contiguous().T)
        )


def test_last_tokens(device: str, dtype: torch.dtype) -> None:
    """What slots chose is stored, and found by the next step's ids; a row that pads the step changes nothing."""
    last = torch.arange(100, 108, dtype=torch.int32, device=device)
    tokens = torch.tensor([7, 300_000, 9], device=device)
    store_tokens(tokens, torch.tensor([5, 0, 3, 1, 1], dtype=torch.int32, device=device), last)
    assert last.tolist() == [300_000, 101, 102, 9, 104, 7, 106, 107]
    ids = torch.tensor([-6, 12, 0, -1, -4, -8] + [1] * 2000 + [-2], dtype=torch.int32, device=device)
    found = resolve_ids(ids, last)
    assert found.dtype == torch.int32
    assert found.tolist() == [7, 12, 0, 300_000, 9, 107] + [1] * 2000 + [101]
