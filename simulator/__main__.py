"""`python -m simulator`: what `warmctl simulate` runs."""

from __future__ import annotations

import sys

try:
    from simulator.cli import app
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] in ("services", "simulator", "warmserve"):
        raise
    sys.exit(f"simulate: {error.name} is missing: pip install 'warmserve-server[simulator]'")

if __name__ == "__main__":
    app(prog_name="warmctl simulate")
