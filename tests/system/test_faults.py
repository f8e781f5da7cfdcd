"""kill -9, one process at a time: nobody's answer changes."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from launcher.members import serves
from tests.system.conftest import StartSystem, System

MODEL = "tiny-llama"
PROMPTS = [f"In the beginning, number {index}, there was" for index in range(12)]
LENGTH = 100


async def answer(system: System, prompt: str, begun: asyncio.Event | None = None) -> tuple[str, int]:
    """The text of one greedy stream and how often it moved; `begun` is set at its third piece."""
    text = ""
    async with system.client.stream_generate(MODEL, prompt, max_tokens=LENGTH, temperature=0, timeout=120) as stream:
        count = 0
        async for piece in stream.text_iter():
            text += piece
            count += 1
            if begun is not None and count >= 3:
                begun.set()
        assert stream.completion.text == text
        return text, stream.completion.timing.resumed


async def members_of_instances(system: System) -> set[str]:
    """The agents that serve now."""
    found = await system.warmctl("models", "describe", MODEL, "-o", "json")
    return {agent for agent in ("agent-0", "agent-1") if agent in found}


@pytest.mark.timeout(240)
async def test_streams_go_on_when_an_agent_is_killed(start_system: StartSystem) -> None:
    async with start_system(agents=2, arena_bytes=192 << 20) as system:
        await system.deploy(MODEL, "--min-replicas=2", "--wait")
        undisturbed = [text for text, _ in await asyncio.gather(*(answer(system, prompt) for prompt in PROMPTS))]
        assert len(set(undisturbed)) > 1

        moved = 0
        while not moved:  # on a busy machine the other agent may have had all of them, or this one have ended its own
            begun = [asyncio.Event() for _ in PROMPTS]
            streams = [asyncio.create_task(answer(system, p, b)) for p, b in zip(PROMPTS, begun, strict=True)]
            await asyncio.gather(*(event.wait() for event in begun))
            killed = system.pid("agent-0")
            os.kill(killed, signal.SIGKILL)
            answers = await asyncio.gather(*streams)

            assert [text for text, _ in answers] == undisturbed
            moved = sum(resumed for _, resumed in answers)
            while system.pid("agent-0") == killed:
                await asyncio.sleep(0.05)


@pytest.mark.timeout(240)
async def test_any_one_service_may_be_killed_while_the_others_go_on(start_system: StartSystem) -> None:
    async with start_system(agents=2, arena_bytes=192 << 20) as system:
        await system.deploy(MODEL, "--min-replicas=1", "--wait")
        expected, _ = await answer(system, PROMPTS[0])
        for name in ("placer", "forecaster", "etcd", "redis", "agent-0", "agent-1"):
            before = system.pid(name)
            os.kill(before, signal.SIGKILL)
            # The answer may have to wait for what is starting again, but it comes, and is the same.
            assert (await answer(system, PROMPTS[0]))[0] == expected, name
            while system.pid(name) == before:
                await asyncio.sleep(0.05)
        before = system.pid("router")
        os.kill(before, signal.SIGKILL)  # its own requests end with it; the next router serves as before
        while system.pid("router") == before or not await asyncio.to_thread(serves, system.cluster.router_address):
            await asyncio.sleep(0.05)
        assert (await answer(system, PROMPTS[0]))[0] == expected
