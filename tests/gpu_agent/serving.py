"""Real checkpoints, images and arenas put together, for tests of the engine."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel

from services.gpu_agent.arena.arena import Arena
from services.gpu_agent.arena.host import HostMemory
from services.gpu_agent.arena.weight_range import WeightRange
from services.gpu_agent.engine.host_runner import HostRunner
from services.gpu_agent.engine.instance import Instance
from services.gpu_agent.engine.kv import KvCache
from services.gpu_agent.engine.kv_spec import KvSpec
from services.gpu_agent.engine.kv_tensors import KvTensors
from services.gpu_agent.engine.model import BoundModel, build_model
from services.gpu_agent.engine.sampling_params import SamplingParams
from services.gpu_agent.engine.sequence import Sequence, SequenceOutput
from services.gpu_agent.weights.building import prepare_image
from services.gpu_agent.weights.checkpoint import Checkpoint
from services.gpu_agent.weights.image import Image, open_image
from services.gpu_agent.weights.layout import ImageLayout, plan_layout
from services.gpu_agent.weights.loader import load

PAGE_BYTES = 1 << 16
_ids = itertools.count()


def arena(num_pages: int, page_bytes: int = PAGE_BYTES) -> Arena:
    """An arena on host memory."""
    return Arena(HostMemory(page_bytes, num_pages))


def kv_tensors(arena: Arena, spec: KvSpec) -> KvTensors:
    """The KV blocks of a model in an arena as tensors."""
    return KvTensors(arena.kv_view(spec.dtype), arena.page_bytes, spec.slots_per_page(arena.page_bytes), spec)


@dataclass
class Served:
    """A checkpoint with its image, its weight range in an arena, and the model bound to that."""

    arena: Arena
    checkpoint: Checkpoint
    image: Image
    weights: WeightRange
    model: BoundModel

    def load(self) -> None:
        """Makes all weights resident."""
        assert load(self.image, self.weights, cancel=threading.Event(), progress=lambda _: None).complete

    def instance(self, *, eos: bool = False, clock: Callable[[], float] | None = None, **options: int) -> Instance:
        """A new instance of it."""
        name = f"{self.weights.name}-{next(_ids)}"
        eos_ids = frozenset(self.checkpoint.eos_token_ids if eos else ())
        spec = self.model.kv_spec
        tensors = kv_tensors(self.arena, spec)
        return Instance(
            name,
            self.weights.name,
            HostRunner(self.model, tensors, eos_ids),
            KvCache(self.arena, name, spec, tensors.clear),
            vocab_size=self.model.vocab_size,
            eos_ids=eos_ids,
            context_tokens=options.pop("context_tokens", self.checkpoint.context_tokens or 0),
            **({"clock": clock} if clock else {}),
            **options,
        )


def serve(
    arena: Arena, make: Callable[[Path], PreTrainedModel], folder: Path, name: str, block_tokens: int = 4
) -> tuple[Served, PreTrainedModel]:
    """Saves a checkpoint with `make` and binds it to an arena, with nothing resident; also returns the reference."""
    reference = make(folder / name)
    checkpoint = Checkpoint.open(folder / name, [folder])
    shapes = {tensor: stored.shape for tensor, stored in checkpoint.tensors.items()}
    layout = plan_layout(shapes, checkpoint.aliases, checkpoint.dtype, arena.page_bytes)
    image = open_image(prepare_image(checkpoint, layout, folder / "images", lambda done, total: None))
    weights = arena.add_weights(name, layout.total_bytes)
    model = build_model(checkpoint.model_config, layout, weights, block_tokens)
    return Served(arena, checkpoint, image, weights, model), reference


@dataclass
class Files:
    """A checkpoint and its image."""

    checkpoint: Checkpoint
    layout: ImageLayout
    image: Image


def serve_files(
    arena: Arena, make: Callable[..., PreTrainedModel], folder: Path, name: str, dtype: torch.dtype
) -> tuple[Files, WeightRange, PreTrainedModel]:
    """Saves a checkpoint and reserves its range in an arena on any device, with nothing resident or bound."""
    reference = make(folder / name, dtype=dtype)
    checkpoint = Checkpoint.open(folder / name, [folder])
    layout = plan_layout(
        checkpoint.shapes, checkpoint.aliases, dtype, arena.page_bytes, float32=checkpoint.delicate[dtype]
    )
    image = open_image(prepare_image(checkpoint, layout, folder / "images", lambda done, total: None))
    return Files(checkpoint, layout, image), arena.add_weights(name, layout.total_bytes), reference


def generate(reference: PreTrainedModel, prompt: list[int], tokens: int, eos: int | None = None) -> list[int]:
    """What transformers itself generates greedily."""
    config = GenerationConfig(do_sample=False, max_new_tokens=tokens, eos_token_id=eos, pad_token_id=0)
    output = reference.generate(torch.tensor([prompt]), generation_config=config)
    return output[0, len(prompt) :].tolist()


def prompt(length: int, seed: int = 0, vocabulary: int = 512) -> list[int]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(1000 * length + seed)
    return torch.randint(3, vocabulary, (length,), generator=generator).tolist()


def greedy(request_id: str, prompt: list[int], max_tokens: int, **options: object) -> Sequence:
    """A sequence that takes the likeliest tokens."""
    return Sequence(request_id, 0, list(prompt), SamplingParams(max_tokens, temperature=0.0), **options)  # type: ignore[arg-type]


def run(instance: Instance, limit: int = 2000) -> list[SequenceOutput]:
    """Steps until nothing is left to do; checks the arena after each step."""
    outputs: list[SequenceOutput] = []
    for _ in range(limit):
        if not instance.has_work:
            return outputs
        outputs += instance.step()
        instance._kv._arena.check()
    raise AssertionError(f"still busy after {limit} steps")


def tokens_of(outputs: list[SequenceOutput], request_id: str, attempt: int = 0) -> list[int]:
    """A request's answer, put together as a router does; its offsets must have neither gap nor repeat."""
    mine = [o for o in outputs if (o.request_id, o.attempt) == (request_id, attempt)]
    answer: list[int] = []
    for output in mine:
        assert output.offset == mine[0].offset + len(answer)
        answer += output.token_ids
    assert [o.finish_reason is not None for o in mine] == [False] * (len(mine) - 1) + [True]
    return answer


def end_of(outputs: list[SequenceOutput], request_id: str) -> SequenceOutput:
    """A request's last output."""
    (end,) = [o for o in outputs if o.request_id == request_id and o.finish_reason]
    return end
