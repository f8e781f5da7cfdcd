"""How long a sequence waits for its next token, by how many sequences run: measured step by step. Pure.

A step in which n sequences get a token and nothing else is computed takes the device a + b n seconds: a line through
the mean times of each n. Prompts come with tokens: p seconds of prompts were computed per token, and all n sequences
wait for each other's, as in each step n tokens come. And the device may have nothing to do while its next step is
prepared: the time that passes is s times the device's. So with n sequences a token takes s (a + (b + p) n) seconds.

Time in which other instances have the device is left out. A plan that had more instances run where tokens are late for
that would have more of them share devices, and tokens be later: it counts what instances cost their neighbours itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

_ENOUGH = 32  # steps before anything is said,
_TELLING = 4  # and some of them with so many sequences: what one takes does not tell what many would
_GUESS = 0.1  # steps that the guess counts for
_LATEST = 64  # a mean is of about so many steps; first ones, before graphs are there, take longer
_SETTLED = 8  # steps after which a mean is good enough to tell what is far off it
_FAR_OFF = 2.0  # times the mean: one step that took longer counts as that
_FORGOTTEN_S = 60.0  # of computing, after which what else than tokens was computed counts for 1/e of what is new
_NOTICEABLE = 1 / 8  # of the seconds between two tokens


@dataclass(frozen=True)
class Pace:
    """Seconds between two tokens of a sequence: base_s + n * per_sequence_s while n sequences run."""

    base_s: float
    per_sequence_s: float

    def seconds(self, sequences: float) -> float:
        """Between two tokens of each of so many sequences."""
        return self.base_s + sequences * self.per_sequence_s


class PaceMeter:
    """Measures an instance's steps. Whoever runs them adds; `news` may be called from one other thread."""

    def __init__(self, max_batch: int) -> None:
        """max_batch: most sequences of a step."""
        self._max_batch = max_batch
        # By number of sequences, of steps that compute nothing but their tokens. Never resized: another thread reads.
        self._weights = [0.0] * (max_batch + 1)
        self._means = [0.0] * (max_batch + 1)
        self._steps = 0.0  # of those
        self._most = 0  # sequences of one of those
        # Sums that fade:
        self._tokens = 0.0
        self._prompt_seconds = 0.0  # of steps that compute prompts too
        self._prompt_steps = 0.0
        self._prompt_sequences = 0.0  # that got a token in those
        self._device_seconds = 0.0  # of steps with sequences that had a token before
        self._elapsed = 0.0  # since then
        self._told: Pace | None = None

    def add(
        self,
        sequences: int,
        seconds: float,
        elapsed: float | None,
        *,
        prompts: bool = False,
        begun: int = 0,
        steps: float = 1.0,
    ) -> None:
        """Takes note of a step in which `sequences` got one token more, or of several alike.

        seconds: of the device, for all of them. elapsed: what passed since the tokens before came, but for what others
        had of the device; None where none came. prompts: whether prompts were computed too; begun: how many of those
        got their first token.
        """
        self._fade(math.exp(-seconds / _FORGOTTEN_S))
        self._tokens += sequences * steps + begun
        if prompts:
            self._prompt_seconds += seconds
            self._prompt_steps += steps
            self._prompt_sequences += steps * sequences
        elif sequences and steps > 0:
            self._add_plain(sequences, seconds / steps, steps)
        if sequences and elapsed is not None:
            self._device_seconds += seconds
            self._elapsed += elapsed

    def _fade(self, kept: float) -> None:
        self._tokens *= kept
        self._prompt_seconds *= kept
        self._prompt_steps *= kept
        self._prompt_sequences *= kept
        self._device_seconds *= kept
        self._elapsed *= kept

    def _add_plain(self, sequences: int, seconds: float, steps: float) -> None:
        weight = self._weights[sequences]
        if weight >= _SETTLED:
            seconds = min(seconds, _FAR_OFF * self._means[sequences])
        weight = min(weight + steps, _LATEST)
        self._means[sequences] += (seconds - self._means[sequences]) * min(1.0, steps / weight)
        self._weights[sequences] = weight
        self._steps += steps
        self._most = max(self._most, sequences)

    def pace(self) -> Pace | None:
        """What was measured; None while too little was, or too few sequences have run at once."""
        if self._steps < _ENOUGH or self._most < min(_TELLING, self._max_batch):
            return None
        base, per_sequence = self._line()
        own = base * self._prompt_steps + per_sequence * self._prompt_sequences
        prompts = max(0.0, self._prompt_seconds - own) / self._tokens if self._tokens else 0.0
        stretch = self._elapsed / self._device_seconds if self._device_seconds else 1.0
        return Pace(stretch * base, stretch * (per_sequence + prompts))

    def news(self) -> Pace | None:
        """What was measured, where it differs noticeably from what this said last.

        For one sequence, or for twice as many as have run: what it says of more than that is guessed from a few.
        """
        pace, told = self.pace(), self._told
        if pace is None:
            return None
        if told is not None and all(
            abs(pace.seconds(n) - told.seconds(n)) <= _NOTICEABLE * told.seconds(n) for n in (1, 2 * self._most)
        ):
            return None
        self._told = pace
        return pace

    def _line(self) -> tuple[float, float]:
        """The least squares' line, neither coefficient below zero.

        The guess is that a step without sequences would take no time: it decides where all steps had as many.
        """
        weight, by_n, by_square, seconds, by_both = _GUESS, 0.0, 0.0, 0.0, 0.0
        for n in range(1, self._max_batch + 1):
            w, mean = self._weights[n], self._means[n]
            weight += w
            by_n += w * n
            by_square += w * n * n
            seconds += w * mean
            by_both += w * n * mean
        slope = (weight * by_both - by_n * seconds) / (weight * by_square - by_n * by_n)
        if slope < 0:
            return seconds / weight, 0.0
        base = (seconds - slope * by_n) / weight
        return (base, slope) if base >= 0 else (0.0, by_both / by_square)
