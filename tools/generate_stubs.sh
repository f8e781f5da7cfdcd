#!/usr/bin/env bash
# Makes sdk/warmserve/v1 from protos/. With --check: fails when what is committed is stale.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
PATH="$(dirname "$(realpath -s "$python")"):$PATH"   # protoc finds mypy-protobuf's plugins there
out=sdk
if [ "${1:-}" = --check ]; then
  out=$(mktemp -d); trap 'rm -rf "$out"' EXIT
fi
"$python" -m grpc_tools.protoc -I protos --python_out="$out" --grpc_python_out="$out" \
  --mypy_out=quiet:"$out" --mypy_grpc_out=quiet:"$out" protos/warmserve/v1/*.proto
touch "$out/warmserve/v1/__init__.py"
if [ "$out" != sdk ]; then
  diff -r -x __pycache__ "$out/warmserve/v1" sdk/warmserve/v1 || { echo "Stubs are stale: run 'make protos'." >&2; exit 1; }
fi
