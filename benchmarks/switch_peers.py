"""How long others take to load a checkpoint: transformers' from_pretrained with a first token, and fastsafetensors.

    python -m benchmarks.switch_peers FOLDER

Each measurement is a process of its own, whose imports and first touch of the GPU are done before its clock starts and
told apart. The files are in the page cache, or the page cache has forgotten them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.report import Row, table

_PROMPT = 128  # tokens, as in benchmarks.switch
_PIECE = 64 << 20


def peers(folder: Path) -> list[Row]:
    """The rows of all peers, in ms, for one folder of safetensors files and a config. The GPU should be free.

    What cannot be measured here has a row without a value that says why.
    """
    rows = []
    for name, (_, what) in _LOADERS.items():
        for source, ready in (("page cache", _into_page_cache), ("disk", _out_of_page_cache)):
            for file in files(folder):
                ready(file)
            try:
                measured = _in_a_process(name, folder)
            except RuntimeError as error:
                rows.append(Row(f"peer: {what}, {source}: {error}", None, "ms"))
                continue
            rows.append(Row(f"peer: {what}, {source}", measured["load_ms"], "ms"))
            if source == "disk":
                rows.append(Row(f"peer: imports and first touch of the device, {name}", measured["start_ms"], "ms"))
    return rows


def files(folder: Path) -> list[Path]:
    """The weights of a checkpoint, in order."""
    return sorted(folder.glob("*.safetensors"))


def _in_a_process(name: str, folder: Path) -> dict[str, float]:
    """What `_measure` returns. Raises RuntimeError, in one line."""
    if importlib.util.find_spec(name) is None:
        raise RuntimeError(f"{name} is not installed")
    command = [sys.executable, "-m", __spec__.name, str(folder), "--measure", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"failed: {(done.stderr.strip() or 'without a word').splitlines()[-1]}")
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def _into_page_cache(file: Path) -> None:
    with file.open("rb", buffering=0) as opened:
        while opened.read(_PIECE):
            pass


def _out_of_page_cache(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())  # what is not written yet would stay
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# In the process that measures


def _from_pretrained(folder: Path) -> Callable[[], None]:
    import torch
    from transformers import AutoModelForCausalLM

    device = _device()
    placed = {"device_map": device} if importlib.util.find_spec("accelerate") else {}  # straight to the GPU

    def load() -> None:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **placed).to(device)
        prompt = torch.arange(3, 3 + _PROMPT, device=device).remainder(model.config.vocab_size)[None]
        with torch.inference_mode():
            model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=1, do_sample=False, pad_token_id=0
            ).tolist()

    return load


def _fastsafetensors(folder: Path) -> Callable[[], None]:
    import torch
    from fastsafetensors import (  # type: ignore[import-not-found, unused-ignore]
        SafeTensorsFileLoader,
        SingleGroup,
    )

    device = torch.device(_device())

    def load() -> None:
        loader = SafeTensorsFileLoader(SingleGroup(), device, nogds=True)
        loader.add_filenames({0: [str(file) for file in files(folder)]})
        buffers = loader.copy_files_to_device()
        tensors = [buffers.get_tensor(name) for name in loader.get_keys()]
        if device.type == "cuda":
            torch.cuda.synchronize()
        assert tensors
        buffers.close()
        loader.close()

    return load


def _device() -> str:
    """Where models go; its context is there when this returns."""
    import torch

    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    torch.zeros(1, device=device).item()
    return device


_LOADERS: dict[str, tuple[Callable[[Path], Callable[[], None]], str]] = {
    "transformers": (_from_pretrained, "transformers' from_pretrained and a first token"),
    "fastsafetensors": (_fastsafetensors, "fastsafetensors, weights on the device"),
}


def _measure(name: str, folder: Path) -> dict[str, float]:
    began = time.perf_counter()
    load = _LOADERS[name][0](folder)
    ready = time.perf_counter()
    load()
    return {"start_ms": (ready - began) * 1e3, "load_ms": (time.perf_counter() - ready) * 1e3}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a checkpoint: config.json and safetensors files")
    parser.add_argument("--measure", choices=sorted(_LOADERS), help="only this one, here and now, as JSON")
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(_measure(arguments.measure, arguments.folder)))
    else:
        print(table(peers(arguments.folder)))


if __name__ == "__main__":
    main()
