"""Updates from agents may come twice, late, or from two instances; the client's tokens come once each, in order."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from services.router.relay import RelayStream
from services.router.request import Outcome, Request
from warmserve.v1 import agent_pb2, cluster_pb2, common_pb2, inference_pb2


def request() -> Request:
    return Request(
        id="r",
        client_id="r",
        spec=cluster_pb2.ModelSpec(name="m"),
        prompt=[1, 2],
        sampling=inference_pb2.SamplingParams(max_tokens=100, logprobs=0),
        priority=common_pb2.PRIORITY_NORMAL,
        arrived=0.0,
        arrived_unix_ms=0,
        deadline_unix_ms=0,
        found_state=common_pb2.REPLICA_STATE_COLD,
        tokenizer=None,  # type: ignore[arg-type]  # nothing is made into text here
        changed=asyncio.Event(),
    )


def update(attempt: int, offset: int, tokens: list[int], instance: str = "i", finish: int = 0):
    return agent_pb2.SequenceUpdate(
        request_id="r",
        attempt=attempt,
        instance_id=instance,
        offset=offset,
        token_ids=tokens,
        finish_reason=finish,
        logprobs=[inference_pb2.TokenLogprob(token_id=token) for token in tokens],
    )


@given(
    st.lists(
        st.tuples(st.sampled_from([0, 0, 0, -1, 1]), st.sampled_from("aab"), st.integers(-4, 1), st.integers(0, 6)),
        max_size=40,
    )
)
def test_tokens_are_a_gapless_prefix_whatever_comes(news: list[tuple[int, str, int, int]]) -> None:
    """The right token at offset n is n, and any sender sends just that; news come late, twice, or with a gap."""
    subject = request()
    streams = {name: RelayStream(name) for name in "ab"}
    for age, sender, ahead, count in news:
        before = list(subject.tokens)
        offset = max(0, len(before) + ahead)
        sent = update(max(0, subject.attempt + age), offset, list(range(offset, offset + count)), sender)
        outcome = subject.apply(sent, streams[sender], 1.0)
        assert subject.tokens == list(range(len(subject.tokens)))
        assert subject.tokens[: len(before)] == before
        assert [item.token_id for item in subject.logprobs] == subject.tokens
        if outcome is Outcome.PUT_BACK:
            assert offset > len(before)
            subject.detach()
            assert subject.queued("router", "addr").generated == len(before)
            assert list(subject.queued("router", "addr").token_ids) == [1, 2, *before]


def test_the_first_of_two_instances_wins_and_the_other_is_cancelled() -> None:
    subject, first, second = request(), RelayStream("a"), RelayStream("b")
    assert subject.apply(update(0, 0, [], "a"), first, 1.0) is Outcome.NOTHING
    assert subject.apply(update(0, 0, [], "b"), second, 1.0) is Outcome.CANCEL_SENDER
    assert subject.apply(update(0, 0, [0], "b"), second, 1.0) is Outcome.CANCEL_SENDER
    assert subject.instance_id == "a"
    assert subject.tokens == []


def test_an_older_attempt_is_cancelled_unless_the_same_agent_has_the_newer_one() -> None:
    subject, first, second = request(), RelayStream("a"), RelayStream("b")
    subject.apply(update(0, 0, [0], "a"), first, 1.0)
    subject.detach()
    assert subject.apply(update(0, 1, [1], "a"), first, 1.0) is Outcome.CANCEL_SENDER
    subject.apply(update(1, 1, [], "a"), first, 1.0)
    assert subject.apply(update(0, 1, [1], "a"), first, 1.0) is Outcome.NOTHING
    assert subject.apply(update(0, 1, [1], "b"), second, 1.0) is Outcome.CANCEL_SENDER
    assert subject.tokens == [0]


def test_nothing_is_added_after_the_end() -> None:
    subject, stream = request(), RelayStream("a")
    subject.apply(update(0, 0, [0], finish=inference_pb2.FINISH_REASON_LENGTH), stream, 1.0)
    assert subject.apply(update(0, 1, [1]), stream, 1.0) is Outcome.CANCEL_SENDER
    assert subject.tokens == [0]
    assert subject.finish == inference_pb2.FINISH_REASON_LENGTH


def test_time_to_first_token_is_queue_and_prefill_of_the_attempt_that_gave_it() -> None:
    subject, stream = request(), RelayStream("a")
    subject.apply(update(0, 0, []), stream, 1.0)
    subject.detach()
    subject.apply(update(1, 0, []), stream, 3.0)
    subject.apply(update(1, 0, [0]), stream, 3.5)
    subject.apply(update(1, 1, [1]), stream, 4.0)
    timing = subject.timing(5.0)
    assert (timing.queue_ms, timing.prefill_ms, timing.ttft_ms, timing.total_ms) == (3000, 500, 3500, 5000)


def test_failures_count_in_a_row_only() -> None:
    subject, stream = request(), RelayStream("a")
    for attempt in range(4):
        subject.failures += 1
        subject.apply(update(attempt, attempt, [attempt]), stream, 1.0)
        assert subject.failures == 0
        subject.detach()
