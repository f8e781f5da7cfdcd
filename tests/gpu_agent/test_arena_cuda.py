"""The arena on a GPU: graphs stay valid over other pages, and the GPU's memory comes back."""

from __future__ import annotations

import gc
import threading

import pytest
import torch

from services.gpu_agent.arena.arena import Arena
from services.gpu_agent.arena.weight_range import WeightRange
from tests.gpu_agent.arena_backends import CUDA, append

pytestmark = pytest.mark.gpu

PAGE = CUDA.page
SIDE = 1024  # of a float32 matrix of two pages


def fill_from(content: torch.Tensor, weights: WeightRange) -> None:
    """Makes all of a range resident with the bytes of `content`."""
    pages = content.view(torch.uint8).view(-1, PAGE)

    def fill(index: int, page: torch.Tensor) -> None:
        page.copy_(pages[index])
        torch.cuda.synchronize()

    while weights.resident_pages < weights.num_pages:
        append(weights, fill)


class Product:
    """A captured graph of x @ w, where w lies in an arena."""

    def __init__(self, arena: Arena, name: str, seed: int) -> None:
        generator = torch.Generator("cuda").manual_seed(seed)
        self.weights = arena.add_weights(name, SIDE * SIDE * 4)
        self.w = self.weights.tensor(torch.float32, (SIDE, SIDE), 0)
        self.content = torch.randn(SIDE * SIDE, generator=generator, device="cuda")
        self.x = torch.randn(8, SIDE, generator=generator, device="cuda")
        self.load()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            self.x @ self.w  # cuBLAS makes its workspace outside the graph
        stream.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.y = self.x @ self.w
        self.expected = self.run()
        exact = self.x.double() @ self.content.view(SIDE, SIDE).double()
        torch.testing.assert_close(self.expected.double(), exact, rtol=1e-2, atol=0.5)  # TF32 may be on

    def load(self) -> None:
        fill_from(self.content, self.weights)

    def run(self) -> torch.Tensor:
        self.y.zero_()
        self.graph.replay()
        torch.cuda.synchronize()
        return self.y.clone()


def test_a_captured_graph_is_right_after_eviction_and_reload_onto_other_pages() -> None:
    arena = Arena(CUDA.memory(6))
    product = Product(arena, "m", 1)
    kv = arena.kv_view(torch.float32).view(6, -1)
    taken: list[int] = []
    for keep in (0, 1):
        product.weights.shrink(keep)
        taken += arena.take_kv("other", 2 - keep)
        kv[taken] = float("nan")
        product.load()
        assert torch.equal(product.run(), product.expected)
    assert bool(kv[taken].isnan().all())  # so the weights lie elsewhere
    product.content.mul_(2)
    product.weights.shrink(0)
    product.load()
    assert torch.equal(product.run(), product.expected * 2)
    arena.check()
    arena.close()


def test_graphs_run_beside_a_thread_that_maps_fills_and_unmaps() -> None:
    arena = Arena(CUDA.memory(8))
    product = Product(arena, "serving", 2)
    other = arena.add_weights("other", 4 * PAGE)
    content = torch.arange(4 * PAGE // 4, dtype=torch.float32).pin_memory()
    shown = other.tensor(torch.float32, (4 * PAGE // 4,), 0)
    wrong: list[int] = []
    done = threading.Event()

    def churn() -> None:
        stream = torch.cuda.Stream()
        pages = content.view(torch.uint8).view(4, PAGE)

        def fill(index: int, page: torch.Tensor) -> None:
            with torch.cuda.stream(stream):
                page.copy_(pages[index], non_blocking=True)
            stream.synchronize()

        for turn in range(50):
            for _ in range(4):
                append(other, fill)
            with torch.cuda.stream(stream):
                if not torch.equal(shown.cpu(), content):
                    wrong.append(turn)
            other.shrink(turn % 4)
            other.shrink(0)
        done.set()

    thread = threading.Thread(target=churn)
    thread.start()
    runs = 0
    while not done.is_set() and thread.is_alive():
        assert torch.equal(product.run(), product.expected)
        runs += 1
    thread.join(60)
    assert done.is_set()
    assert (wrong, runs > 0) == ([], True)
    arena.check()
    arena.close()


def test_closing_or_forgetting_an_arena_gives_the_gpus_memory_back() -> None:
    """Each takes three tenths of the GPU, so that four that stayed would not fit; others may use it meanwhile."""
    from services.gpu_agent.arena.cuda import CudaMemory

    large = 256 << 20
    pages = torch.cuda.mem_get_info()[1] * 3 // 10 // large
    for closed in (True, False):
        for _ in range(4):
            arena = Arena(CudaMemory(large, pages, 0))
            weights = arena.add_weights("m", 4 * large)
            tensor = weights.tensor(torch.float32, (8,), 0)
            kv = arena.kv_view(torch.float32)
            weights.grow(2)
            tensor.fill_(1.0)
            torch.cuda.synchronize()
            if closed:
                arena.close()
                arena.close()
            del arena, weights, tensor, kv
            gc.collect()


@pytest.mark.parametrize(
    ("page_bytes", "num_pages", "message"),
    [(1 << 20, 1, "multiple of 2097152"), (0, 1, "multiple of"), (PAGE, 0, "at least one page")],
)
def test_sizes_that_make_no_arena_are_refused(page_bytes: int, num_pages: int, message: str) -> None:
    from services.gpu_agent.arena.cuda import CudaMemory

    with pytest.raises(ValueError, match=message):
        CudaMemory(page_bytes, num_pages, 0)


def test_more_memory_than_the_gpu_has_is_refused_before_it_is_taken() -> None:
    with pytest.raises(MemoryError, match=r"2097152 MiB was asked for, but the GPU has .* configure a smaller arena"):
        CUDA.memory(1 << 20)
    CUDA.memory(32).close()


def test_a_gpu_that_is_not_there_is_named_by_cuda() -> None:
    from services.gpu_agent.arena.cuda import CudaMemory
    from services.gpu_agent.cuda_driver import CudaError

    with pytest.raises(CudaError, match="CUDA_ERROR_INVALID_DEVICE"):
        CudaMemory(PAGE, 1, torch.cuda.device_count())
