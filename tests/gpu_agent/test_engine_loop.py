"""The engine's thread with real instances: several at once, orders from other threads, failures."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass, field

import pytest
import torch
import xgrammar
from transformers import PreTrainedModel

from services.gpu_agent.arena.arena import Arena
from services.gpu_agent.engine.grammar import Matcher
from services.gpu_agent.engine.instance import Instance
from services.gpu_agent.engine.kv import KvCache
from services.gpu_agent.engine.kv_spec import KvSpec
from services.gpu_agent.engine.loop import EngineLoop, EngineStopped
from services.gpu_agent.engine.sampling import Choice, NonFiniteLogits
from services.gpu_agent.engine.sampling_batch import Row
from services.gpu_agent.engine.sampling_params import Grammar, GrammarKind, SamplingParams
from services.gpu_agent.engine.sequence import FinishReason, Sequence, SequenceOutput
from services.gpu_agent.engine.step import Part, StepResult
from tests.gpu_agent.checkpoints import llama, mistral
from tests.gpu_agent.serving import Served, arena, end_of, generate, greedy, prompt, serve, tokens_of

PATIENCE = 60.0


@dataclass
class Listener:
    """Gathers what the engine says and lets a test wait for it."""

    outputs: list[SequenceOutput] = field(default_factory=list)
    order: list[str] = field(default_factory=list)  # instances, one entry per step with outputs
    failures: list[tuple[str, Exception]] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def on_step(self, instance_id: str, outputs: list[SequenceOutput]) -> None:
        with self.changed:
            self.outputs += outputs
            self.order.append(instance_id)
            self.changed.notify_all()

    def on_failure(self, instance_id: str, error: Exception) -> None:
        with self.changed:
            self.failures.append((instance_id, error))
            self.changed.notify_all()

    def wait(self, until: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(until, PATIENCE)

    def wait_ended(self, *request_ids: str) -> None:
        self.wait(lambda: set(request_ids) <= {o.request_id for o in self.outputs if o.finish_reason})

    def wait_started(self, request_id: str) -> None:
        self.wait(lambda: any(o.request_id == request_id for o in self.outputs))


@dataclass
class World:
    llama: Served
    mistral: Served
    references: dict[str, PreTrainedModel]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("models")
    memory = arena(40)
    one, one_reference = serve(memory, llama, folder, "llama")
    two, two_reference = serve(memory, mistral, folder, "mistral")
    one.load()
    two.load()
    yield World(one, two, {"llama": one_reference, "mistral": two_reference})
    memory.close()


@pytest.fixture
def listener() -> Listener:
    return Listener()


@pytest.fixture
def engine(world: World, listener: Listener) -> Iterator[EngineLoop]:
    engine = EngineLoop(listener.on_step, listener.on_failure)
    engine.start()
    yield engine
    engine.stop()
    assert not engine.alive
    world.llama.arena.check()
    assert world.llama.arena.usage().kv == 0


def test_two_instances_at_once(world: World, listener: Listener) -> None:
    first, second = world.llama.instance(), world.mistral.instance()
    engine = EngineLoop(listener.on_step, listener.on_failure)
    engine.activate(first)
    engine.activate(second)
    prompts = {f"{name}{n}": (name, prompt(n)) for name in ("llama", "mistral") for n in (4, 19, 33)}
    ids = {"llama": first.id, "mistral": second.id}
    for request, (name, asked) in prompts.items():
        engine.submit(ids[name], greedy(request, asked, 20))
    engine.start()  # only now, so that both have all their work from the first step on
    listener.wait_ended(*prompts)
    for request, (name, asked) in prompts.items():
        assert tokens_of(listener.outputs, request) == generate(world.references[name], asked, 20)
    assert set(listener.order[:20]) == {first.id, second.id}  # neither waits for the other's end
    stats = engine.stats(first.id)
    assert stats is not None
    assert (stats.generated_tokens, stats.running) == (60, 0)
    engine.stop()


@dataclass
class Clockwork:
    """A device on which every step takes the same time, and chooses token 1; steps are computed in order."""

    seconds: float
    depth: int = 2
    ahead: list[int] = field(default_factory=list)  # steps under way when each was launched
    lengths: list[int] = field(default_factory=list)  # tokens of each step
    under_way: int = 0

    def launch(self, parts: Many[Part], rows: Many[Row]) -> Clockwork.Step:
        self.ahead.append(self.under_way)
        self.lengths.append(sum(part.length for part in parts))
        self.under_way += 1
        return Clockwork.Step(self, len(rows))

    @dataclass
    class Step:
        device: Clockwork
        rows: int

        def result(self) -> StepResult:
            self.device.under_way -= 1
            return StepResult([Choice(1, None)] * self.rows, self.device.seconds)


def clockwork(memory: Arena, name: str, runner: Clockwork, **options: int) -> Instance:
    spec = KvSpec(layers=1, kv_heads=1, head_dim=8, dtype=torch.float32, block_tokens=4)
    cache = KvCache(memory, name, spec)
    return Instance(name, name, runner, cache, vocab_size=512, eos_ids=(), context_tokens=1000, max_batch=4, **options)


def within_grammar(request_id: str, text: str) -> Sequence:
    """A request of 50 tokens, of which token 1 is the letter a, and 0 the end."""
    vocabulary = ["</s>", "a", *(f"<{i}>" for i in range(2, 512))]
    compiler = xgrammar.GrammarCompiler(xgrammar.TokenizerInfo(vocabulary, stop_token_ids=[0]))
    params = SamplingParams(50, grammar=Grammar(GrammarKind.EBNF, text))
    return Sequence(request_id, 0, prompt(4), params, matcher=Matcher(compiler.compile_grammar(text), 512))


def test_instances_get_equal_shares_of_the_device_not_of_the_steps(listener: Listener) -> None:
    memory = arena(40, page_bytes=4096)
    engine = EngineLoop(listener.on_step, listener.on_failure)
    for name, seconds in (("quick", 0.001), ("slow", 0.003)):
        engine.activate(clockwork(memory, name, Clockwork(seconds)))
        engine.submit(name, greedy(name, prompt(4), 300))
    engine.start()
    listener.wait_ended("quick", "slow")
    engine.stop()
    both = listener.order[:200]
    assert both.count("quick") / both.count("slow") == pytest.approx(3, abs=0.2)


def test_a_long_prompt_does_not_hold_up_the_tokens_of_other_instances() -> None:
    """Alone it takes the device in larger pieces."""
    memory = arena(200, page_bytes=4096)
    runner = Clockwork(0.001)
    listener = Listener()

    def on_step(instance_id: str, outputs: list[SequenceOutput]) -> None:
        if not any(o.request_id == "other" for o in listener.outputs) and outputs[0].request_id == "other":
            engine.submit("long", greedy("beside", prompt(80, seed=1), 1))
        listener.on_step(instance_id, outputs)

    engine = EngineLoop(on_step, listener.on_failure)
    engine.activate(clockwork(memory, "other", Clockwork(0.001)))
    engine.activate(clockwork(memory, "long", runner, token_budget=10, prefill_budget=40))
    engine.submit("long", greedy("alone", prompt(80), 1))
    engine.start()
    listener.wait_ended("alone")
    assert runner.lengths == [40, 40]
    runner.lengths.clear()
    engine.submit("other", greedy("other", prompt(4), 900))
    listener.wait_ended("beside")
    engine.stop()
    assert runner.lengths == [10] * 8


def test_an_instance_that_was_idle_has_no_claim_on_the_others_time(listener: Listener) -> None:
    memory = arena(40, page_bytes=4096)
    engine = EngineLoop(listener.on_step, listener.on_failure)
    for name in ("old", "new"):
        engine.activate(clockwork(memory, name, Clockwork(0.001)))
    engine.submit("old", greedy("old", prompt(4), 200))
    engine.start()
    listener.wait_ended("old")
    engine.submit("old", greedy("again", prompt(4), 900))
    listener.wait_started("again")
    engine.submit("new", greedy("new", prompt(4), 100))
    listener.wait_ended("new")
    came = listener.order.index("new")
    assert 80 <= listener.order[came : listener.order.index("new") + 200].count("old") <= 120
    engine.stop()


def test_who_was_never_there_has_no_claim_on_the_time_of_who_is_idle_just_now() -> None:
    memory = arena(40, page_bytes=4096)
    listener = Listener()

    def on_step(instance_id: str, outputs: list[SequenceOutput]) -> None:
        if not any(o.request_id == "new" for o in listener.outputs) and outputs[0].request_id == "new":
            engine.submit("old", greedy("again", prompt(4), 100))
        listener.on_step(instance_id, outputs)

    engine = EngineLoop(on_step, listener.on_failure)
    engine.activate(clockwork(memory, "old", Clockwork(0.001)))
    engine.submit("old", greedy("old", prompt(4), 600))
    engine.start()
    listener.wait_ended("old")
    engine.activate(clockwork(memory, "new", Clockwork(0.001)))
    engine.submit("new", greedy("new", prompt(4), 900))
    listener.wait_ended("new", "again")
    engine.stop()
    came = listener.order.index("new")
    assert listener.order[came : came + 250].count("old") == 100


def test_who_waited_for_pages_has_no_claim_on_the_others_time() -> None:
    memory = arena(4, page_bytes=1 << 16)
    listener = Listener()
    engine = EngineLoop(lambda instance_id, outputs: on_step(instance_id, outputs), listener.on_failure)
    for name in ("waiting", "busy"):
        instance = clockwork(memory, name, Clockwork(0.001))
        if name == "busy":
            instance._kv.reserve(2)
        engine.activate(instance)
    taken = memory.take_kv("somebody", memory.free_pages)

    def on_step(instance_id: str, outputs: list[SequenceOutput]) -> None:
        listener.on_step(instance_id, outputs)
        if len(listener.order) == 300:
            memory.give_kv("somebody", taken)

    engine.submit("waiting", greedy("waiting", prompt(4), 200))
    engine.submit("busy", greedy("busy", prompt(4), 200))
    engine.submit("busy", greedy("busy too", prompt(4), 900))
    engine.start()
    listener.wait_ended("waiting")
    engine.stop()
    came = listener.order.index("waiting")
    assert came >= 300
    assert 40 <= listener.order[came : came + 100].count("busy") <= 60


def test_work_takes_turns(listener: Listener) -> None:
    engine = EngineLoop(listener.on_step, listener.on_failure)
    done: list[str] = []

    def work(name: str, pieces: int) -> Callable[[], bool]:
        def piece() -> bool:
            done.append(name)
            return done.count(name) < pieces

        return piece

    jobs = [engine.work(work(name, pieces)) for name, pieces in (("long", 4), ("short", 1), ("other", 2))]
    engine.start()
    for job in jobs:
        job.result(PATIENCE)
    assert done == ["long", "short", "other", "long", "other", "long", "long"]
    engine.stop()


def test_work_does_not_keep_an_instance_from_pages_that_come_back(listener: Listener) -> None:
    memory = arena(4, page_bytes=4096)
    engine = EngineLoop(listener.on_step, listener.on_failure)
    engine.activate(clockwork(memory, "short of pages", Clockwork(0.001)))
    taken = memory.take_kv("somebody", memory.free_pages)
    engine.submit("short of pages", greedy("a", prompt(4), 5))
    pieces = 0

    def piece() -> bool:
        nonlocal pieces
        pieces += 1
        if pieces == 3:
            memory.give_kv("somebody", taken)
        return pieces < 1000 and not any(o.finish_reason for o in listener.outputs)

    job = engine.work(piece)
    engine.start()
    job.result(PATIENCE)
    listener.wait_ended("a")
    assert 3 < pieces < 100
    engine.stop()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_work_is_never_left_waiting_when_the_engine_dies() -> None:
    jobs = []

    def on_step(instance_id: str, outputs: list[SequenceOutput]) -> None:
        jobs.append(engine.work(lambda: False))
        raise RuntimeError("the device is lost")

    engine = EngineLoop(on_step, lambda instance_id, error: None)
    engine.activate(clockwork(arena(4, page_bytes=4096), "it", Clockwork(0.001)))
    engine.submit("it", greedy("a", prompt(4), 5))
    engine.start()
    with pytest.raises(RuntimeError, match="device is lost"):
        engine.ended.result(PATIENCE)
    (job,) = jobs
    with pytest.raises(EngineStopped):
        job.result(PATIENCE)


def test_the_next_step_begins_before_the_last_has_ended(listener: Listener) -> None:
    memory = arena(40, page_bytes=4096)
    alone, runner = EngineLoop(listener.on_step, listener.on_failure), Clockwork(0.001)
    alone.activate(clockwork(memory, "alone", runner))
    alone.submit("alone", greedy("alone", prompt(4), 50))
    alone.start()
    listener.wait_ended("alone")
    assert runner.ahead[0] == 0
    assert set(runner.ahead[1:50]) == {1}
    # Penalties take the last token where it is; a grammar has to be told it first.
    runner.ahead.clear()
    alone.submit("alone", Sequence("penalised", 0, prompt(4), SamplingParams(50, presence_penalty=1.0)))
    listener.wait_ended("penalised")
    assert set(runner.ahead[1:50]) == {1}
    runner.ahead.clear()
    alone.submit("alone", within_grammar("follows", 'root ::= "a" root | "a"'))
    listener.wait_ended("follows")
    assert set(runner.ahead[2:]) == {0}
    alone.stop()


def test_cancel(world: World, engine: EngineLoop, listener: Listener) -> None:
    instance = world.llama.instance()
    engine.activate(instance).result(PATIENCE)
    engine.submit(instance.id, greedy("long", prompt(5), 240))
    engine.submit(instance.id, greedy("short", prompt(6), 10))
    listener.wait_started("long")
    engine.cancel("long")
    listener.wait_ended("long", "short")
    assert end_of(listener.outputs, "long").finish_reason is FinishReason.CANCELLED
    assert tokens_of(listener.outputs, "short") == generate(world.references["llama"], prompt(6), 10)


def test_deactivate_ends_its_sequences_and_no_others(world: World, engine: EngineLoop, listener: Listener) -> None:
    first, second = world.llama.instance(), world.mistral.instance()
    engine.activate(first).result(PATIENCE)
    engine.activate(second).result(PATIENCE)
    engine.submit(first.id, greedy("a", prompt(5), 240))
    engine.submit(second.id, greedy("b", prompt(6), 30))
    listener.wait_started("a")
    engine.deactivate(first.id).result(PATIENCE)
    # From now on nothing touches the first model: its weights can go.
    world.llama.weights.shrink(0)
    assert end_of(listener.outputs, "a").finish_reason is FinishReason.ERROR
    assert "deactivated" in end_of(listener.outputs, "a").error
    assert engine.stats(first.id) is None
    engine.submit(first.id, greedy("late", prompt(5), 5))
    listener.wait_ended("late", "b")
    assert "not active" in end_of(listener.outputs, "late").error
    assert tokens_of(listener.outputs, "b") == generate(world.references["mistral"], prompt(6), 30)
    engine.deactivate(first.id).result(PATIENCE)  # again, which changes nothing
    world.llama.load()


def test_evicted_and_woken_again(world: World, engine: EngineLoop, listener: Listener) -> None:
    for attempt in range(2):
        instance = world.llama.instance()
        engine.activate(instance).result(PATIENCE)
        engine.submit(instance.id, greedy(f"r{attempt}", prompt(12), 15))
        listener.wait_ended(f"r{attempt}")
        engine.deactivate(instance.id).result(PATIENCE)
        world.llama.weights.shrink(0)
        world.llama.load()
    expected = generate(world.references["llama"], prompt(12), 15)
    assert tokens_of(listener.outputs, "r0") == tokens_of(listener.outputs, "r1") == expected


def test_a_failing_instance_does_not_harm_the_other(world: World, engine: EngineLoop, listener: Listener) -> None:
    first, second = world.llama.instance(), world.mistral.instance()
    engine.activate(first).result(PATIENCE)
    engine.activate(second).result(PATIENCE)
    weight = world.llama.model.module.get_parameter("model.norm.weight")
    good = weight.clone()
    weight.data.fill_(float("nan"))
    engine.submit(second.id, greedy("well", prompt(6), 30))
    engine.submit(first.id, greedy("ill", prompt(5), 30))
    listener.wait(lambda: bool(listener.failures))
    weight.data.copy_(good)
    ((failed, error),) = listener.failures
    assert failed == first.id
    assert isinstance(error, NonFiniteLogits)
    assert end_of(listener.outputs, "ill").finish_reason is FinishReason.ERROR
    assert "NaN" in end_of(listener.outputs, "ill").error
    assert engine.stats(first.id) is None
    listener.wait_ended("well")
    assert tokens_of(listener.outputs, "well") == generate(world.references["mistral"], prompt(6), 30)


@dataclass
class Faulty:
    """A device whose steps fail when their results are asked for, however often that is."""

    depth: int = 2

    def launch(self, parts: Many[Part], rows: Many[Row]) -> Faulty:
        return self

    def result(self) -> StepResult:
        raise IndexError("the kernel's own fault")


def test_whatever_a_step_fails_with_the_others_go_on(world: World, engine: EngineLoop, listener: Listener) -> None:
    first, second = world.llama.instance(), world.mistral.instance()
    first._runner = Faulty()
    engine.activate(first).result(PATIENCE)
    engine.activate(second).result(PATIENCE)
    engine.submit(first.id, greedy("ill", prompt(5), 30))
    engine.submit(second.id, greedy("well", prompt(6), 30))
    listener.wait_ended("ill", "well")
    assert end_of(listener.outputs, "ill").finish_reason is FinishReason.ERROR
    assert tokens_of(listener.outputs, "well") == generate(world.references["mistral"], prompt(6), 30)
    assert [failed for failed, _ in listener.failures] == [first.id]


@pytest.mark.parametrize("order", ["cancel", "add"])
def test_an_order_that_fails_ends_its_instance_and_no_other(
    world: World, engine: EngineLoop, listener: Listener, order: str
) -> None:
    """Nobody waits for the order's own outcome: without that, its request would never end."""

    def broken(_: object) -> None:
        raise ValueError("the accounts are wrong")

    first, second = world.llama.instance(), world.mistral.instance()
    engine.activate(first).result(PATIENCE)
    engine.activate(second).result(PATIENCE)
    engine.submit(first.id, greedy("ill", prompt(5), 200))
    listener.wait_started("ill")
    setattr(first, order, broken)
    engine.submit(second.id, greedy("well", prompt(6), 30))
    if order == "add":
        engine.submit(first.id, greedy("late", prompt(7), 5))
    else:
        engine.cancel("ill")
    listener.wait(lambda: bool(listener.failures))
    assert "accounts" in str(listener.failures[0][1])
    listener.wait_ended("ill", "well")
    assert end_of(listener.outputs, "ill").finish_reason is FinishReason.ERROR
    assert tokens_of(listener.outputs, "well") == generate(world.references["mistral"], prompt(6), 30)


def test_a_step_that_loses_the_device_ends_the_engine(world: World, listener: Listener) -> None:
    """Nothing on it can go on: the agent learns of it at once, and what waits for the engine is told."""
    engine = EngineLoop(listener.on_step, listener.on_failure, is_fatal=lambda error: isinstance(error, IndexError))
    engine.start()
    first, second = world.llama.instance(), world.mistral.instance()
    first._runner = Faulty()
    engine.activate(first).result(PATIENCE)
    engine.activate(second).result(PATIENCE)
    engine.submit(first.id, greedy("ill", prompt(5), 30))
    with pytest.raises(IndexError, match="own fault"):
        engine.ended.result(PATIENCE)
    with pytest.raises(EngineStopped):
        engine.submit(second.id, greedy("well", prompt(6), 30))
    assert listener.failures == []  # no instance of an agent that is about to end goes back to warm
    for instance in (first, second):
        instance.close("cleared up")


def test_a_grammar_without_a_way_out_ends_its_own_request_only(listener: Listener) -> None:
    trapped = within_grammar("trapped", 'root ::= "a" rest\nrest ::= rest "c"')
    engine = EngineLoop(listener.on_step, listener.on_failure)
    engine.activate(clockwork(arena(4, page_bytes=4096), "it", Clockwork(0.001)))
    engine.submit("it", greedy("well", prompt(4), 50))
    engine.submit("it", trapped)
    engine.start()
    listener.wait_ended("trapped", "well")
    engine.stop()
    assert "neither go on" in end_of(listener.outputs, "trapped").error
    assert end_of(listener.outputs, "trapped").finish_reason is FinishReason.ERROR
    assert tokens_of(listener.outputs, "well") == [1] * 50
    assert not listener.failures


def test_waits_for_pages_that_somebody_else_gives_back(world: World, engine: EngineLoop, listener: Listener) -> None:
    memory = world.llama.arena
    taken = memory.take_kv("somebody", memory.free_pages)
    instance = world.llama.instance()
    engine.activate(instance).result(PATIENCE)
    engine.submit(instance.id, greedy("a", prompt(6), 10))
    # Orders are carried out in order, so the sequence has been queued when this one is done.
    engine.activate(world.mistral.instance()).result(PATIENCE)
    stats = engine.stats(instance.id)
    assert stats is not None
    assert (stats.waiting, stats.steps) == (1, 0)
    memory.give_kv("somebody", taken)
    listener.wait_ended("a")
    assert tokens_of(listener.outputs, "a") == generate(world.references["llama"], prompt(6), 10)


def test_two_instances_short_of_pages_both_finish(world: World, engine: EngineLoop, listener: Listener) -> None:
    """Each holds what the other needs; neither waits for ever."""
    memory = world.llama.arena
    first, second = world.llama.instance(), world.mistral.instance()
    tokens = 200
    needed = max(-(-i._kv.spec.blocks_for(tokens + 6) // i._kv.slots_per_page) for i in (first, second))
    assert needed >= 2
    taken = memory.take_kv("somebody", memory.free_pages - needed)
    engine.activate(first).result(PATIENCE)
    engine.activate(second).result(PATIENCE)
    engine.submit(first.id, greedy("a", prompt(6), tokens))
    engine.submit(second.id, greedy("b", prompt(6), tokens))
    listener.wait_ended("a", "b")
    assert tokens_of(listener.outputs, "a") == generate(world.references["llama"], prompt(6), tokens)
    assert tokens_of(listener.outputs, "b") == generate(world.references["mistral"], prompt(6), tokens)
    assert first.stats.preemptions + second.stats.preemptions > 0
    memory.give_kv("somebody", taken)


def test_one_id_is_active_once(world: World, engine: EngineLoop) -> None:
    instance = world.llama.instance()
    engine.activate(instance).result(PATIENCE)
    with pytest.raises(ValueError, match="active already"):
        engine.activate(instance).result(PATIENCE)


def test_stop_ends_what_runs(world: World, listener: Listener) -> None:
    engine = EngineLoop(listener.on_step, listener.on_failure)
    engine.start()
    instance = world.llama.instance()
    engine.activate(instance).result(PATIENCE)
    engine.submit(instance.id, greedy("a", prompt(5), 240))
    listener.wait_started("a")
    engine.submit(instance.id, greedy("b", prompt(5), 240))
    engine.stop()
    engine.stop()
    for name in "ab":
        assert end_of(listener.outputs, name).finish_reason is FinishReason.ERROR
        assert "stopping" in end_of(listener.outputs, name).error
    with pytest.raises(EngineStopped):
        engine.submit(instance.id, greedy("c", prompt(5), 5))
    assert world.llama.arena.usage().kv == 0


def test_stop_before_start(listener: Listener) -> None:
    engine = EngineLoop(listener.on_step, listener.on_failure)
    engine.stop()
    with pytest.raises(EngineStopped):
        engine.cancel("a")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_crash_is_noticed(world: World) -> None:
    """A callback that raises breaks its promise; then the engine says so instead of hanging."""

    def on_step(instance_id: str, outputs: list[SequenceOutput]) -> None:
        raise RuntimeError("the loop is closed")

    engine = EngineLoop(on_step, lambda instance_id, error: None)
    engine.start()
    instance = world.llama.instance()
    engine.activate(instance).result(PATIENCE)
    engine.submit(instance.id, greedy("a", prompt(5), 5))
    engine._thread.join(PATIENCE)
    assert not engine.alive
    with pytest.raises(EngineStopped):
        engine.activate(instance)
    instance.close("cleared up")
