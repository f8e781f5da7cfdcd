"""What a step's sampling needs, made on the CPU from the sequences' parameters and moved to the device in one copy."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable
from collections.abc import Sequence as Many
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from services.gpu_agent.engine.sampling_params import SamplingParams

# Floors that keep float32 arithmetic finite; results below them are the same.
_MIN_TEMPERATURE = 1e-30
_MIN_REPETITION = 1e-30


def random_unit(seed: int, offset: int) -> float:
    """A number in [0, 1) that is a function of (seed, offset) alone.

    A hash instead of a generator's state: a request that is resumed elsewhere, or runs in another batch or on another
    device, draws the same numbers.
    """
    digest = hashlib.blake2b(struct.pack("<QQ", seed, offset), digest_size=8).digest()
    return float(int.from_bytes(digest, "little") >> 11) * 2.0**-53


class TokenHistory:
    """Which tokens a sequence holds, and how often its answer holds each. Adding a token takes constant time."""

    def __init__(self, prompt: Iterable[int], answer: Iterable[int] = ()) -> None:
        """`answer` is what has been generated already, in order; both are token ids."""
        # No sort: a long prompt would hold up the engine's thread.
        unique = dict.fromkeys(prompt)
        self._slots = dict(zip(unique, range(len(unique)), strict=True))
        self._tokens = np.empty(len(unique) + 256, np.int32)
        self._tokens[: len(unique)] = np.fromiter(unique, np.int32, len(unique))
        self._counts = np.zeros(len(self._tokens), np.int32)
        for token in answer:
            self.append(token)

    def append(self, token: int) -> None:
        """Adds a generated token."""
        slot = self._slots.setdefault(token, len(self._slots))
        if slot == len(self._tokens):
            self._tokens = np.concatenate([self._tokens, np.empty_like(self._tokens)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._tokens[slot] = token
        self._counts[slot] += 1

    @property
    def tokens(self) -> npt.NDArray[np.int32]:
        """Each token of prompt and answer once."""
        return self._tokens[: len(self._slots)]

    @property
    def counts(self) -> npt.NDArray[np.int32]:
        """How often the answer holds each of `tokens`."""
        return self._counts[: len(self._slots)]


class MaskSource(Protocol):
    """Where a sequence stands in its grammar; grammar.Matcher is one."""

    @property
    def mask(self) -> npt.NDArray[np.int32]:
        """Which tokens may come next: bit t % 32 of word t // 32 for token t. At least one may."""
        ...


@dataclass(frozen=True)
class Row:
    """One sequence that is to get a token."""

    params: SamplingParams
    offset: int
    """Index of the token in the answer."""
    history: TokenHistory | None = None
    """All tokens before it; needed where params.has_penalties."""
    matcher: MaskSource | None = None
    """Where all tokens before it lead; needed where params.grammar is set."""
    pending_slot: int | None = None
    """Where the token before it is chosen in a step whose result is not known yet, so that `history` is without it: the
    slot for which the device chooses it."""

    @property
    def is_plain(self) -> bool:
        """Whether its settings are all that choosing its token needs: logits as they are, and no report of them."""
        params = self.params
        edited = params.has_penalties or params.logit_bias or params.grammar is not None
        return not edited and params.logprobs is None and self.offset >= params.min_tokens

    @property
    def settings(self) -> tuple[float, ...]:
        """See SamplingBatch.settings."""
        params = self.params
        if params.temperature == 0:
            return (0.0, 0.0, 1.0, 0.0, 0.0)
        temperature = max(params.temperature, _MIN_TEMPERATURE)
        return (temperature, params.top_k, params.top_p, params.min_p, random_unit(params.seed, self.offset))


@dataclass(frozen=True)
class Penalties:
    """The histories of the rows that have penalties, one after another; no row holds a token twice."""

    tokens: torch.Tensor
    """(n,) int32."""
    counts: torch.Tensor
    """(n,) int32: how often the row's answer holds each."""
    rows: torch.Tensor
    """(p,) int64: the rows."""
    lengths: torch.Tensor
    """(p,) int64: how many of `tokens` are each row's."""
    rates: torch.Tensor
    """(p, 3) float32: repetition, presence and frequency penalty."""
    pending: torch.Tensor | None
    """(p,) int32: one more token of each row's answer, which is not counted yet, or -1; None where no row has one."""


@dataclass(frozen=True)
class Additions:
    """Sparse additions to logits: biases, and minus infinity for banned tokens. A biased token may also be banned."""

    index: torch.Tensor
    """(n,) int64, row * vocabulary + token."""
    value: torch.Tensor
    """(n,) float32."""


@dataclass(frozen=True)
class Masks:
    """The grammars' masks."""

    rows: torch.Tensor
    """(g,) int32: the rows that have one."""
    words: torch.Tensor
    """(rows, ceil(vocabulary / 32)) int32, as xgrammar lays them out; what is in the other rows means nothing."""


@dataclass(frozen=True)
class SamplingBatch:
    """What `sample` needs to know of the rows. All tensors lie on the logits' device."""

    settings: torch.Tensor
    """(rows, 5) float64: temperature, top_k (0: off), top_p (1: off), min_p (0: off), the unit to draw with."""
    filtered: bool
    """Whether any row that is drawn has a top_k or a top_p: the CPU sorts only then."""
    penalties: Penalties | None
    additions: Additions | None
    masks: Masks | None
    logprob_rows: torch.Tensor | None
    """(l,) int64: the rows whose log probabilities are reported."""
    logprobs: dict[int, int]
    """The same on the CPU, in the same order, with the number of alternatives."""

    @property
    def edits(self) -> bool:
        """Whether logits are changed before the draw."""
        return not (self.penalties is None and self.additions is None and self.masks is None)


def prepare(
    rows: Many[Row],
    vocabulary: int,
    eos_ids: frozenset[int] = frozenset(),
    device: torch.device | str = "cpu",
    last_tokens: torch.Tensor | None = None,
) -> SamplingBatch:
    """Gathers what `sample` needs; on a GPU the copy is queued on the current stream and nothing is waited for.

    `eos_ids` end an answer unless a row ignores them. last_tokens (slots,), int32 on the device: what was chosen last
    for each slot, needed where rows have a pending_slot. ValueError where a row lacks the history or matcher it needs.
    All token ids must be below `vocabulary`: see SamplingParams.check_vocabulary.
    """
    arrays: dict[str, npt.NDArray[np.generic]] = {
        "settings": np.array([row.settings for row in rows], np.float64).reshape(-1, 5)
    }
    _add_penalties(arrays, rows)
    _add_additions(arrays, rows, vocabulary, eos_ids)
    _add_masks(arrays, rows, vocabulary)
    logprobs = {i: row.params.logprobs for i, row in enumerate(rows) if row.params.logprobs is not None}
    if logprobs:
        arrays["logprob_rows"] = np.array(list(logprobs), np.int64)
    there = _upload(arrays, torch.device(device))
    return SamplingBatch(
        settings=there["settings"],
        filtered=any(row.params.temperature > 0 and (row.params.top_k or row.params.top_p < 1) for row in rows),
        penalties=_penalties(_named(there, "penalties."), last_tokens) if "penalties.rows" in there else None,
        additions=Additions(**_named(there, "additions.")) if "additions.index" in there else None,
        masks=Masks(**_named(there, "masks.")) if "masks.rows" in there else None,
        logprob_rows=there.get("logprob_rows"),
        logprobs=logprobs,
    )


def _add_penalties(arrays: dict[str, npt.NDArray[np.generic]], rows: Many[Row]) -> None:
    penalised = [i for i, row in enumerate(rows) if row.params.has_penalties]
    if not penalised:
        return
    histories, rates = [], []
    for i in penalised:
        params, history = rows[i].params, rows[i].history
        if history is None:
            raise ValueError("a row with penalties needs the sequence's token history")
        histories.append(history)
        repetition = max(params.repetition_penalty, _MIN_REPETITION)
        rates.append((repetition, params.presence_penalty, params.frequency_penalty))
    arrays["penalties.tokens"] = np.concatenate([history.tokens for history in histories])
    arrays["penalties.counts"] = np.concatenate([history.counts for history in histories])
    arrays["penalties.rows"] = np.array(penalised, np.int64)
    arrays["penalties.lengths"] = np.array([len(history.tokens) for history in histories], np.int64)
    arrays["penalties.rates"] = np.array(rates, np.float32)
    slots = [rows[i].pending_slot for i in penalised]
    if any(slot is not None for slot in slots):
        arrays["penalties.slots"] = np.array([-1 if slot is None else slot for slot in slots], np.int64)


def _penalties(there: dict[str, torch.Tensor], last_tokens: torch.Tensor | None) -> Penalties:
    slots = there.pop("slots", None)
    if slots is None:
        return Penalties(**there, pending=None)
    if last_tokens is None:
        raise ValueError("rows whose last token only the device knows need the device's last tokens")
    return Penalties(**there, pending=torch.where(slots < 0, -1, last_tokens[slots.clamp(min=0)]))


def _add_additions(
    arrays: dict[str, npt.NDArray[np.generic]], rows: Many[Row], vocabulary: int, eos_ids: frozenset[int]
) -> None:
    index: list[int] = []
    value: list[float] = []
    for i, row in enumerate(rows):
        params = row.params
        index += [i * vocabulary + token for token in params.logit_bias]
        value += params.logit_bias.values()
        if row.offset < params.min_tokens:
            banned = params.stop_token_ids if params.ignore_eos else params.stop_token_ids | eos_ids
            if row.matcher is None or _allows_other(row.matcher.mask, banned):
                index += [i * vocabulary + token for token in banned]
                value += [-np.inf] * len(banned)
    if index:
        arrays["additions.index"] = np.array(index, np.int64)
        arrays["additions.value"] = np.array(value, np.float32)


def _allows_other(mask: npt.NDArray[np.int32], banned: frozenset[int]) -> bool:
    """Whether a grammar allows a token that is not banned; where it does not, the answer must end here."""
    left = mask.view(np.uint32).copy()
    for token in banned:
        left[token // 32] &= ~np.uint32(1 << token % 32)
    return bool(left.any())


def _add_masks(arrays: dict[str, npt.NDArray[np.generic]], rows: Many[Row], vocabulary: int) -> None:
    masked = [i for i, row in enumerate(rows) if row.params.grammar is not None]
    if not masked:
        return
    words = np.empty((len(rows), -(-vocabulary // 32)), np.int32)
    for i in masked:
        matcher = rows[i].matcher
        if matcher is None:
            raise ValueError("a row with a grammar needs the sequence's matcher")
        words[i] = matcher.mask
    arrays["masks.rows"] = np.array(masked, np.int32)
    arrays["masks.words"] = words


def _named(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _upload(arrays: dict[str, npt.NDArray[np.generic]], device: torch.device) -> dict[str, torch.Tensor]:
    """The arrays on the device, through one buffer, which is pinned for a GPU, and one copy."""
    starts = [0, *accumulate(-(-array.nbytes // 16) * 16 for array in arrays.values())]
    buffer = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
    raw = buffer.numpy()
    for start, array in zip(starts, arrays.values(), strict=False):
        raw[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
    there = buffer.to(device, non_blocking=True)
    return {
        name: there[start : start + array.nbytes].view(torch.from_numpy(array[:0]).dtype).view(array.shape)
        for start, (name, array) in zip(starts, arrays.items(), strict=False)
    }
