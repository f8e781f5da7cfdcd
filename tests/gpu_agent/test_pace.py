"""How long sequences wait for their next tokens, as an instance's steps show it."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from services.gpu_agent.engine.loop import EngineLoop
from services.gpu_agent.engine.pace import Pace, PaceMeter
from services.gpu_agent.engine.sequence import SequenceOutput
from tests.gpu_agent.checkpoints import llama
from tests.gpu_agent.serving import Served, arena, greedy, prompt, run, serve

BASE, EACH = 0.006, 0.0002  # seconds of a step, and more for each of its sequences


def decode(meter: PaceMeter, sequences: int, steps: int = 1, stretch: float = 1.0, seconds: float = 0.0) -> None:
    """Steps of so many sequences; the time that passes is `stretch` times the device's."""
    for _ in range(steps):
        took = seconds or BASE + EACH * sequences
        meter.add(sequences, took, stretch * took)


def measured(meter: PaceMeter) -> Pace:
    pace = meter.pace()
    assert pace is not None
    return pace


def test_nothing_is_said_of_a_few_steps() -> None:
    meter = PaceMeter(64)
    decode(meter, 4, 31)
    assert meter.pace() is None
    assert meter.news() is None
    decode(meter, 4)
    assert meter.pace() is not None


def test_nothing_is_said_while_few_sequences_ran_at_once() -> None:
    """One sequence's steps do not tell what many would take, and a guess would have the planner wake for nothing."""
    meter = PaceMeter(64)
    decode(meter, 1, 1000)
    decode(meter, 3, 1000)
    assert meter.pace() is None
    decode(meter, 4)
    assert meter.pace() is not None
    small = PaceMeter(2)
    decode(small, 2, 32)
    assert small.pace() is not None


def test_what_was_seldom_seen_follows_from_what_was_seen() -> None:
    meter = PaceMeter(64)
    for sequences in range(1, 17):
        decode(meter, sequences, 20)
    for sequences in (1, 10, 64):
        assert measured(meter).seconds(sequences) == pytest.approx(BASE + EACH * sequences, rel=0.03)
    # A long time with as many as ever does not make it forget how it was with fewer.
    decode(meter, 16, 5000)
    assert measured(meter).seconds(1) == pytest.approx(BASE + EACH, rel=0.03)


def test_where_all_steps_had_as_many_fewer_take_less_and_more_take_more() -> None:
    meter = PaceMeter(64)
    decode(meter, 8, 1000, seconds=0.040)
    assert measured(meter).seconds(8) == pytest.approx(0.040, rel=0.03)
    assert measured(meter).seconds(4) < 0.025
    assert measured(meter).seconds(16) > 0.07


def test_prompts_count_for_the_tokens_that_come_with_them() -> None:
    """Each of n sequences has a prompt of 30 ms per 10 tokens: 3 ms per token, for which the n wait for one another."""
    for sequences in (4, 8):
        meter = PaceMeter(64)
        for others in range(1, sequences + 1):  # so that the line is known
            decode(meter, others, 32)
        for turn in range(3000):
            prompts = turn % 10 < sequences  # of one sequence each
            took = BASE + EACH * (sequences - prompts) + 0.030 * prompts
            meter.add(sequences - prompts, took, took, prompts=prompts, begun=int(prompts))
        expected = BASE + (EACH + 0.003) * sequences
        assert measured(meter).seconds(sequences) == pytest.approx(expected, rel=0.03)


def test_time_in_which_the_device_has_nothing_counts_and_is_forgotten_when_it_is_over() -> None:
    meter = PaceMeter(64)
    for sequences in (1, 2, 4, 8):
        decode(meter, sequences, 100, stretch=2.0)
    assert measured(meter).seconds(8) == pytest.approx(2 * (BASE + 8 * EACH), rel=0.01)
    decode(meter, 8, 60_000)
    assert measured(meter).seconds(8) == pytest.approx(BASE + 8 * EACH, rel=0.01)


def test_slow_first_steps_and_single_slow_ones_do_not_last() -> None:
    meter = PaceMeter(64)
    decode(meter, 4, 2, seconds=3.0)
    decode(meter, 4, 400)
    settled = measured(meter).seconds(4)
    assert settled == pytest.approx(BASE + 4 * EACH, rel=0.1)
    meter.add(4, 5.0, None)
    assert measured(meter).seconds(4) < 1.05 * settled


def test_only_what_is_noticeable_is_news() -> None:
    meter = PaceMeter(64)
    for sequences in (1, 2, 4, 8):
        decode(meter, sequences, 100)
    first = meter.news()
    assert first is not None
    decode(meter, 8, 200, seconds=1.05 * (BASE + 8 * EACH))
    assert meter.news() is None
    for sequences in (1, 2, 4, 8):
        decode(meter, sequences, 500, seconds=1.3 * (BASE + sequences * EACH))
    second = meter.news()
    assert second is not None
    assert second.seconds(8) == pytest.approx(1.3 * first.seconds(8), rel=0.02)
    assert meter.news() is None


STEP = st.tuples(
    st.integers(0, 16), st.floats(0, 1e3), st.none() | st.floats(0, 1e4), st.booleans(), st.integers(0, 16)
)


@given(st.lists(STEP, max_size=80), st.integers(1, 40))
def test_whatever_comes_more_sequences_never_wait_less(
    steps: list[tuple[int, float, float | None, bool, int]], further: int
) -> None:
    meter = PaceMeter(16)
    for sequences, seconds, elapsed, prompts, begun in steps:
        meter.add(sequences, seconds, elapsed, prompts=prompts, begun=begun if prompts else 0)
    decode(meter, 4 + further % 13, 32)
    pace = measured(meter)
    assert 0 <= pace.base_s < float("inf")
    assert 0 <= pace.per_sequence_s < float("inf")


@given(st.integers(1, 400), st.integers(1, 16))
def test_several_steps_alike_may_be_added_at_once(steps: int, sequences: int) -> None:
    one, many = PaceMeter(16), PaceMeter(16)
    for meter in (one, many):
        decode(meter, 4, 40)
    decode(one, sequences, steps)
    took = steps * (BASE + EACH * sequences)
    many.add(sequences, took, took, steps=steps)
    assert measured(many).seconds(8) == pytest.approx(measured(one).seconds(8), rel=0.1)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    torch.set_num_threads(1)
    memory = arena(24)
    served, _ = serve(memory, llama, tmp_path_factory.mktemp("models"), "llama")
    served.load()
    yield served
    memory.close()


def test_an_instance_measures_its_own_steps(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    instance = served.instance()
    seen: list[tuple[int, float, float | None, bool, int]] = []
    add = instance.meter.add

    def noted(sequences: int, seconds: float, elapsed: float | None, *, prompts: bool, begun: int) -> None:
        seen.append((sequences, seconds, elapsed, prompts, begun))
        add(sequences, seconds, elapsed, prompts=prompts, begun=begun)

    monkeypatch.setattr(instance.meter, "add", noted)
    for seed, name in enumerate("abcd"):
        instance.add(greedy(name, prompt(9, seed), 30))
    run(instance)
    instance.add(greedy("later", prompt(9, seed=4), 10))
    run(instance)
    assert [(n, prompts, begun) for n, _, _, prompts, begun in seen] == [
        (0, True, 4),
        *[(4, False, 0)] * 29,
        (0, True, 1),
        *[(1, False, 0)] * 9,
    ]
    assert [index for index, step in enumerate(seen) if step[2] is None] == [0, 30]  # it was idle before
    assert all(elapsed >= seconds > 0 for _, seconds, elapsed, _, _ in seen if elapsed is not None)
    assert measured(instance.meter).seconds(1) > 0


def test_time_that_others_had_the_device_is_left_out(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    instance = served.instance()
    seen: list[tuple[float, float | None]] = []
    monkeypatch.setattr(instance.meter, "add", lambda n, seconds, elapsed, **_: seen.append((seconds, elapsed)))
    instance.add(greedy("a", prompt(9), 3))
    instance.step()
    instance.step()
    instance.gave_way(3600.0)
    run(instance)
    seconds, elapsed = zip(*seen, strict=True)
    assert elapsed[0] is None
    assert elapsed[1] >= seconds[1]
    assert elapsed[2] == seconds[2]


def test_instances_are_told_what_others_had(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    instances, told = [served.instance(), served.instance()], [0.0, 0.0]
    ended = threading.Semaphore(0)
    for index, instance in enumerate(instances):

        def add(seconds: float, index: int = index) -> None:
            told[index] += seconds

        monkeypatch.setattr(instance, "gave_way", add)

    def on_step(_: str, outputs: list[SequenceOutput]) -> None:
        for output in outputs:
            if output.finish_reason is not None:
                ended.release()

    loop = EngineLoop(on_step, lambda name, error: None)
    loop.start()
    try:
        for instance in instances:
            loop.activate(instance).result(30)
        for instance in instances:
            loop.submit(instance.id, greedy(instance.id, prompt(9), 10))
        assert all(ended.acquire(timeout=30) for _ in instances)
    finally:
        loop.stop()
    assert told == [pytest.approx(other.device_seconds) for other in reversed(instances)]
