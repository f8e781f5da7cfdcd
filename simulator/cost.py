"""How long the engine's steps take: linear in what a step moves and computes, and fitted to measurements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Protocol

import numpy as np
from scipy.optimize import nnls

from simulator.h100_steps import STEPS


class Shape(Protocol):
    """What the cost of a step depends on; simulator.spec.ModelSpec has it."""

    @property
    def parameters(self) -> int: ...
    @property
    def bytes_per_parameter(self) -> float: ...
    @property
    def layers(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def kv_bytes_per_token(self) -> int: ...
    @property
    def tp(self) -> int: ...


@dataclass(frozen=True)
class Measurement:
    """One measured step of an engine, on one device."""

    model: Shape
    seconds: float
    decodes: int = 0  # sequences that got one token each
    context: int = 0  # tokens of context of each of them
    prefill: int = 0  # tokens of one prompt, computed from its start


@dataclass(frozen=True)
class StepCost:
    """The cost of one model's steps, in seconds, on a group of its own."""

    base: float  # of any step
    per_sequence: float  # for each sequence that decodes
    per_context: float  # for each token of context of those
    prefill_base: float  # of a step with prompts, besides `base`
    per_prompt_token: float
    per_prompt_square: float  # times the square of a prompt's length

    def decode(self, sequences: int, context: float) -> float:
        """A step in which `sequences` with `context` tokens in all get one token each."""
        return self.base + sequences * self.per_sequence + context * self.per_context

    def prefill(self, tokens: int) -> float:
        """A step that computes one prompt and nothing else."""
        return self.base + self.prefill_base + tokens * self.per_prompt_token + tokens**2 * self.per_prompt_square


@dataclass(frozen=True)
class CostModel:
    """Seconds of a step = the sum of these, each times what the step has of it; shards divide all but layers.

    The sum stands for how kernels follow one another: a roofline (the larger of bytes and operations) fits the measured
    prefills worse, because elementwise kernels and attention wait for the products before them.
    """

    per_layer: float  # launches
    per_weight_byte: float  # read over the memory bus
    per_sequence: float  # sampling, bookkeeping
    per_kv_byte: float
    per_operation: float  # of matrix products, two per parameter and token
    per_activation_byte: float  # tokens x layers x width x 2: elementwise kernels
    per_attention_operation: float  # 2 x tokens^2 x layers x width
    per_prefill_layer: float  # what a prompt's step has more per layer: launches that a decode's fused step saves
    reduce_s: float = 14e-6  # latency of one all-reduce of a group, two per layer
    reduce_bytes_per_s: float = 329e9  # of a group's link

    def steps(self, model: Shape) -> StepCost:
        """The cost of a model's steps, with its shards spread over as many devices as it wants."""
        tp, tokens_reduced = model.tp, 0.0
        base = model.layers * self.per_layer + model.parameters * model.bytes_per_parameter * self.per_weight_byte / tp
        if tp > 1:
            base += 2 * model.layers * self.reduce_s
            moved = 2 * (tp - 1) / tp * model.width * 2  # bytes of a token in a ring all-reduce
            tokens_reduced = 2 * model.layers * moved / self.reduce_bytes_per_s
        token = 2 * model.parameters * self.per_operation + 2 * model.layers * model.width * self.per_activation_byte
        return StepCost(
            base=base,
            per_sequence=self.per_sequence + tokens_reduced,
            per_context=model.kv_bytes_per_token * self.per_kv_byte / tp,
            prefill_base=model.layers * self.per_prefill_layer,
            per_prompt_token=token / tp + tokens_reduced,
            per_prompt_square=2 * model.layers * model.width * self.per_attention_operation / tp,
        )

    def error(self, measurements: Sequence[Measurement]) -> list[float]:
        """Of each measurement: predicted over measured, less 1."""
        known = np.array(astuple(self)[:8])
        return [float(np.dot(_features(m), known)) / m.seconds - 1 for m in measurements]


def fit(measurements: Sequence[Measurement]) -> CostModel:
    """The cost model with the least squares of relative errors, no term below zero (scipy.optimize.nnls).

    Measurements of one device; at least one decode and one prefill, else ValueError.
    """
    if not any(m.decodes for m in measurements) or not any(m.prefill for m in measurements):
        raise ValueError("a fit needs measured steps of both kinds, decodes and prefills")
    if any(m.seconds <= 0 for m in measurements):
        raise ValueError("measured seconds must be above 0")
    rows = np.array([np.array(_features(m)) / m.seconds for m in measurements])
    scale = np.maximum(rows.max(axis=0), 1e-300)  # terms differ by fifteen orders of magnitude
    solution, _ = nnls(rows / scale, np.ones(len(rows)))
    return CostModel(*(float(value) for value in solution / scale))


def _features(m: Measurement) -> tuple[float, ...]:
    model = m.model
    spread = model.layers * model.width
    return (
        model.layers,
        model.parameters * model.bytes_per_parameter,
        m.decodes,
        m.decodes * m.context * model.kv_bytes_per_token,
        2.0 * model.parameters * m.prefill,
        2.0 * spread * m.prefill,
        2.0 * spread * m.prefill**2,
        model.layers if m.prefill else 0,
    )


@dataclass(frozen=True)
class _Llama:
    parameters: int
    layers: int
    width: int
    kv_bytes_per_token: int
    bytes_per_parameter: float = 2.0
    tp: int = 1


_MODELS = {
    "8B": _Llama(8_030_261_248, 32, 4096, 131_072),
    "1B": _Llama(1_235_814_400, 16, 2048, 32_768),
}

H100_MEASURED = tuple(
    Measurement(_MODELS[model], seconds, decodes, context, prefill)
    for model, decodes, context, prefill, seconds in STEPS
)

H100 = fit(H100_MEASURED)
"""Fitted to twelve steps of two models: 4 % off on average, at worst a prompt of 128 tokens by the 8B, which the engine
pads. Groups of several GPUs were not measured: they are computed from a measured all-reduce."""
