"""KV blocks: their accounting against the arena, and their tensors."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.gpu_agent.arena.pages import OutOfPages
from services.gpu_agent.engine.kv import KvCache
from services.gpu_agent.engine.kv_spec import KvSpec
from tests.gpu_agent.serving import arena, kv_tensors

SPEC = KvSpec(layers=2, kv_heads=2, head_dim=8, dtype=torch.float32, block_tokens=4)  # 1 KiB a block


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("alloc"), st.integers(0, 9)),
            st.tuples(st.just("free"), st.integers(0, 30)),
            st.tuples(st.just("reserve"), st.integers(0, 4)),
        ),
        max_size=40,
    )
)
def test_blocks_are_exclusive_and_pages_come_back(operations: list[tuple[str, int]]) -> None:
    memory = arena(6, page_bytes=4096)
    caches = [KvCache(memory, name, SPEC) for name in ("a", "b")]
    held: list[list[int]] = [[], []]
    reserved = [0, 0]
    for step, (operation, number) in enumerate(operations):
        which = step % 2
        cache, mine = caches[which], held[which]
        if operation == "alloc":
            free = memory.free_pages * cache.slots_per_page
            room = free + cache.pages_in_use * cache.slots_per_page - len(mine)
            blocks = cache.try_alloc(number)
            assert (blocks is None) == (number > room)
            mine += blocks or []
        elif operation == "free":
            cache.free(mine[number:])
            del mine[number:]
        else:
            before = cache.pages_in_use
            if number - before > memory.free_pages:
                with pytest.raises(OutOfPages):
                    cache.reserve(number)
                assert cache.pages_in_use == before
            else:
                cache.reserve(number)
                reserved[which] = number
        memory.check()
        everyone = held[0] + held[1]
        assert len(set(everyone)) == len(everyone)
        for i in (0, 1):
            pages = {block // caches[i].slots_per_page for block in held[i]}
            assert caches[i].blocks_in_use == len(held[i])
            assert caches[i].pages_in_use == max(len(pages), reserved[i])
    for cache in caches:
        cache.close()
        cache.close()
    memory.check()
    assert memory.free_pages == 6
    memory.close()


@pytest.fixture
def cache() -> Iterator[KvCache]:
    memory = arena(4, page_bytes=4096)
    cache = KvCache(memory, "a", SPEC)
    yield cache
    cache.close()
    memory.close()


def test_a_block_cannot_be_freed_twice(cache: KvCache) -> None:
    (one, two) = cache.try_alloc(2) or []
    cache.free([one])
    with pytest.raises(ValueError, match="not allocated"):
        cache.free([one])
    with pytest.raises(ValueError, match="not allocated"):
        cache.free([3 * cache.slots_per_page])
    assert cache.blocks_in_use == 1
    cache.free([two])
    assert cache.pages_in_use == 0


def test_limit_counts_what_others_hold_but_not_weights(cache: KvCache) -> None:
    memory = cache._arena
    memory.take_kv("b", 1)
    memory.add_weights("m", 2 * 4096).grow(2)
    assert cache.limit_blocks() == 2 * cache.slots_per_page


def test_limit_leaves_others_what_they_have_reserved(cache: KvCache) -> None:
    """Those pages never come: who waited for them would wait for ever, and all behind it too."""
    memory = cache._arena
    other = KvCache(memory, "other", cache.spec)
    other.reserve(3)
    cache.reserve(1)
    assert cache.limit_blocks() == (memory.num_pages - 3) * cache.slots_per_page
    assert other.limit_blocks() == (memory.num_pages - 1) * other.slots_per_page
    other.close()
    assert cache.limit_blocks() == memory.num_pages * cache.slots_per_page


def test_a_page_smaller_than_a_block_is_refused() -> None:
    memory = arena(2, page_bytes=4096)
    with pytest.raises(ValueError, match="larger pages"):
        KvCache(memory, "a", KvSpec(layers=64, kv_heads=2, head_dim=8, dtype=torch.float32))
    memory.close()


# The second and third have blocks, and the third even tokens, that do not divide the page.
@pytest.mark.parametrize(("layers", "kv_heads", "head_dim"), [(2, 2, 8), (3, 2, 8), (2, 3, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_is_read(layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    memory = arena(8, page_bytes=4096)
    spec = KvSpec(layers, kv_heads, head_dim, dtype, block_tokens=4)
    memory.kv_view(torch.uint8).fill_(0xFF)
    tensors = kv_tensors(memory, spec)
    cache = KvCache(memory, "a", spec, tensors.clear)
    count = 2 * cache.slots_per_page + 1
    blocks = cache.try_alloc(count)
    assert blocks is not None
    table = torch.tensor(blocks)
    tokens = torch.arange(count * 4)
    places = tensors.token_index(table[tokens // 4], tokens % 4)
    written = torch.randn(layers, 2, count * 4, kv_heads, head_dim).to(dtype)
    half = written.clone()
    half[:, :, : 2 * 4] = 0  # not written, and so zero whatever was there before
    late = places.view(count * 4, -1)[8:].flatten()
    for layer in range(layers):
        tensors.write(layer, late, written[layer, 0, 8:], written[layer, 1, 8:])
    for layer in range(layers):
        keys, values = tensors.read(layer, tensors.block_index(table[None]))
        torch.testing.assert_close(keys[0], half[layer, 0], rtol=0, atol=0)
        torch.testing.assert_close(values[0], half[layer, 1], rtol=0, atol=0)
    cache.close()
    memory.close()
