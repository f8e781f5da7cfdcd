"""The learnt predictor: gradient-boosted quantiles of the mean load, from which the other quantities follow. Pure.

One set of boosters per anchor (a distance ahead); forecasts between anchors lie between theirs.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from lightgbm.basic import LightGBMError

from services.forecaster.boosting import Boosters, Calibration, calibrate, learn
from services.forecaster.companions import Companions, learn_companions
from services.forecaster.features import TINY, Features, Floats, Moments, features, joined
from services.forecaster.mixtures import mixtures
from services.forecaster.predictors import LEVELS, MEAN_LOAD, QUANTITIES, PublishedPredictor, with_peaks_above_means
from services.forecaster.prior import Prior, learn_prior
from services.forecaster.scoring import DISTANCES, loss_of

ANCHORS = (1, 3, 6, 12)
MAX_HORIZON = ANCHORS[-1]
MIN_DAYS = 3  # of history: two to calibrate on and one to learn from
_HELD_OUT_DAYS = 2
_MAX_ROWS = 100_000  # rows that one model learns from; what goes beyond is thinned out
_COMPANION_ORIGINS = 48  # moments of the days held out at which the other quantities are calibrated
_SAYS = {3: (6, 0.1), 6: (12, 0.1)}  # by anchor, the share of the next one in its forecast: errors cancel out
_MIXED_DISTANCE = 1  # at which mixtures are learnt from too; further ahead they teach nothing
_THREADS = 2
# Of a series of which n windows are known the published predictor's share is _PUBLISHED_SAY / max(n, _FIRST_WINDOWS).
_FIRST_WINDOWS = 3
_PUBLISHED_SAY = 2.25
_HEAD = b"warmserve learned 3 "  # the number changes with the features, the anchors, or what is saved


class LearnedPredictor:
    """See the module, and Predictor. Made by `fit` or `loads`."""

    name = "learned"

    def __init__(
        self,
        season: int,
        anchors: dict[int, tuple[Boosters, Calibration]],
        companions: Companions | None,
        prior: Prior,
        loss: float,
    ) -> None:
        self.loss = loss
        """scoring.loss on the days held out when it was fitted; NaN where they had no traffic."""
        self._season = season
        self._anchors = anchors
        self._companions = companions
        self._prior = prior
        self._published = PublishedPredictor(season)

    def predict_many(self, series: Floats, horizon: int) -> Floats:
        """See Predictor. The series are of the quantity that it was fitted to, the first one where there were several.

        ValueError for a horizon beyond MAX_HORIZON.
        """
        forecast = self._learned(series, horizon)
        prior = Prior(self._prior.season, self._prior.table[:, :1])
        return prior.blend(series[:, :, None], forecast[:, :, None])[:, :, 0]

    def forecast_all(self, history: Floats, horizon: int) -> Floats:
        """See Predictor. ValueError for a horizon beyond MAX_HORIZON, and where it was fitted to one quantity only."""
        if self._companions is None:
            raise ValueError("fitted to one quantity only: fit it to all of them, or use predict_many")
        load = self._learned(history[:, :, MEAN_LOAD], horizon)
        recent = history[:, -self._season :] if history.shape[1] else history
        forecast = self._companions.derive(recent, load)
        return with_peaks_above_means(self._prior.blend(history, forecast))

    def at(self, series: Floats, origins: Moments, distance: int) -> Floats:
        """See Predictor. Without the prior: nothing is added to what is known of a series in its first windows."""
        used = _anchors_for(distance)
        answers = self._answers(series, origins, used)
        share = (distance - used[0]) / max(1, used[-1] - used[0])
        mixed = (answers[0] * (1 - share) + answers[-1] * share).reshape(len(series), len(origins), len(LEVELS))
        unknown = np.isnan(mixed).any(axis=(1, 2))
        if unknown.any():
            published = self._published.at(series[unknown], origins, distance)
            mixed[unknown] = np.where(np.isnan(mixed[unknown]), published, mixed[unknown])
        return mixed

    def state(self) -> dict[str, Any]:
        """All that it is, for JSON."""
        return {
            "season": self._season,
            "anchors": {
                distance: {
                    "boosters": boosters.to_texts(),
                    "edges": calibration.edges.tolist(),
                    "factors": calibration.factors.tolist(),
                }
                for distance, (boosters, calibration) in self._anchors.items()
            },
            "companions": self._companions
            and {"usual": self._companions.usual.tolist(), "factors": self._companions.factors.tolist()},
            "prior": self._prior.table.tolist(),
            "loss": self.loss,
        }

    @staticmethod
    def from_state(state: dict[str, Any]) -> LearnedPredictor:
        """What `state` came from. KeyError, TypeError, LightGBMError where it came from elsewhere."""
        anchors = {
            distance: (
                Boosters.from_texts(distance, state["anchors"][str(distance)]["boosters"]),
                Calibration(
                    np.array(state["anchors"][str(distance)]["edges"]),
                    np.array(state["anchors"][str(distance)]["factors"]),
                ),
            )
            for distance in ANCHORS
        }
        companions = state["companions"]
        return LearnedPredictor(
            state["season"],
            anchors,
            companions and Companions(np.array(companions["usual"]), np.array(companions["factors"])),
            Prior(state["season"], np.array(state["prior"])),
            state["loss"],
        )

    def _learned(self, series: Floats, horizon: int) -> Floats:
        if horizon > MAX_HORIZON:
            raise ValueError(
                f"learned for up to {MAX_HORIZON} windows ahead, not {horizon}; use the published predictor"
            )
        if not series.size:
            return np.zeros((len(series), horizon, len(LEVELS)))
        used = [anchor for anchor in ANCHORS if anchor < horizon]
        used.append(next(anchor for anchor in ANCHORS if anchor >= horizon))
        answers = self._answers(series, np.array([series.shape[1] - 1]), used)
        result = np.empty((len(series), horizon, len(LEVELS)))
        for step in range(horizon):
            right = int(np.searchsorted(used, step + 1))
            left = max(right - 1, 0)
            share = (step + 1 - used[left]) / (used[right] - used[left]) if right > left else 0.0
            result[:, step] = answers[left] * (1 - share) + answers[right] * share
        unknown = np.isnan(result).any(axis=(1, 2))
        if unknown.any():
            result[unknown] = self._published.predict_many(series[unknown], horizon)
        self._temper(series, result)
        return result

    def _temper(self, series: Floats, result: Floats) -> None:
        """Of series that began a moment ago the learnt predictor has seen few: the published one has a say."""
        windows = (~np.isnan(series)).sum(axis=1)
        new = windows < self._season
        if new.any():
            share = (_PUBLISHED_SAY / np.maximum(windows[new], _FIRST_WINDOWS))[:, None, None]
            published = self._published.predict_many(series[new], result.shape[1])
            result[new] = share * published + (1 - share) * result[new]

    def _answers(self, series: Floats, origins: Moments, used: Sequence[int]) -> list[Floats]:
        """Of each anchor (rows, 3); NaN of series of which nothing is known: of late, and at this hour of all days."""
        asked = sorted({*used, *(_SAYS[anchor][0] for anchor in used if anchor in _SAYS)})
        seen = features(series, origins, asked, self._season)
        answers = {anchor: self._answer(anchor, of_anchor) for anchor, of_anchor in zip(asked, seen, strict=True)}
        for anchor, (other, share) in _SAYS.items():
            if anchor in answers and other in answers:
                answers[anchor] = (1 - share) * answers[anchor] + share * answers[other]
        return [answers[anchor] for anchor in used]

    def _answer(self, anchor: int, seen: Features) -> Floats:
        boosters, calibration = self._anchors[anchor]
        return calibration.apply(boosters.quantiles(seen), seen.roughness) * seen.scale[:, None]


def fit(history: Floats, season: int) -> LearnedPredictor:
    """Learns from shape (n, windows, 5), columns as in QUANTITIES, or of one quantity from shape (n, windows).

    NaN in gaps and before a series begins. ValueError where that is too little: fewer than three seasons, or none of
    them with traffic to learn from.
    """
    several = history if history.ndim == 3 else history[:, :, None]
    series = several[:, :, 0]
    windows = series.shape[1]
    if windows < MIN_DAYS * season:
        raise ValueError(f"{windows} windows are too few to learn from; {MIN_DAYS * season} are needed")
    split = windows - _HELD_OUT_DAYS * season
    # Moments to learn from, thinned out evenly where there are too many, at every place in the hour and day.
    step = max(1, -(-series.size // _MAX_ROWS))
    while math.gcd(step, season) > 1:
        step += 1
    origins = np.arange(0, windows - 1, step)
    anchors = {}
    trials = {}
    seen_by = features(series, origins, ANCHORS, season)
    # Many models on a thread each: LightGBM's own threads wait for each other wherever a core is taken.
    with ThreadPoolExecutor(_THREADS) as pool:
        for distance, seen in zip(ANCHORS, seen_by, strict=True):
            actual = _actual(series, origins, distance, seen)
            # The trial learns from every other moment: they tell almost what their neighbours tell. The other half of
            # them in every second series, so that it sees every place in the hour.
            half = (np.arange(len(series))[:, None] + np.arange(len(origins))) % 2 == 0
            early = (half & (origins + distance < split)).ravel()
            late = np.tile(origins + 1 >= split, len(series))  # no window of these was learnt from, nor that before
            if np.isnan(actual[early]).all() or np.isnan(actual[late]).all():
                raise ValueError("no traffic to learn from, or none in the last two seasons to calibrate on")
            trial = learn(seen.rows(early), actual[early], distance, pool)
            calibration = calibrate(trial, seen.rows(late), actual[late])
            if distance == _MIXED_DISTANCE:
                seen, actual = _with_mixtures(seen, actual, series, origins, season)
            if distance not in DISTANCES:  # every other moment is nearly as good, for half the time
                seen, actual = seen.rows(half.ravel()), actual[half.ravel()]
            anchors[distance] = (learn(seen, actual, distance, pool), calibration)
            trials[distance] = (trial, calibration)
    prior = learn_prior(several, season)
    tried = LearnedPredictor(season, trials, None, prior, 0.0)
    held_out = np.arange(split - 1, windows - max(DISTANCES))
    loss = loss_of({distance: tried.at(series, held_out, distance) for distance in DISTANCES}, series, held_out)
    companions = None
    if several.shape[2] == len(QUANTITIES):
        some = held_out[:: max(1, len(held_out) // _COMPANION_ORIGINS)]
        companions = learn_companions(several, some, 1, tried.at(series, some, 1), season)
    return LearnedPredictor(season, anchors, companions, prior, loss)


def _with_mixtures(
    seen: Features, actual: Floats, series: Floats, origins: Moments, season: int
) -> tuple[Features, Floats]:
    """And what mixtures of the series tell, at every other moment of each."""
    mixed = mixtures(series)
    all_seen, all_actual = [seen], [actual]
    for parity in (0, 1):
        some, moments = mixed[parity::2], origins[parity::2]
        if some.size:
            all_seen.append(features(some, moments, [_MIXED_DISTANCE], season)[0])
            all_actual.append(_actual(some, moments, _MIXED_DISTANCE, all_seen[-1]))
    return joined(all_seen), np.concatenate(all_actual)


def dumps(predictor: LearnedPredictor) -> bytes:
    """The predictor as the bytes that `loads` reads: a line with a version and a checksum, then compressed JSON."""
    state = predictor.state()
    body = zlib.compress(json.dumps(state).encode())
    return _HEAD + hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def loads(data: bytes, season: int) -> LearnedPredictor:
    """The predictor that `dumps` wrote. ValueError, with words, where it is broken or of another version or season."""
    head, _, body = data.partition(b"\n")
    if not head.startswith(_HEAD):
        raise ValueError("it is no learnt predictor of this version: fit it anew")
    if head[len(_HEAD) :] != hashlib.sha256(body).hexdigest().encode():
        raise ValueError("it is damaged or cut off: its checksum does not fit")
    try:
        state = json.loads(zlib.decompress(body))
        if state["season"] != season:
            raise ValueError(f"it was fitted to seasons of {state['season']} windows, not {season}")
        return LearnedPredictor.from_state(state)
    except (zlib.error, KeyError, TypeError, LightGBMError) as error:
        raise ValueError(f"it cannot be read: {error}") from error


def _anchors_for(distance: int) -> list[int]:
    """The anchors on both sides of a distance, or the one that it is. ValueError beyond MAX_HORIZON."""
    if not 1 <= distance <= MAX_HORIZON:
        raise ValueError(f"learned for 1 to {MAX_HORIZON} windows ahead, not {distance}; use the published predictor")
    if distance in ANCHORS:
        return [distance]
    return [max(anchor for anchor in ANCHORS if anchor < distance), min(a for a in ANCHORS if a > distance)]


def _actual(series: Floats, origins: Moments, distance: int, seen: Features) -> Floats:
    """What came at `distance` from each origin, in scales; NaN where that is unknown, or the scale is."""
    at = origins + distance
    reached = at < series.shape[1]
    actual = np.where(reached, series[:, np.minimum(at, series.shape[1] - 1)], np.nan).ravel()
    useless = np.isnan(seen.scale) | (seen.scale <= TINY)
    return np.where(useless, np.nan, actual / np.where(useless, 1.0, seen.scale))
