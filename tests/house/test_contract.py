"""docs/rpcs.md names, for every RPC of the contract, who serves it and a test that calls it over a real socket."""

from __future__ import annotations

import ast
import importlib
import re

from google.protobuf.descriptor import FileDescriptor

from tests.house.dockerfile import ROOT

TABLE = ROOT / "docs/rpcs.md"
_ROW = re.compile(r"\| `(?P<rpc>[\w.]+)` \| `(?P<server>[\w/]+\.py)` \| `(?P<file>[\w/]+\.py)::(?P<test>\w+)` \|")


def rpcs() -> set[str]:
    """Service.Method of every RPC in protos/."""
    found = set()
    for proto in (ROOT / "protos/warmserve/v1").glob("*.proto"):
        file: FileDescriptor = importlib.import_module(f"warmserve.v1.{proto.stem}_pb2").DESCRIPTOR
        for service in file.services_by_name.values():
            found |= {f"{service.name}.{method.name}" for method in service.methods}
    return found


def rows() -> list[dict[str, str]]:
    lines = [line for line in TABLE.read_text().splitlines() if line.startswith("| `")]
    matches = [_ROW.fullmatch(line) for line in lines]
    assert all(matches), [line for line, match in zip(lines, matches, strict=True) if not match]
    return [match.groupdict() for match in matches if match]


def functions(path: str) -> set[str]:
    """Names of the functions and methods in a file of the repository."""
    tree = ast.parse((ROOT / path).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))}


def test_every_rpc_has_one_row_and_every_row_an_rpc() -> None:
    named = [row["rpc"] for row in rows()]
    assert sorted(named) == sorted(rpcs())


def test_every_rpc_is_served_where_the_table_says() -> None:
    for row in rows():
        assert row["rpc"].partition(".")[2] in functions(row["server"]), row


def test_every_rpcs_test_exists() -> None:
    for row in rows():
        assert row["test"].startswith("test_"), row
        assert row["test"] in functions(row["file"]), row
