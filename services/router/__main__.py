"""`python -m services.router`: the router as a process."""

from __future__ import annotations

import sys

# transformers imports torch wherever it is installed, which costs seconds and 200 MB; tokenizers do without it.
sys.modules.setdefault("torch", None)  # type: ignore[arg-type]

from services.common.process import run  # noqa: E402
from services.router.service import serve  # noqa: E402
from services.router.settings import RouterSettings  # noqa: E402


def main() -> None:
    """Runs a router until SIGTERM or SIGINT."""
    run("router", RouterSettings, serve)


if __name__ == "__main__":
    main()
