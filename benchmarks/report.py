"""What every benchmark says at its end: a table, and the same as JSON.

A row holds what was measured beside a limit or a peer that was measured in the same run, and what it should reach. The
newest result of each machine is kept under benchmarks/results/NAME-MACHINE.json; a row that misses its target stays.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence as Many
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Row:
    """One thing measured. More is better where the unit is a rate ("GB/s", "tokens/s") or a row says so with `more`,
    less elsewhere ("ms", "%")."""

    what: str
    value: float | None
    """None: it could not be measured here, for a reason that `what` tells."""
    unit: str
    limit: float | None = None
    """The hardware's limit or a peer's result, in the same unit, from the same run."""
    limit_source: str | None = None
    """What the limit is: "copy bandwidth", "transformers eager"."""
    target: float | None = None
    """What the value should reach."""
    more: bool = False
    """Whether more is better although the unit is no rate: how many times a peer's."""
    note: str | None = None
    """What else a reader of the table should know: why a target is missed."""

    @property
    def ratio(self) -> float | None:
        """value / limit."""
        return self.value / self.limit if self.limit and self.value is not None else None

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None where there is none."""
        if self.target is None or self.value is None:
            return None
        return self.value >= self.target if self.more or self.unit.endswith("/s") else self.value <= self.target


def report(benchmark: str, rows: Many[Row], file: Path | None = None) -> None:
    """Prints the rows as a table; writes them to `file`, if any, with where and when they were measured."""
    print(table(rows))
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(document(benchmark, rows), indent=1) + "\n")
        print(f"written to {file}")


def _portable(argument: str) -> str:
    """An argument without the folders of this machine."""
    return Path(argument).name if argument.startswith("/") else argument


def document(benchmark: str, rows: Many[Row]) -> dict[str, Any]:
    """What the JSON file holds."""
    return {
        "benchmark": benchmark,
        "command": " ".join(["python", "-m", f"benchmarks.{benchmark}", *map(_portable, sys.argv[1:])]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "rows": [
            {
                "what": row.what,
                "value": _rounded(row.value),
                "unit": row.unit,
                "limit": _rounded(row.limit),
                "limit_source": row.limit_source,
                "ratio": _rounded(row.ratio),
                "target": _rounded(row.target),
                "met": row.met,
                "note": row.note,
            }
            for row in rows
        ],
    }


def table(rows: Many[Row]) -> str:
    """The rows, one a line, in aligned columns."""
    lines = [("what", "value", "unit", "limit", "ratio", "target", "met", "limit is", "note")]
    for row in rows:
        met = {None: "", True: "yes", False: "NO"}[row.met]
        numbers = (_text(row.limit), _text(row.ratio), _text(row.target))
        lines.append((row.what, _text(row.value), row.unit, *numbers, met, row.limit_source or "", row.note or ""))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    left = {0, 2, 6, 7, 8}  # columns of words
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def machine() -> dict[str, Any]:
    """What the numbers depend on: processor, memory, GPU, versions."""
    facts: dict[str, Any] = {
        "cpu": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
    }
    torch = sys.modules.get("torch")  # a benchmark of the router need not have it
    if torch is not None:
        facts["torch"] = torch.__version__
        if torch.cuda.is_available():
            properties = torch.cuda.get_device_properties(0)
            facts["gpu"] = properties.name
            facts["gpu_memory_gb"] = round(properties.total_memory / 1e9)
            facts["cuda"] = torch.version.cuda
    return facts


def commit() -> str | None:
    """The commit that was measured, marked where files differ from it; None outside a checkout."""
    folder = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-changed" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.machine()


def _rounded(number: float | None) -> float | None:
    """Five digits: more than any measurement here has."""
    return None if number is None else float(f"{number:.5g}")


def _text(number: float | None) -> str:
    if number is None:
        return ""
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.3g}"
