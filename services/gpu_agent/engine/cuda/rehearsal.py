"""Compiles and loads what choosing tokens takes on first use, before requests would wait for it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from services.gpu_agent.engine.cuda.fused import store_tokens
from services.gpu_agent.engine.sampling import sample
from services.gpu_agent.engine.sampling_batch import Row, TokenHistory, prepare
from services.gpu_agent.engine.sampling_params import MAX_LOGPROBS, Grammar, GrammarKind, SamplingParams

_EVERYTHING = SamplingParams(
    1,
    top_k=1,
    repetition_penalty=2.0,
    logit_bias={0: 1.0},
    logprobs=MAX_LOGPROBS,
    grammar=Grammar(GrammarKind.JSON_OBJECT),
)


@dataclass(frozen=True)
class _Anything:
    """A MaskSource that allows every token."""

    mask: NDArray[np.int32]


def rehearse_choice(logits: torch.Tensor, last_tokens: torch.Tensor) -> None:
    """Chooses once, on the current stream, with all that a request may ask for and no graph holds.

    logits: (1, vocabulary), which it overwrites. last_tokens: SamplingBatch's, which it leaves as they are.
    """
    vocabulary = logits.shape[1]
    mask = _Anything(np.full(-(-vocabulary // 32), -1, np.int32))
    row = Row(_EVERYTHING, 0, TokenHistory([0]), mask, pending_slot=0)
    chosen = sample(logits, prepare([row], vocabulary, device=logits.device, last_tokens=last_tokens))
    slots = torch.zeros(1, dtype=torch.int32, device=logits.device)
    store_tokens(chosen.tokens, slots, torch.empty_like(last_tokens))
    chosen.to_host()
