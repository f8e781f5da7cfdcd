"""Takes an H100's measured steps over into the simulator.

    python -m benchmarks.simulator_steps [benchmarks/results/engine-h100.json]

writes simulator/h100_steps.py, to which simulator.cost fits its model when it is imported. To be run when
`python -m benchmarks.engine` has been run anew and steps take noticeably longer or shorter: until then the tests
compare what the simulator has with what is measured, and allow for what differs from run to run.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MEASURED = ROOT / "benchmarks" / "results" / "engine-h100.json"
TAKEN = ROOT / "simulator" / "h100_steps.py"

_ROW = re.compile(r"(\w+?)(?:-0)?: (?:decode step, (?P<decodes>\d+) x (?P<context>\d+)|prefill (?P<prefill>\d+))")

Step = tuple[str, int, int, int, float]


def steps(measured: Path) -> list[Step]:
    """The steps in the engine benchmark's JSON: model, sequences that decode, context of each, tokens of a prompt,
    seconds. ValueError where there is none."""
    found: list[Step] = []
    for row in json.loads(measured.read_text())["rows"]:
        match = _ROW.fullmatch(row["what"])
        if match is not None and row["unit"] == "ms":
            counts = (int(match[name] or 0) for name in ("decodes", "context", "prefill"))
            found.append((match[1], *counts, round(row["value"] / 1e3, 9)))
    if not found:
        raise ValueError(f"{measured} has no rows such as '8B: decode step, 1 x 512' or '8B: prefill 128'")
    return found


def rendered(measured: Path) -> str:
    """The module's text."""
    lines = "".join(f'    ("{model}", {", ".join(map(repr, numbers))}),\n' for model, *numbers in steps(measured))
    return f'''"""Steps of the engine on one H100 80GB, as benchmarks/results/engine-h100.json had them.

Written by `python -m benchmarks.simulator_steps`.
"""

# Model, sequences that decode, context of each, tokens of a prompt, seconds.
STEPS: tuple[tuple[str, int, int, int, float], ...] = (
{lines})
'''


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measured", type=Path, nargs="?", default=MEASURED, help="the engine benchmark's JSON")
    TAKEN.write_text(rendered(parser.parse_args().measured))
    print(f"written to {TAKEN}")


if __name__ == "__main__":
    main()
