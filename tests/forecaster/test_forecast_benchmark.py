"""The accuracy benchmark on a trace in ServeGen's format that is made here: it reads, rolls, and never looks ahead."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from benchmarks import forecast
from services.forecaster.learned import fit
from services.forecaster.predictors import PublishedPredictor

DAY = forecast.DAY
DAYS = 5


def write_trace(file: Path, days: int = DAYS) -> None:
    """Two clients of each model; m-mid loses two windows of all clients."""
    rng = np.random.default_rng(2)
    with gzip.open(file, "wt") as out:
        out.write("model,client,window_start_s,rate_per_s,cv,arrival_dist,param1,param2\n")
        for model in (*forecast.MODELS, "mm-image"):
            for client in range(2):
                rates = (
                    (client + 1)
                    * (2 + np.sin(np.arange(days * DAY) * 2 * np.pi / DAY))
                    * rng.gamma(50, 0.02, days * DAY)
                )
                if model == "m-mid":
                    rates[200:202] = 0
                for window, rate in enumerate(rates):
                    out.write(f"{model},{client},{window * forecast.WINDOW_S},{rate:.6g},1,Gamma,1,1\n")


@pytest.fixture(scope="module")
def rates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    file = tmp_path_factory.mktemp("trace") / "servegen_windows.csv.gz"
    write_trace(file)
    return forecast.read_windows(file)


def test_gaps_are_unknown_and_not_quiet(rates: dict[str, np.ndarray]) -> None:
    assert list(rates) == list(forecast.MODELS)
    assert {model: list(np.flatnonzero(np.isnan(one[0]))) for model, one in rates.items()} == {
        "m-large": [],
        "m-mid": [200, 201],
        "m-small": [],
    }


def test_series_are_totals_and_the_busiest_clients_of_the_days_to_learn(rates: dict[str, np.ndarray]) -> None:
    changed = {model: one.copy() for model, one in rates.items()}
    changed["m-large"][0, 4 * DAY :] = 1e6  # busy only when it is too late
    sets = forecast.choose_series(changed, 4 * DAY)
    np.testing.assert_allclose(sets["totals"][0, :10], rates["m-large"][:, :10].sum(axis=0))
    assert np.isnan(sets["totals"][1, 200])
    assert np.nanmean(sets["clients"][:3, : 4 * DAY]) > 1.5 * np.nanmean(sets["clients"][3:, : 4 * DAY])


@pytest.mark.parametrize("distance", forecast.HORIZONS)
def test_no_past_forecast_moves_when_the_future_changes(rates: dict[str, np.ndarray], distance: int) -> None:
    series = np.concatenate(list(rates.values()))
    now = 4 * DAY + 50  # within the second test day: the first fit, and half a day's forecasts, are past
    changed = series.copy()
    changed[:, now:] = 1e5
    published = PublishedPredictor(DAY)

    def forecasts(values: np.ndarray) -> list[np.ndarray]:
        fits = {day * DAY: fit(values[:, : day * DAY], DAY) for day in (3, 4)}
        learned = forecast.learned_quantiles(values, fits, 3, distance)
        points = published.points(values, distance)
        rule = forecast.rule_quantiles(values, lambda *_: points, 3, distance)
        return [learned, rule]

    made = now - (3 * DAY - 1)  # origins before `now`
    for before, after in zip(forecasts(series), forecasts(changed), strict=True):
        np.testing.assert_array_equal(before[:, :made], after[:, :made])
        assert not np.array_equal(before[:, made:], after[:, made:])


def test_scores_of_known_forecasts() -> None:
    actual = np.array([[10.0, np.nan, 20.0]])
    quantiles = np.array([[[8.0, 12.0, 12.0], [0.0, 0.0, 0.0], [20.0, 15.0, 30.0]]])
    score = forecast.score(quantiles, actual)
    assert score.wape == pytest.approx(2 / 30)
    assert score.pinball == pytest.approx((0.1 * 2 + 0.9 * 5) / 30)
    assert (score.cover90, score.cover99) == (0.5, 1.0)
    assert score.over == pytest.approx(27 / 30)


@pytest.mark.parametrize("spread", [0.5, 20.0])
def test_spreads_that_know_what_came_cover_nine_in_ten(spread: float) -> None:
    actual = np.random.default_rng(0).normal(50, 10, (5, 200))
    actual[0, :50] = np.nan
    quantiles = np.stack([np.full_like(actual, level) for level in (50, 50 + spread, 100)], axis=2)
    known = forecast.score(forecast.covering_in_hindsight(quantiles, actual), actual)
    assert known.cover90 == pytest.approx(0.9, abs=1e-3)
    assert known.wape == forecast.score(quantiles, actual).wape


def test_a_missing_trace_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("WARMSERVE_TRACES", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["forecast"])
    with pytest.raises(SystemExit) as stopped:
        forecast.main()
    assert stopped.value.code == 2
    assert f"{tmp_path}/servegen_windows.csv.gz is missing: set WARMSERVE_TRACES" in capsys.readouterr().err


def test_a_file_of_another_kind_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "other.csv.gz"
    file.write_bytes(gzip.compress(b"TIMESTAMP,ContextTokens\n2023,5\n"))
    monkeypatch.setattr("sys.argv", ["forecast", "--trace", str(file)])
    with pytest.raises(SystemExit):
        forecast.main()
    assert "does not read as ServeGen's windows" in capsys.readouterr().err
