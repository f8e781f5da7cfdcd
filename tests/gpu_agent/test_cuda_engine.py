"""The engine on a GPU: the same answers alone and in a batch, captured or not, across evictions; what fails, alone."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, PreTrainedModel

from services.gpu_agent.arena.arena import Arena
from services.gpu_agent.arena.weight_range import WeightRange
from services.gpu_agent.engine.arrival import Behind
from services.gpu_agent.engine.instance import Instance
from services.gpu_agent.engine.kv import KvCache
from services.gpu_agent.engine.loop import EngineLoop
from services.gpu_agent.engine.sampling_params import SamplingParams
from services.gpu_agent.engine.sequence import FinishReason, Sequence, SequenceOutput
from services.gpu_agent.weights.loader import load
from tests.gpu_agent.arena_backends import append
from tests.gpu_agent.checkpoints import FAMILIES, save
from tests.gpu_agent.serving import Files, greedy, prompt, run, serve_files, tokens_of

pytestmark = pytest.mark.gpu

PAGE_BYTES = 2 << 20
# float32, so that greedy tokens can be told from transformers' own: the engine's arithmetic is the same.
SAME_TOKENS = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "olmo2"]


@dataclass
class Model:
    """A checkpoint served on the GPU."""

    arena: Arena
    files: Files
    weights: WeightRange
    program: Any  # a CudaProgram, which cannot be imported without CUDA
    reference: PreTrainedModel
    made: int = 0

    def instance(self, **options: int) -> Instance:
        self.made += 1
        name = f"{self.weights.name}-{self.made}"
        limits = self.program.limits
        return Instance(
            name,
            self.weights.name,
            self.program.runner(frozenset()),
            KvCache(self.arena, name, self.program.model.kv_spec),
            vocab_size=self.program.model.vocab_size,
            eos_ids=(),
            context_tokens=512,
            **{
                "max_batch": limits.max_batch,
                "token_budget": limits.token_budget,
                "max_prefills": limits.max_prefills,
                "prefill_budget": limits.prefill_budget,
                **options,
            },
        )

    def load(self) -> None:
        assert load(self.files.image, self.weights, cancel=threading.Event(), progress=lambda _: None).complete

    def generate(self, ids: list[int], tokens: int) -> list[int]:
        with torch.inference_mode():
            output = self.reference.generate(
                torch.tensor([ids], device="cuda"), do_sample=False, max_new_tokens=tokens, pad_token_id=0
            )
        return output[0, len(ids) :].tolist()


@dataclass
class World:
    arena: Arena
    backend: Any  # a CudaBackend
    folder: Path
    models: dict[str, Model] = field(default_factory=dict)

    def model(self, family: str, dtype: torch.dtype = torch.float32) -> Model:
        return self.of(f"{family}-{dtype}", FAMILIES[family], dtype)

    def of(self, name: str, make: Callable[..., PreTrainedModel], dtype: torch.dtype) -> Model:
        if name not in self.models:
            files, weights, reference = serve_files(self.arena, make, self.folder, name, dtype)
            program = self.backend.program(files.checkpoint.model_config, files.layout, weights, 8, 512)
            model = Model(self.arena, files, weights, program, reference.cuda())
            model.load()
            while program.prepare():
                pass
            self.models[name] = model
        return self.models[name]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    from services.gpu_agent.arena.cuda import CudaMemory
    from services.gpu_agent.engine.cuda.backend import CudaBackend

    arena = Arena(CudaMemory(PAGE_BYTES, 96, 0))
    return World(arena, CudaBackend(arena, torch.device("cuda", 0), 1 << 30), tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("family", SAME_TOKENS)
def test_tokens_are_those_of_transformers(world: World, family: str) -> None:
    model = world.model(family)
    instance = model.instance(token_budget=32, prefill_budget=48)  # prompts in chunks, mixed with others' decoding
    asked = {f"r{n}": prompt(n) for n in (1, 5, 33, 64, 150)}
    for name, ids in asked.items():
        instance.add(greedy(name, ids, 24))
    outputs = run(instance)
    for name, ids in asked.items():
        assert tokens_of(outputs, name) == model.generate(ids, 24)
    instance.close("")


def test_sampling_does_not_depend_on_the_batch(world: World) -> None:
    model = world.model("llama")

    def ask(instance: Instance, count: int) -> list[list[int]]:
        for i in range(count):
            params = SamplingParams(20, temperature=0.9, top_p=0.95, top_k=40, seed=i)
            instance.add(Sequence(f"s{i}", 0, prompt(20, i), params))
        outputs = run(instance)
        instance.close("")
        return [tokens_of(outputs, f"s{i}") for i in range(count)]

    assert ask(model.instance(), 8)[0] == ask(model.instance(), 1)[0]


def test_penalties_know_tokens_that_only_the_device_knows(world: World) -> None:
    """The next step is prepared before the CPU knows its last token, and chooses as if it did."""
    model = world.model("llama")

    def ask(depth: int) -> list[list[int]]:
        instance = model.instance()
        instance._runner.depth = depth
        for i in range(4):
            rates = {"repetition_penalty": 1.0 + 0.3 * i, "frequency_penalty": 0.7 * (i % 2), "presence_penalty": 0.5}
            params = SamplingParams(30, temperature=0.5 * (i % 3), seed=i, **rates)
            instance.add(Sequence(f"s{i}", 0, prompt(20, i), params))
        instance.add(greedy("plain", prompt(30), 30))
        outputs: list[SequenceOutput] = []
        while instance.has_work:
            while instance.in_flight < instance.depth and instance.launch():
                pass
            assert instance.in_flight <= depth
            if instance.in_flight:
                instance.collect()
            outputs += instance.news()
        instance.close("")
        return [tokens_of(outputs, name) for name in ("s0", "s1", "s2", "s3", "plain")]

    one_after_another = ask(1)
    assert ask(2) == one_after_another
    assert one_after_another[4] == model.generate(prompt(30), 30)


def test_eviction_and_reload_capture_nothing_anew(world: World) -> None:
    model = world.model("llama")
    instance = model.instance()
    instance.add(greedy("a", prompt(40), 20))
    before = tokens_of(run(instance), "a")
    instance.close("")
    captures = model.program.cuda.captures
    assert captures == len(model.program.cuda.ladder.shapes)
    torch.cuda.synchronize()
    model.weights.shrink(0)
    filler = world.arena.take_kv("somebody else", 5)  # so that the weights come to lie on other pages
    model.load()
    world.arena.give_kv("somebody else", filler)
    assert not model.program.prepare()
    again = model.instance()
    again.add(greedy("b", prompt(40), 20))
    assert tokens_of(run(again), "b") == before
    assert model.program.cuda.captures == captures
    again.close("")


LATE = LlamaConfig(
    vocab_size=512,
    hidden_size=512,
    intermediate_size=1024,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=512,
)


def arriving(world: World) -> tuple[Model, Callable[[], None]]:
    """A model of which nothing is resident, and what has its next page arrive."""
    late = world.of("late", lambda folder, dtype: save(LATE, folder, dtype=dtype), torch.float32)
    torch.cuda.synchronize()
    late.weights.shrink(0)
    assert late.weights.num_pages > 8
    staging = torch.empty(PAGE_BYTES, dtype=torch.uint8)

    def fill(index: int, page: torch.Tensor) -> None:
        late.files.image.read_page(index, staging)
        page.copy_(staging)
        torch.cuda.synchronize()

    return late, lambda: append(late.weights, fill)


def test_a_prompt_is_computed_behind_the_copy_with_others_steps_between_its_layers(world: World) -> None:
    """A layer that began too early would touch pages that are not mapped, which no later test would survive."""
    late, arrive = arriving(world)
    other = world.model("mistral")
    waiting, going = late.instance(), other.instance()
    waiting.add(greedy("late", prompt(90), 12))
    going.add(greedy("other", prompt(50), 60))
    assert waiting.launch()
    assert waiting.is_behind
    outputs = going.step()
    behind = 0
    while not waiting.advance():
        behind += 1
        arrive()
        outputs += going.step()
    assert behind > 8
    while not late.weights.complete:
        arrive()
    waiting.collect()
    assert tokens_of(waiting.news() + run(waiting), "late") == late.generate(prompt(90), 12)
    assert tokens_of(outputs + run(going), "other") == other.generate(prompt(50), 60)
    # Given up half way, nothing computes any more and the pages can go.
    late.weights.shrink(late.weights.num_pages // 2)
    waiting.add(greedy("given up", prompt(90, 1), 12))
    assert waiting.launch()
    assert not waiting.advance()
    waiting.close("")
    late.weights.shrink(0)
    going.close("")
    late.load()


def test_a_pass_behind_the_copy_that_the_copy_overtakes_is_computed_at_once(world: World) -> None:
    """And what it has left in its layers is in nobody's way: not of that step, nor of one behind a later copy."""
    late, arrive = arriving(world)
    instance = late.instance()
    for seed, overtaken in ((1, True), (2, False), (3, True)):
        late.weights.shrink(0)
        instance.add(greedy(f"r{seed}", prompt(90, seed), 12))
        assert instance.launch()
        while not instance.advance():
            arrive()
            while overtaken and late.weights.resident_pages > late.weights.num_pages // 3 and not late.weights.complete:
                arrive()
        pending = instance._flights[-1].pending
        assert isinstance(pending, Behind)
        assert pending._dropped == overtaken
        while not late.weights.complete:
            arrive()
        instance.collect()
        assert tokens_of(instance.news() + run(instance), f"r{seed}") == late.generate(prompt(90, seed), 12)
        torch.cuda.synchronize()
    instance.close("")


def test_a_common_prefix_is_computed_once(world: World) -> None:
    model = world.model("llama")
    instance = model.instance()
    instance._kv.reserve(4)
    shared = prompt(70)
    instance.add(greedy("a", [*shared, 5], 8))
    run(instance)
    instance.add(greedy("b", [*shared, 6], 8))
    answer = tokens_of(run(instance), "b")
    assert instance.stats.shared_tokens == 64
    assert answer == model.generate([*shared, 6], 8)
    at_once = {"c": [*prompt(300), 5], "d": [*prompt(300), 5], "e": [*prompt(300), 6, 7]}  # in one step
    for name, tokens in at_once.items():
        instance.add(greedy(name, tokens, 8))
    outputs = run(instance)
    assert instance.stats.shared_tokens == 64 + 2 * 288
    assert {name: tokens_of(outputs, name) for name in at_once} == {
        name: model.generate(tokens, 8) for name, tokens in at_once.items()
    }
    instance.close("")


def test_serving_takes_no_memory_outside_the_arena(world: World) -> None:
    model = world.model("llama")
    for params in (
        SamplingParams(10, temperature=0.0),
        SamplingParams(10, top_k=20, top_p=0.9, min_p=0.01, seed=1, presence_penalty=0.5, logit_bias={7: 2.0}),
        SamplingParams(10, logprobs=5),
    ):
        instance = model.instance()
        for i in range(8):
            instance.add(Sequence(f"m{i}", 0, prompt(30 + i), params))
        run(instance)
        instance.close("")
    with world.backend.workspace.growing():
        pass  # what was taken so far is all there will be
    instance = model.instance()
    for i in range(40):
        options = {"temperature": 0.5 + i / 40, "top_k": i, "logprobs": i % 6, "seed": i}
        instance.add(Sequence(f"n{i}", 0, prompt(10 + 8 * i), SamplingParams(10 + i, **options)))
    run(instance)
    instance.close("")
    assert world.backend.outside.grown == 0


@dataclass
class Listener:
    outputs: list[SequenceOutput] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def on_step(self, _: str, outputs: list[SequenceOutput]) -> None:
        with self.changed:
            self.outputs += outputs
            self.changed.notify_all()

    def on_failure(self, instance_id: str, _: Exception) -> None:
        with self.changed:
            self.failures.append(instance_id)
            self.changed.notify_all()

    def wait_ended(self, count: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: sum(o.finish_reason is not None for o in self.outputs) >= count, 60)


def test_an_instance_with_damaged_weights_fails_alone(world: World) -> None:
    good, bad = world.model("llama"), world.model("qwen3")
    listener = Listener()
    engine = EngineLoop(listener.on_step, listener.on_failure)
    one, two = good.instance(), bad.instance()
    bad.weights.page_view(0).fill_(0xFF)
    torch.cuda.synchronize()
    engine.activate(one)
    engine.activate(two)
    engine.submit(one.id, greedy("good", prompt(20), 40))
    engine.submit(two.id, greedy("bad", prompt(20), 40))
    engine.start()
    listener.wait_ended(2)
    engine.stop()
    assert listener.failures == [two.id]
    end = next(o for o in listener.outputs if o.request_id == "bad")
    assert end.finish_reason is FinishReason.ERROR
    assert tokens_of(listener.outputs, "good") == good.generate(prompt(20), 40)
    bad.weights.shrink(0)
    bad.load()


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2", "phi3"])
def test_half_precision_agrees_with_itself_in_and_out_of_a_batch(world: World, family: str) -> None:
    """Log probabilities of the first tokens, within what bfloat16 can tell, alone and beside seven others.

    Not of mixtures of experts: what rounding does to a random router's choice has no bound.
    """
    model = world.model(family, torch.bfloat16)

    def first(count: int) -> dict[int, float]:
        instance = model.instance()
        for i in range(count):
            instance.add(Sequence(f"h{i}", 0, prompt(30, i), SamplingParams(1, temperature=0.0, logprobs=5)))
        outputs = run(instance)
        instance.close("")
        (mine,) = [o for o in outputs if o.request_id == "h0"]
        return dict(mine.logprobs[0].top)

    alone, beside = first(1), first(8)
    common = alone.keys() & beside.keys()
    assert len(common) >= 3
    assert all(alone[token] == pytest.approx(beside[token], abs=0.15) for token in common)


def test_rows_that_the_graph_chooses_for_and_others_in_turn(world: World) -> None:
    """One with a bias comes and goes beside plain ones, which get before, with and behind it what they get alone."""
    model = world.model("llama")

    def ask(*requests: tuple[str, dict[str, Any], int]) -> dict[str, list[int]]:
        instance, outputs = model.instance(), []
        for name, options, seed in requests:
            if options.get("logit_bias"):  # while the others are under way
                for _ in range(4):
                    outputs += instance.step()
            params = SamplingParams(6 if options.get("logit_bias") else 24, seed=seed, **options)
            instance.add(Sequence(name, 0, prompt(20, seed), params))
        while instance.has_work:  # two steps under way wherever that may be
            while instance.in_flight < instance.depth and instance.launch():
                pass
            if instance.in_flight:
                instance.collect()
            outputs += instance.news()
        instance.close("")
        return {name: tokens_of(outputs, name) for name, _, _ in requests}

    requests = (
        ("greedy", {"temperature": 0.0}, 1),
        ("drawn", {"temperature": 0.9, "top_k": 40}, 2),
        ("biased", {"temperature": 0.0, "logit_bias": {7: 50.0}}, 3),
    )
    together = ask(*requests)
    assert together["biased"] == [7] * 6
    assert together == {name: tokens for request in requests for name, tokens in ask(request).items()}


def watch_shapes(model: Model, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The shapes that are launched as graphs from now on."""
    captured, seen = model.program.cuda.captured, []

    def watching(shape: Any) -> Any:
        seen.append(shape)
        return captured(shape)

    monkeypatch.setattr(model.program.cuda, "captured", watching)
    return seen


def test_a_long_prompt_by_itself_is_answered_as_in_chunks(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's attention over all of it, and ours over pages, within what bfloat16 can tell; what follows is alike."""
    from services.gpu_agent.engine.cuda import pack

    monkeypatch.setattr(pack, "_MOST_ALONE", 64)
    model = world.of("long", FAMILIES["llama"], torch.bfloat16)
    assert model.program.cuda.ladder.whole
    ids = prompt(230, 3)  # of which the likeliest token is by far the likeliest

    def top(**options: int) -> list[dict[int, float]]:
        instance = model.instance(**options)
        instance.add(Sequence("whole", 0, ids, SamplingParams(2, temperature=0.0, logprobs=8)))
        outputs = run(instance)
        instance.close("")
        return [dict(said.top) for output in outputs for said in output.logprobs]

    with torch.inference_mode():
        reference = model.reference(torch.tensor([ids], device="cuda")).logits[0, -1].float().log_softmax(-1)
    seen = watch_shapes(model, monkeypatch)
    whole = top()
    assert any(shape in model.program.cuda.ladder.whole for shape in seen)
    seen.clear()
    chunks = top(token_budget=32, prefill_budget=48)
    assert not any(shape in model.program.cuda.ladder.whole for shape in seen)
    assert all(value == pytest.approx(float(reference[token]), abs=0.15) for token, value in whole[0].items())
    for one, other in zip(whole, chunks, strict=True):
        common = one.keys() & other.keys()
        assert len(common) >= 5
        assert all(one[token] == pytest.approx(other[token], abs=0.15) for token in common)


@pytest.mark.parametrize("budget", [20, 48, 100, 400])
def test_half_precision_is_as_near_to_float32_as_transformers(world: World, budget: int) -> None:
    """In steps of every kind of product (see model._CUBLASLT_TOKENS), with all of a prompt or a chunk at a time."""
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=512,
    )
    model = world.of("wide", lambda folder, dtype: save(config, folder, dtype=dtype), torch.bfloat16)
    exact = copy.deepcopy(model.reference).float()
    for seed in range(4):
        ids = prompt(230, seed)
        instance = model.instance(token_budget=budget, prefill_budget=budget)
        instance.add(Sequence("r", 0, ids, SamplingParams(1, temperature=0.0, logprobs=8)))
        (output,) = [output for output in run(instance) if output.logprobs]
        instance.close("")
        with torch.inference_mode():
            asked = torch.tensor([ids], device="cuda")
            wanted, theirs = (m(asked).logits[0, -1].float().log_softmax(-1) for m in (exact, model.reference))
        top = dict(output.logprobs[0].top)
        allowed = 2 * max(abs(float(theirs[token] - wanted[token])) for token in top) + 0.05
        assert max(abs(value - float(wanted[token])) for token, value in top.items()) < allowed
