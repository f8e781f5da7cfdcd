"""A replay with its progress shown while it runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from launcher.replay import Outcome, replay
from warmserve.traces import Request

_PLAIN_EVERY = 20  # requests per line where the output is no terminal


async def replay_with_progress(
    target: str, requests: Sequence[Request], *, timeout_s: float, seed: int, console: Console
) -> list[Outcome]:
    """Like `replay`; on a terminal a live line shows where it stands, elsewhere a line is printed now and then."""
    running: Counter[str] = Counter()
    found: Counter[str] = Counter()
    ended = 0
    columns = (
        TextColumn("{task.description}"),
        BarColumn(20),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[state]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("answered", total=len(requests), state="")

        def state() -> str:
            now = ", ".join(f"{model} {count}" for model, count in sorted(running.items()) if count) or "none"
            seen = ", ".join(f"{name} {count}" for name, count in sorted(found.items()))
            return f"running: {now}; found {seen or 'nothing yet'}"

        def on_sent(request: Request) -> None:
            running[request.model] += 1
            progress.update(bar, state=state())

        def on_outcome(outcome: Outcome) -> None:
            nonlocal ended
            ended += 1
            running[outcome.model] -= 1
            found["lost" if outcome.lost else outcome.found_state] += 1
            progress.update(bar, advance=1, state=state())
            if not console.is_terminal and (ended % _PLAIN_EVERY == 0 or ended == len(requests)):
                console.print(f"answered {ended}/{len(requests)}; {state()}", highlight=False, soft_wrap=True)

        return await replay(target, requests, timeout_s=timeout_s, seed=seed, on_sent=on_sent, on_outcome=on_outcome)
