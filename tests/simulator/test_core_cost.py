"""The cost model: how well it fits what was measured, and what it says of throughput that it was not fitted to."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.simulator_steps import MEASURED, rendered, steps
from simulator.cost import H100, H100_MEASURED, CostModel, Measurement, fit
from simulator.h100_steps import STEPS
from simulator.policies.static import Dedicated
from simulator.run import simulate
from simulator.spec import ClusterSpec, ModelSpec, llama2_13b
from warmserve.traces import Request

LLAMA_8B = ModelSpec("8b", 8_030_261_248, 32, 131_072, hidden=4096)


def measured_rows() -> dict[str, float]:
    return {row["what"]: row["value"] for row in json.loads(MEASURED.read_text())["rows"]}


def test_the_fit_is_as_good_as_its_docstring_says() -> None:
    errors = [abs(error) for error in H100.error(H100_MEASURED)]
    assert sum(errors) / len(errors) < 0.05
    assert max(errors) < 0.15


def test_it_tells_the_committed_measurements_which_differ_from_run_to_run() -> None:
    was = {(model, *step): seconds for model, *step, seconds in STEPS}
    now = {(model, *step): seconds for model, *step, seconds in steps(MEASURED)}
    assert was.keys() == now.keys(), "run python -m benchmarks.simulator_steps"
    changed = {step: now[step] / was[step] for step in was}
    assert all(0.85 < ratio < 1.15 for ratio in changed.values()), (
        f"run python -m benchmarks.simulator_steps: {changed}"
    )


def test_steps_are_taken_over_as_they_were_measured() -> None:
    taken: dict[str, Any] = {}
    exec(rendered(MEASURED), taken)
    a_step = re.compile("(8B|1B-0): (decode step, |prefill )[0-9 x]+")
    milliseconds = {what: value for what, value in measured_rows().items() if a_step.fullmatch(what)}
    assert len(milliseconds) == 12
    assert [round(row[-1] * 1e3, 4) for row in taken["STEPS"]] == [
        round(value, 4) for what, value in milliseconds.items()
    ]
    assert ("8B", 64, 1024, 0, pytest.approx(milliseconds["8B: decode step, 64 x 1024"] / 1e3)) in taken["STEPS"]


def test_measurements_without_steps_are_refused(tmp_path: Path) -> None:
    empty = tmp_path / "engine.json"
    empty.write_text(json.dumps({"rows": [{"what": "8B: 64 requests at once", "value": 1.0, "unit": "tokens/s"}]}))
    with pytest.raises(ValueError, match="no rows such as '8B: decode step"):
        steps(empty)


def test_throughput_that_it_was_not_fitted_to() -> None:
    """64 requests of 512 + 128 tokens at once, measured by the same benchmark."""
    requests = [Request(0.0, "8b", 512, 128) for _ in range(64)]
    results = simulate(ClusterSpec(1, 1), [LLAMA_8B], requests, Dedicated())
    took = results.finished_s.max() - results.arrival_s.min()
    assert 64 * 128 / took == pytest.approx(measured_rows()["8B: 64 requests of 512 + 128 at once"], rel=0.1)


def test_a_fit_finds_the_truth_behind_exact_measurements() -> None:
    truth = CostModel(5e-5, 3e-13, 2e-6, 4e-13, 1e-15, 5e-12, 7e-15, 2e-5)
    models = [LLAMA_8B, ModelSpec("1b", 1_235_814_400, 16, 32_768, hidden=2048)]
    measurements = []
    for model in models:
        steps = truth.steps(model)
        measurements += [
            Measurement(model, steps.decode(b, b * c), b, c) for b, c in ((1, 100), (8, 500), (64, 900), (32, 10))
        ]
        measurements += [Measurement(model, steps.prefill(p), prefill=p) for p in (64, 512, 1000, 3000)]
    assert fit(measurements).error(measurements) == pytest.approx([0.0] * len(measurements), abs=1e-6)


def test_more_gpus_make_a_large_model_faster_but_not_twice() -> None:
    spec = llama2_13b()
    one, two = H100.steps(ModelSpec("13b", spec.parameters, spec.layers, spec.kv_bytes_per_token)), H100.steps(spec)
    assert one.decode(1, 512) / 2 < two.decode(1, 512) < one.decode(1, 512)
    assert one.prefill(1024) / 2 < two.prefill(1024) < one.prefill(1024)


@pytest.mark.parametrize(
    ("measurements", "says"),
    [
        ([], "both kinds"),
        ([Measurement(LLAMA_8B, 0.01, 1, 100)], "both kinds"),
        ([Measurement(LLAMA_8B, 0.0, 1, 100), Measurement(LLAMA_8B, 0.1, prefill=10)], "above 0"),
    ],
)
def test_a_fit_of_too_little_is_refused(measurements: list[Measurement], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        fit(measurements)
