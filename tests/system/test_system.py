"""What users do, on the whole system."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path

import openai
import pytest

from launcher.programs import ProgramError
from tests.system.conftest import StartSystem
from warmserve import ModelNotFoundError


@pytest.mark.timeout(240)
async def test_models_take_turns_on_one_agent(start_system: StartSystem) -> None:
    # Room for one active model at a time, and a part of another.
    async with start_system(agents=1, arena_bytes=112 << 20) as system:
        for name in system.checkpoints:
            await system.deploy(name)
        with pytest.raises(ModelNotFoundError) as caught:
            await system.client.generate("tiny-lama", "x")
        assert caught.value.suggestions[0] == "tiny-llama"

        # Twenty that wait for a model wake it once. What was just deployed may have been warmed meanwhile.
        first = next(iter(system.checkpoints))
        answers = await asyncio.gather(
            *(system.client.generate(first, "Once", max_tokens=4, temperature=0, timeout=60) for _ in range(20))
        )
        assert len({answer.text for answer in answers}) == 1
        assert answers[0].timing.found_state != "active"
        events = json.loads(await system.warmctl("events", "-o", "json", "-n", "100"))
        woken = [event for event in events if event.get("kind", "").lower().endswith("woken")]
        assert [event["model"] for event in woken] == [first]

        # The others get their turn, and the first comes back with the same answer.
        for name in (*system.checkpoints, first):
            again = await system.client.generate(name, "Once", max_tokens=4, temperature=0, timeout=60)
            assert name != first or again.text == answers[0].text
        explained = await system.warmctl("explain", first)
        assert f"{first} is active" in explained

        await system.warmctl("models", "undeploy", first, "--yes")
        while first in {model.name for model in await system.client.models()}:
            await asyncio.sleep(0.01)  # routers learn of it within moments
        with pytest.raises(ModelNotFoundError):
            await system.client.generate(first, "Once", max_tokens=1, timeout=10)


@pytest.mark.timeout(240)
async def test_any_openai_client(start_system: StartSystem) -> None:
    async with start_system(agents=1, arena_bytes=192 << 20) as system:
        await system.deploy("tiny-qwen3")
        client = openai.AsyncOpenAI(base_url=f"{system.cluster.http_url}/v1", api_key="none", max_retries=0)
        assert [model.id async for model in client.models.list()] == ["tiny-qwen3"]
        messages = [{"role": "user", "content": "Say something."}]
        whole = await client.chat.completions.create(
            model="tiny-qwen3", messages=messages, max_tokens=12, temperature=0
        )
        stream = await client.chat.completions.create(
            model="tiny-qwen3", messages=messages, max_tokens=12, temperature=0, stream=True
        )
        pieces = [chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices]
        assert "".join(pieces) == whole.choices[0].message.content
        with pytest.raises(openai.BadRequestError, match="max_tokens"):
            await client.completions.create(model="tiny-qwen3", prompt="x", max_tokens=-1)
        await client.close()


@pytest.mark.timeout(240)
async def test_what_cannot_be_deployed_leaves_nothing_behind(start_system: StartSystem, tmp_path: Path) -> None:
    async with start_system(agents=2, arena_bytes=64 << 20) as system:
        broken = system.cluster.folder.models / "broken"
        shutil.copytree(system.checkpoints["tiny-llama"], broken)
        weights = broken / "model.safetensors"
        whole = weights.read_bytes()

        async def refused(name: str, source: Path, message: str) -> None:
            with pytest.raises(ProgramError) as caught:
                await system.warmctl("models", "deploy", name, f"--source={source}")
            assert message in str(caught.value)
            assert "Traceback" not in str(caught.value)

        weights.write_bytes(whole[: len(whole) // 2])
        await refused("m", broken, "model.safetensors")
        weights.unlink()
        (broken / "pytorch_model.bin").write_bytes(b"pickle")
        await refused("m", broken, "safetensors")
        await refused("m", broken / "missing", "missing")
        await refused("m", tmp_path / "elsewhere", "outside the allowed model folders")
        await refused("m", system.checkpoints["tiny-mistral"], "the arena has 64")
        await refused("no spaces", system.checkpoints["tiny-llama"], "is not allowed")
        assert json.loads(await system.warmctl("models", "list", "-o", "json")) == []
        assert not list((system.cluster.folder.path / "images").iterdir())
