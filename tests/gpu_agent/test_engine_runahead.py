"""Steps begun before the one before has told its tokens: the answers are the same, and nothing of a surplus step leaks.

What runs here are the engine's own instance, scheduler and KV cache. The device is one that computes at once but tells
late, and resolves "the token that this slot chose last" itself, as a GPU does: with a tiny model's arithmetic, or, for
many random histories, with a model whose next token is a hash of all tokens that it finds in the KV blocks.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Many
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from services.gpu_agent.arena.arena import Arena
from services.gpu_agent.engine.host_runner import HostRunner
from services.gpu_agent.engine.instance import Instance
from services.gpu_agent.engine.kv import KvCache
from services.gpu_agent.engine.kv_spec import KvSpec
from services.gpu_agent.engine.sampling import Choice
from services.gpu_agent.engine.sampling_batch import Row, TokenHistory
from services.gpu_agent.engine.sampling_params import SamplingParams
from services.gpu_agent.engine.sequence import FinishReason, Sequence, SequenceOutput
from services.gpu_agent.engine.step import Part, StepResult
from tests.gpu_agent.checkpoints import FAMILIES
from tests.gpu_agent.serving import Served, arena, end_of, generate, greedy, kv_tensors, prompt, serve, tokens_of


@dataclass
class Hidden:
    """A step whose result is not known before it is asked for."""

    runner: LateRunner
    outcome: StepResult
    blocks: set[int]
    """That it may touch."""

    def result(self) -> StepResult:
        assert self.runner.under_way.popleft() is self, "steps end in the order in which they began"
        return self.outcome


class LateRunner:
    """A Runner over a function that computes a step at once."""

    def __init__(self, compute: Callable[[Many[Part], Many[Row]], list[Choice]], depth: int) -> None:
        self.depth = depth
        self.under_way: deque[Hidden] = deque()
        self.resolved = 0
        """Tokens that the instance did not know when it began the step that computes them."""
        self._compute = compute
        self._last: dict[int, int] = {}

    def launch(self, parts: Many[Part], rows: Many[Row]) -> Hidden:
        assert len(self.under_way) < self.depth
        assert len({part.slot for part in parts}) == len(parts)
        self.resolved += sum(not part.token_ids for part in parts)
        known = [part if part.token_ids else replace(part, token_ids=[self._last[part.slot]]) for part in parts]
        slots = [part.slot for part in parts if part.samples]
        assert all(row.pending_slot in (None, slot) for row, slot in zip(rows, slots, strict=True))
        choices = self._compute(known, [self._with_last(row) for row in rows])
        for slot, choice in zip(slots, choices, strict=True):
            self._last[slot] = choice.token
        blocks = {block for part in parts for block in part.blocks}
        self.under_way.append(Hidden(self, StepResult(choices, 0.001), blocks))
        return self.under_way[-1]

    def _with_last(self, row: Row) -> Row:
        """With the token in its history that the device chose last."""
        if row.history is None or row.pending_slot is None:
            return row
        history = deepcopy(row.history)
        history.append(self._last[row.pending_slot])
        return replace(row, history=history, pending_slot=None)


def turn(instance: Instance) -> list[SequenceOutput]:
    """Begins as many steps as may be, and ends the oldest, as the engine's loop does."""
    while instance.in_flight < instance.depth and instance.launch():
        pass
    if instance.in_flight:
        instance.collect()
    return instance.news()


def run(instance: Instance, limit: int = 3000) -> list[SequenceOutput]:
    outputs: list[SequenceOutput] = []
    for _ in range(limit):
        if not instance.has_work:
            return outputs
        outputs += turn(instance)
    raise AssertionError(f"still busy after {limit} turns")


# With a model's own arithmetic

PROMPTS = {f"r{length}": prompt(length) for length in (1, 3, 8, 9, 21, 40)}
TOKENS = {name: 12 + 3 * i for i, name in enumerate(PROMPTS)}
_names = count()


@dataclass
class Case:
    served: Served
    reference: PreTrainedModel
    expected: dict[str, list[int]]

    def instance(self, depth: int = 2, eos_ids: frozenset[int] = frozenset(), **options: Any) -> Instance:
        """An instance on a device that is `depth` steps ahead."""
        spec = self.served.model.kv_spec
        tensors = kv_tensors(self.served.arena, spec)
        host = HostRunner(self.served.model, tensors, eos_ids)
        name = f"late-{next(_names)}"
        return Instance(
            name,
            "model",
            LateRunner(lambda parts, rows: host.launch(parts, rows).result().choices, depth),
            KvCache(self.served.arena, name, spec, tensors.clear),
            vocab_size=self.served.model.vocab_size,
            eos_ids=eos_ids,
            context_tokens=256,
            **options,
        )

    def check_idle(self, instance: Instance) -> None:
        assert instance.in_flight == instance.stats.kv_pages == self.served.arena.usage().kv == 0
        self.served.arena.check()


@pytest.fixture(scope="module", params=["llama", "gemma2", "gpt_oss"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    torch.set_num_threads(1)
    memory = arena(40)
    served, reference = serve(memory, FAMILIES[request.param], tmp_path_factory.mktemp("models"), request.param)
    served.load()
    yield Case(served, reference, {name: generate(reference, PROMPTS[name], TOKENS[name]) for name in PROMPTS})
    memory.close()


def resolved(instance: Instance) -> int:
    runner = instance._runner
    assert isinstance(runner, LateRunner)
    return runner.resolved


def test_alone_and_mixed(case: Case) -> None:
    for token_budget in (6, 17, 512):
        instance = case.instance(token_budget=token_budget, max_batch=6)
        outputs = []
        for name in PROMPTS:
            instance.add(greedy(name, PROMPTS[name], TOKENS[name]))
            outputs += turn(instance)
        outputs += run(instance)
        assert {name: tokens_of(outputs, name) for name in PROMPTS} == case.expected
        assert resolved(instance) > 30
        # No step was begun for a token that nobody wants.
        assert instance.stats.generated_tokens == sum(TOKENS.values())
        case.check_idle(instance)


def test_nothing_is_computed_beyond_the_length(case: Case) -> None:
    instance = case.instance()
    instance.add(greedy("r21", PROMPTS["r21"], TOKENS["r21"]))
    outputs = run(instance)
    assert tokens_of(outputs, "r21") == case.expected["r21"]
    assert instance.stats.steps == TOKENS["r21"]
    assert instance.stats.computed_tokens == len(PROMPTS["r21"]) + TOKENS["r21"] - 1
    assert resolved(instance) == TOKENS["r21"] - 1


def test_preempted_with_tokens_under_way(case: Case) -> None:
    memory = case.served.arena
    instance = case.instance(token_budget=24, max_batch=6)
    kv = instance._kv
    blocks = kv.spec.blocks_for(max(len(PROMPTS[name]) + TOKENS[name] for name in PROMPTS))
    pages = -(-blocks // kv.slots_per_page)
    spare = memory.take_kv("spare", memory.free_pages - pages)
    held = kv.try_alloc(kv.slots_per_page * pages - blocks)
    assert held is not None
    for name in PROMPTS:
        instance.add(greedy(name, PROMPTS[name], TOKENS[name]))
    outputs = run(instance)
    assert {name: tokens_of(outputs, name) for name in PROMPTS} == case.expected
    assert instance.stats.preemptions > 0
    kv.free(held)
    memory.give_kv("spare", spare)
    case.check_idle(instance)


def test_the_token_of_a_surplus_step_does_not_leak(case: Case) -> None:
    """When a stop token is known, the step behind it is under way already."""
    name, at = "r21", 5
    stop = case.expected[name][at]
    short = case.expected[name][: case.expected[name].index(stop) + 1]
    for ends in ("eos", "stop_token_ids"):
        instance = case.instance(eos_ids=frozenset([stop]) if ends == "eos" else frozenset())
        stops = frozenset() if ends == "eos" else frozenset([stop])
        instance.add(Sequence(name, 0, [*PROMPTS[name]], SamplingParams(30, temperature=0.0, stop_token_ids=stops)))
        instance.add(greedy("r9", PROMPTS["r9"], 2))
        outputs = run(instance)
        assert tokens_of(outputs, name) == short
        assert end_of(outputs, name).finish_reason is FinishReason.STOP
        # Each of them was computed for once more than its answer has tokens, but for the one that ends by length.
        assert instance.stats.generated_tokens == len(short) + len(tokens_of(outputs, "r9"))
        case.check_idle(instance)


def test_a_slot_is_taken_over_while_a_surplus_step_is_under_way(case: Case) -> None:
    """With one slot, the next sequence begins behind a step of the last one."""
    stop = case.expected["r9"][3]
    instance = case.instance(max_batch=1)
    params = SamplingParams(30, temperature=0.0, stop_token_ids=frozenset([stop]))
    instance.add(Sequence("r9", 0, [*PROMPTS["r9"]], params))
    instance.add(greedy("r21", PROMPTS["r21"], TOKENS["r21"]))
    outputs = run(instance)
    assert tokens_of(outputs, "r9") == case.expected["r9"][: case.expected["r9"].index(stop) + 1]
    assert tokens_of(outputs, "r21") == case.expected["r21"]
    case.check_idle(instance)


def test_cancel_and_deadline_in_the_middle(case: Case) -> None:
    now = 0.0
    instance = case.instance(token_budget=8, max_batch=4, clock=lambda: now)
    instance.add(greedy("r8", PROMPTS["r8"], TOKENS["r8"]))
    instance.add(greedy("r9", PROMPTS["r9"], TOKENS["r9"], deadline=1.0))
    instance.add(greedy("r40", PROMPTS["r40"], TOKENS["r40"], deadline=1.0))  # in the middle of its prompt
    instance.add(greedy("r3", PROMPTS["r3"], TOKENS["r3"]))
    outputs: list[SequenceOutput] = []
    while sum(len(o.token_ids) for o in outputs if o.request_id == "r9") < 2:
        outputs += turn(instance)
    assert instance.in_flight == 1
    instance.cancel("r8")
    now = 1.0
    outputs += run(instance)
    assert tokens_of(outputs, "r3") == case.expected["r3"]
    for name, reason in (("r8", "cancelled"), ("r9", "deadline"), ("r40", "deadline")):
        answer = tokens_of(outputs, name)
        assert answer == case.expected[name][: len(answer)]
        assert len(answer) < TOKENS[name]
        assert end_of(outputs, name).finish_reason == reason
    case.check_idle(instance)


def test_penalties_know_tokens_that_only_the_device_knows(case: Case) -> None:
    """They depend on all tokens before, and yet the next step is begun ahead, for them and for others."""

    def ask(depth: int) -> tuple[list[int], list[int], Instance]:
        instance = case.instance(depth)
        params = SamplingParams(25, temperature=0.0, repetition_penalty=1.8, frequency_penalty=0.7)
        outputs = []
        instance.add(greedy("r9", PROMPTS["r9"], TOKENS["r9"]))
        for _ in range(3):
            outputs += turn(instance)
        instance.add(Sequence("p", 0, [*PROMPTS["r21"]], params))
        outputs += run(instance)
        return tokens_of(outputs, "p"), tokens_of(outputs, "r9"), instance

    penalised, other, _ = ask(depth=1)
    assert penalised[:25] != case.expected["r21"][:25]
    late, beside, instance = ask(depth=2)
    assert (late, beside) == (penalised, other)
    assert beside == case.expected["r9"]
    assert resolved(instance) > TOKENS["r9"] + 15


def test_seeds(case: Case) -> None:
    def ask(depth: int, others: int) -> list[int]:
        instance = case.instance(depth, token_budget=16, max_batch=4)
        params = SamplingParams(20, temperature=0.9, top_p=0.9, seed=77)
        for i in range(others):
            instance.add(Sequence(f"o{i}", 0, prompt(5 + i), SamplingParams(9 + i, seed=i)))
        instance.add(Sequence("s", 0, prompt(18), params))
        return tokens_of(run(instance), "s")

    alone = ask(1, 0)
    assert alone != generate(case.reference, prompt(18), 20)
    assert ask(2, 0) == ask(2, 3) == ask(1, 3) == alone


@pytest.mark.parametrize("depth", [1, 2])
def test_a_common_beginning_is_computed_once(case: Case, depth: int) -> None:
    """While its first owner runs, and from what that left in pages that stay."""
    instance = case.instance(depth)
    stem = prompt(22, seed=5)
    one, two = [*stem, 7, 8, 9], [*stem, 11]
    expected = {"one": generate(case.reference, one, 12), "two": generate(case.reference, two, 12)}
    instance.add(greedy("one", one, 12))
    outputs = turn(instance)
    instance.add(greedy("two", two, 12))
    outputs += run(instance)
    assert {name: tokens_of(outputs, name) for name in expected} == expected
    assert instance.stats.shared_tokens == 20  # whole blocks of 4
    case.check_idle(instance)
    instance._kv.reserve(2)
    instance.add(greedy("again", one, 1))  # an answer of one token leaves its prompt behind too
    outputs = run(instance)
    assert instance.stats.shared_tokens == 20
    instance.add(greedy("two", two, 12))
    outputs += run(instance)
    assert instance.stats.shared_tokens == 40
    assert tokens_of(outputs, "two") == expected["two"]
    assert tokens_of(outputs, "again") == expected["one"][:1]
    # The very same prompt: its last token is computed all the same, for it tells the next.
    whole = prompt(24, seed=6)
    instance.add(greedy("x", whole, 6))
    first = tokens_of(run(instance), "x")
    instance.add(greedy("y", whole, 6))
    assert tokens_of(run(instance), "y") == first == generate(case.reference, whole, 6)
    assert instance.stats.shared_tokens == 60
    # An answer of several turns, with the answer before in the prompt.
    longer = [*whole, *first, 5]
    instance.add(greedy("z", longer, 6))
    assert tokens_of(run(instance), "z") == generate(case.reference, longer, 6)
    assert instance.stats.shared_tokens == 60 + 28  # 24 and 5 of the answer, whose last token was not computed
    instance.close("over")


@pytest.mark.parametrize("token_budget", [512, 8])
def test_a_prompt_that_comes_several_times_at_once_is_computed_once(case: Case, token_budget: int) -> None:
    """As it does where somebody asks for several answers: no step must have ended before its blocks are shared."""
    instance = case.instance(max_batch=4, token_budget=token_budget)
    stem = prompt(22, seed=7)
    asked = {"one": [*stem, 7, 8, 9], "same": [*stem, 7, 8, 9], "other": [*stem, 11], "apart": prompt(9, seed=8)}
    for name, tokens in asked.items():
        instance.add(greedy(name, tokens, 5))
    outputs = run(instance)
    for name, tokens in asked.items():
        assert tokens_of(outputs, name) == generate(case.reference, tokens, 5)
    assert instance.stats.shared_tokens == 24 + 20  # whole blocks of 4
    decoded = 4 * (5 - 1)
    assert instance.stats.computed_tokens == sum(map(len, asked.values())) - 44 + decoded
    case.check_idle(instance)


def test_a_prompt_shares_what_the_step_under_way_computes(case: Case) -> None:
    instance = case.instance(2)
    stem = prompt(22, seed=7)
    instance.add(greedy("first", stem, 1))  # of which the second step computes nothing
    assert instance.launch()
    instance.add(greedy("second", [*stem, 3], 5))
    assert instance.launch()
    assert instance.in_flight == 2
    assert instance.stats.shared_tokens == 20  # whole blocks of 4
    assert tokens_of(run(instance), "second") == generate(case.reference, [*stem, 3], 5)
    instance.close("over")


def test_closing_waits_for_steps_under_way(case: Case) -> None:
    instance = case.instance()
    instance.add(greedy("r21", PROMPTS["r21"], TOKENS["r21"]))
    outputs = turn(instance)
    assert instance.in_flight == 1
    outputs += instance.close("over")
    assert end_of(outputs, "r21").error == "over"
    assert tokens_of(outputs, "r21") == case.expected["r21"][:1]
    assert not instance.has_work
    case.check_idle(instance)


# With a hash for a model

BLOCK = 2
VOCABULARY = 24
EOS = 2
CONTEXT = 40
SPEC = KvSpec(layers=1, kv_heads=1, head_dim=75, dtype=torch.float32, block_tokens=BLOCK)  # 3 blocks in 4,096 bytes
SLOTS = 3


def next_token(tokens: Many[int], row: Row) -> int:
    """A function of all tokens, of how many are generated and, with penalties, of the history."""
    history = row.history
    facts: Any = (list(tokens), row.offset, row.params.seed)
    if history is not None:
        facts += (sorted(zip(history.tokens.tolist(), history.counts.tolist(), strict=True)),)
    return int.from_bytes(hashlib.blake2b(repr(facts).encode(), digest_size=4).digest()) % VOCABULARY


class HashModel:
    """Keeps tokens for keys and values, each with those before it, in blocks that are where an arena's pages are."""

    def __init__(self, memory: Arena, token_budget: int, max_prefills: int, max_batch: int) -> None:
        self._arena = memory
        self._limits = token_budget, max_prefills, max_batch
        self._content: dict[tuple[int, int], list[int]] = {}

    def clear(self, page: int) -> None:
        for block in range(page * SLOTS, (page + 1) * SLOTS):
            for row in range(BLOCK):
                self._content.pop((block, row), None)

    def others_write(self, blocks_under_way: set[int]) -> None:
        """Somebody else has had all pages that are free now."""
        pages = self._arena.take_kv("somebody", self._arena.free_pages)
        for page in pages:
            assert blocks_under_way.isdisjoint(range(page * SLOTS, (page + 1) * SLOTS))
            self.clear(page)
        self._arena.give_kv("somebody", pages)

    def compute(self, parts: Many[Part], rows: Many[Row]) -> list[Choice]:
        token_budget, max_prefills, max_batch = self._limits
        assert sum(part.length for part in parts) <= token_budget
        assert sum(part.length > 1 for part in parts) <= max_prefills
        assert all(0 <= part.slot < max_batch for part in parts)
        for part in parts:
            before = [] if part.start == 0 else self._at(part, part.start - 1)
            for i in range(part.length):
                at = part.start + i
                self._content[part.blocks[at // BLOCK], at % BLOCK] = [*before, *part.token_ids[: i + 1]]
        choices = []
        sampling = [part for part in parts if part.samples]
        for part, row in zip(sampling, rows, strict=True):
            tokens = self._at(part, part.start + part.length - 1)
            for at in range(len(tokens)):
                assert self._at(part, at) == tokens[: at + 1]
            choices.append(Choice(next_token(tokens, row), None))
        return choices

    def _at(self, part: Part, position: int) -> list[int]:
        """All tokens up to a position, as they were when it was computed."""
        return self._content[part.blocks[position // BLOCK], position % BLOCK]


def reference(sequence: Sequence) -> tuple[list[int], FinishReason]:
    """The answer, computed one token after another with nothing else around."""
    params = sequence.sampling
    tokens = list(sequence.token_ids)
    answer: list[int] = []
    while True:
        history = TokenHistory(sequence.token_ids, answer) if params.has_penalties else None
        token = next_token(tokens, Row(params, len(answer), history))
        tokens.append(token)
        answer.append(token)
        if token in params.stop_token_ids or (token == EOS and not params.ignore_eos):
            return answer, FinishReason.STOP
        if len(answer) == params.max_tokens or len(tokens) == CONTEXT:
            return answer, FinishReason.LENGTH


@dataclass(frozen=True)
class Ask:
    """A request: when it comes, and what becomes of it."""

    at: int
    prompt: list[int]
    params: SamplingParams
    cancelled: int | None
    deadline: int | None


STEMS: list[list[int]] = [
    [],
    [5, 6, 7, 8],
    [5, 6, 7, 8, 9, 10, 11, 12, 13],
    [5, 6, 7, 8, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4],
]
ASKS = st.builds(
    Ask,
    at=st.integers(0, 30),
    prompt=st.builds(
        lambda stem, tail: [*stem, *tail], st.sampled_from(STEMS), st.lists(st.integers(3, 5), min_size=1, max_size=8)
    ),
    params=st.builds(
        SamplingParams,
        max_tokens=st.integers(1, 16),
        seed=st.integers(0, 1),
        ignore_eos=st.booleans(),
        presence_penalty=st.sampled_from([0.0, 0.0, 0.0, 0.5]),
        stop_token_ids=st.sampled_from([frozenset[int](), frozenset({9, 10})]),
    ),
    cancelled=st.none() | st.integers(1, 12),
    deadline=st.none() | st.integers(1, 12),
)


@settings(max_examples=250, deadline=None)
@given(
    asks=st.lists(ASKS, min_size=1, max_size=9),
    depth=st.integers(1, 2),
    pages=st.integers(1, 9),
    max_batch=st.integers(1, 4),
    extra_budget=st.integers(0, 12),
    max_prefills=st.integers(1, 3),
    reserved=st.integers(0, 2),
    elsewhere=st.dictionaries(st.integers(0, 30), st.integers(0, 6), max_size=5),
)
def test_answers_do_not_depend_on_what_happens_around_them(
    asks: list[Ask],
    depth: int,
    pages: int,
    max_batch: int,
    extra_budget: int,
    max_prefills: int,
    reserved: int,
    elsewhere: dict[int, int],
) -> None:
    """elsewhere: pages that others hold from a turn on."""
    memory = arena(pages, page_bytes=4096)
    model = HashModel(memory, max_batch + extra_budget, max_prefills, max_batch)
    kv = KvCache(memory, "a", SPEC, model.clear)
    kv.reserve(min(reserved, pages))
    runner = LateRunner(model.compute, depth)
    now = 0
    instance = Instance(
        "a",
        "hash",
        runner,
        kv,
        vocab_size=VOCABULARY,
        eos_ids=[EOS],
        context_tokens=CONTEXT,
        max_batch=max_batch,
        token_budget=max_batch + extra_budget,
        max_prefills=max_prefills,
        clock=lambda: now,
    )
    outputs: list[SequenceOutput] = []
    taken: list[int] = []
    expected: dict[str, tuple[list[int], FinishReason]] = {}
    while now <= 32 or instance.has_work:
        for i, ask in enumerate(asks):
            if ask.at == now:
                deadline = None if ask.deadline is None else float(now + ask.deadline)
                sequence = Sequence(str(i), 0, [*ask.prompt], ask.params, deadline=deadline)
                expected[str(i)] = reference(sequence)
                instance.add(sequence)
            if ask.cancelled is not None and ask.at + ask.cancelled == now:
                instance.cancel(str(i))
        if now > 31 or now in elsewhere:
            memory.give_kv("elsewhere", taken)
            taken = memory.take_kv("elsewhere", min(elsewhere.get(now, 0), memory.free_pages))
        outputs += turn(instance)
        model.others_write({block for step in runner.under_way for block in step.blocks})
        memory.check()
        now += 1
        assert now < 3000, "never ends"
    for i, ask in enumerate(asks):
        answer, reason = expected[str(i)]
        found, end = tokens_of(outputs, str(i)), end_of(outputs, str(i))
        if end.finish_reason is FinishReason.TOO_LARGE:
            assert "KV blocks" in end.error
            assert len(ask.prompt) + len(found) + 1 > pages * SLOTS * BLOCK
        if end.finish_reason is reason:
            assert found == answer
        else:
            assert end.finish_reason in (FinishReason.CANCELLED, FinishReason.DEADLINE, FinishReason.TOO_LARGE)
            assert found == answer[: len(found)]
            assert end.finish_reason is not FinishReason.CANCELLED or ask.cancelled is not None
            assert end.finish_reason is not FinishReason.DEADLINE or ask.deadline is not None
    assert kv.blocks_in_use == 0
    assert kv.pages_in_use == memory.usage().kv == min(reserved, pages)
    instance.close("over")
    assert memory.free_pages == pages
    memory.close()
