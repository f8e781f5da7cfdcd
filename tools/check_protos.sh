#!/usr/bin/env bash
# Fails where protos/ breaks clients of an earlier version: that of the commit given, else of the newest tag, else of the
# parent commit. Where there is no earlier version (a first commit, a shallow clone) there is nothing to break.
set -euo pipefail
cd "$(dirname "$0")/.."
buf=${BUF:-.venv/bin/buf}

earlier() {
  git rev-parse --verify --quiet "$1^{commit}" >/dev/null && git cat-file -e "$1:protos" 2>/dev/null
}

against=${1:-$(git describe --tags --abbrev=0 HEAD~1 2>/dev/null || echo HEAD~1)}
if ! earlier "$against"; then
  echo "There is no earlier version of protos/ ($against) to compare with."
  exit 0
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
git archive "$against" protos | tar -x -C "$folder"
"$buf" breaking protos --config buf.yaml --against "$folder/protos"
echo "protos/ breaks nothing since $(git rev-parse --short "$against")."
