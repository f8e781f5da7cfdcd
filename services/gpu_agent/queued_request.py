"""Requests as Redis holds them made into sequences, and the engine's news made into updates for routers. Pure."""

from __future__ import annotations

import json

from services.gpu_agent.engine.sampling_params import Grammar, GrammarKind, SamplingParams
from services.gpu_agent.engine.sequence import FinishReason, Sequence, SequenceOutput, TokenLogprob
from warmserve.v1 import agent_pb2, inference_pb2

_FINISH = {
    FinishReason.STOP: inference_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: inference_pb2.FINISH_REASON_CANCELLED,
    FinishReason.DEADLINE: inference_pb2.FINISH_REASON_DEADLINE,
    FinishReason.ERROR: inference_pb2.FINISH_REASON_ERROR,
    FinishReason.TOO_LARGE: inference_pb2.FINISH_REASON_TOO_LARGE,
}


def sequence_of(request: agent_pb2.QueuedRequest) -> Sequence:
    """A request as the engine sees it, without its compiled grammar. ValueError where a parameter is out of range."""
    given = request.sampling
    return Sequence(
        request_id=request.request_id,
        attempt=request.attempt,
        token_ids=list(request.token_ids),
        num_generated=request.generated,
        sampling=SamplingParams(
            max_tokens=given.max_tokens,
            temperature=given.temperature if given.HasField("temperature") else 1.0,
            top_p=given.top_p if given.HasField("top_p") else 1.0,
            top_k=given.top_k,
            min_p=given.min_p,
            seed=given.seed,
            ignore_eos=given.ignore_eos,
            repetition_penalty=given.repetition_penalty if given.HasField("repetition_penalty") else 1.0,
            presence_penalty=given.presence_penalty,
            frequency_penalty=given.frequency_penalty,
            logit_bias=dict(given.logit_bias),
            logprobs=given.logprobs if given.HasField("logprobs") else None,
            stop_token_ids=frozenset(given.stop_token_ids),
            min_tokens=given.min_tokens,
            grammar=_grammar(given.grammar) if given.HasField("grammar") else None,
        ),
        deadline=request.deadline_unix_ms / 1e3 if request.deadline_unix_ms else None,
    )


def update_of(output: SequenceOutput, instance_id: str) -> agent_pb2.SequenceUpdate:
    """What a router is told of a sequence's news."""
    return agent_pb2.SequenceUpdate(
        request_id=output.request_id,
        attempt=output.attempt,
        instance_id=instance_id,
        token_ids=output.token_ids,
        offset=output.offset,
        finish_reason=(
            _FINISH[output.finish_reason] if output.finish_reason else inference_pb2.FINISH_REASON_UNSPECIFIED
        ),
        error=output.error,
        logprobs=[_logprob(item) for item in output.logprobs],
    )


def refusal(request_id: str, attempt: int, instance_id: str, error: str) -> agent_pb2.SequenceUpdate:
    """What a router is told of a request that no instance could serve."""
    return agent_pb2.SequenceUpdate(
        request_id=request_id,
        attempt=attempt,
        instance_id=instance_id,
        finish_reason=inference_pb2.FINISH_REASON_REFUSED,
        error=error,
    )


def too_large(request_id: str, attempt: int, instance_id: str) -> agent_pb2.SequenceUpdate:
    """What a router is told of a request that it knows to be too large for this instance."""
    return agent_pb2.SequenceUpdate(
        request_id=request_id,
        attempt=attempt,
        instance_id=instance_id,
        finish_reason=inference_pb2.FINISH_REASON_TOO_LARGE,
        error="it was too large before",
    )


def _grammar(given: inference_pb2.Grammar) -> Grammar:
    match given.WhichOneof("kind"):
        case "json_schema":
            return Grammar(GrammarKind.JSON_SCHEMA, given.json_schema)
        case "json_object":
            return Grammar(GrammarKind.JSON_OBJECT)
        case "regex":
            return Grammar(GrammarKind.REGEX, given.regex)
        case "ebnf":
            return Grammar(GrammarKind.EBNF, given.ebnf)
        case "choice":
            return Grammar(GrammarKind.CHOICE, json.dumps(list(given.choice.texts), ensure_ascii=False))
    raise ValueError("the grammar is of no kind that this agent knows")


def _logprob(item: TokenLogprob) -> inference_pb2.TokenLogprob:
    top = [inference_pb2.TopLogprob(token_id=token, logprob=logprob) for token, logprob in item.top]
    return inference_pb2.TokenLogprob(token_id=item.token_id, logprob=item.logprob, top=top)
