"""The peers that benchmarks.switch measures, on a tiny checkpoint."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from benchmarks.report import document, table
from benchmarks.switch_peers import peers
from tests.gpu_agent.checkpoints import SHARDED, llama


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peers") / "m"
    llama(folder, shard_size=SHARDED)
    return folder


def test_each_peer_has_a_row_for_the_page_cache_and_one_for_the_disk(checkpoint: Path) -> None:
    rows = peers(checkpoint)
    there = [row.what for row in rows if row.what.startswith("peer: transformers'") and row.value]
    assert [what.rsplit(", ")[-1] for what in there if "first token" in what] == ["page cache", "disk"]
    assert any("imports" in row.what and row.value for row in rows)
    fast = [row for row in rows if "fastsafetensors, weights" in row.what]
    assert len(fast) == 2
    if importlib.util.find_spec("fastsafetensors") is None:
        assert all(row.value is None and "fastsafetensors is not installed" in row.what for row in fast)
        assert "not installed" in table(rows)
        assert [row["value"] for row in document("switch", fast)["rows"]] == [None, None]


def test_a_peer_that_fails_says_so(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"nothing of the kind")
    failed = [row for row in peers(tmp_path) if "transformers" in row.what]
    assert [(row.value, ": failed: " in row.what) for row in failed] == [(None, True)] * 2
