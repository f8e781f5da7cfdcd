"""The page of metrics is complete, and names no metric that is not there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
KINDS = ("Counter", "Gauge", "Histogram", "Summary")


def in_the_code() -> dict[str, set[str]]:
    """The labels of each metric of the services, by the name that Prometheus shows."""
    found: dict[str, set[str]] = {}
    for path in (ROOT / "services").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in KINDS):
                continue
            if not (node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str)):
                continue
            name: str = node.args[0].value
            if node.func.id == "Counter" and not name.endswith("_total"):
                name += "_total"
            found[name] = set(ast.literal_eval(node.args[2])) if len(node.args) > 2 else set()
    return found


def on_the_page() -> dict[str, set[str]]:
    rows = re.findall(r"^\| `(\w+)` \|([^|]*)\|", (ROOT / "docs" / "metrics.md").read_text(), re.MULTILINE)
    return {name: {label.strip() for label in labels.split(",") if label.strip()} for name, labels in rows}


def test_the_page_lists_every_metric_with_its_labels() -> None:
    assert len(in_the_code()) > 30
    assert on_the_page() == in_the_code()
