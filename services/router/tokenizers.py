"""The deployed models' tokenizers: loaded from their folders, kept, and run in threads."""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc
import jinja2
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from services.common.telemetry import logger
from services.router.errors import RequestError, invalid
from services.router.token_bytes import token_bytes
from services.router.validation import Conversation, Input, Message, check_token_ids
from warmserve.v1 import cluster_pb2, inference_pb2

_log = logger(__name__)
_THREADS = 2


class TokenizerError(Exception):
    """A model's tokenizer cannot be used; says why."""


class ModelTokenizer:
    """One model's tokenizer. Its methods may be called from any thread."""

    def __init__(self, source: str) -> None:
        """Loads it from a checkpoint's folder. Raises TokenizerError."""
        if not os.path.isfile(os.path.join(source, "tokenizer.json")):
            raise TokenizerError(f"there is no tokenizer.json in {source}")
        try:
            loaded: Any = AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            raise TokenizerError(f"the tokenizer in {source} cannot be loaded: {error}") from error
        if not getattr(loaded, "is_fast", False):
            raise TokenizerError(f"the tokenizer in {source} is not one of the `tokenizers` library")
        self._template_owner = loaded
        # Used directly: the wrapper sets truncation and padding at each call, which threads must not do together.
        self.backend: Tokenizer = loaded.backend_tokenizer
        self.backend.no_truncation()
        self.backend.no_padding()
        self._bytes = token_bytes(self.backend)
        self.vocabulary = 1 + max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1)

    def with_bytes(self, logprob: inference_pb2.TokenLogprob) -> inference_pb2.TokenLogprob:
        """The same with the bytes of each token."""
        made = inference_pb2.TokenLogprob()
        made.CopyFrom(logprob)
        made.token = self._bytes(made.token_id)
        for item in made.top:
            item.token = self._bytes(item.token_id)
        return made

    def encode(self, given: Input, name: str) -> list[int]:
        """Token ids of an input that the caller knows as `name`. Raises RequestError."""
        if isinstance(given, Conversation):
            return list(self.backend.encode(self._render(given.messages, name), add_special_tokens=False).ids)
        if isinstance(given, str):
            return list(self.backend.encode(given).ids)
        check_token_ids(given, self.vocabulary, name)
        return given

    def _render(self, messages: list[Message], name: str) -> str:
        if not self._template_owner.chat_template:
            raise invalid(name, "the model has no chat template; send plain text instead")
        try:
            text = self._template_owner.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise invalid(name, f"the model's chat template does not take these messages: {error}") from error
        return str(text)


@dataclass(frozen=True)
class _Kept:
    deployed_unix_ms: int
    loading: asyncio.Task[ModelTokenizer]


class TokenizerCache:
    """Loads each deployed model's tokenizer once."""

    def __init__(self) -> None:
        self._kept: dict[str, _Kept] = {}
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="tokenizer")
        self._loaders = ThreadPoolExecutor(1, thread_name_prefix="load-tokenizer")  # prompts do not wait for loads

    def load(self, spec: cluster_pb2.ModelSpec) -> asyncio.Task[ModelTokenizer]:
        """Begins to load, or finds what is loaded. A load that failed is tried again."""
        kept = self._kept.get(spec.name)
        if kept is None or kept.deployed_unix_ms != spec.deployed_unix_ms or _failed(kept.loading):
            kept = _Kept(spec.deployed_unix_ms, asyncio.create_task(self._load(spec.name, spec.source)))
            kept.loading.add_done_callback(_failed)  # looks at the error, so that asyncio does not complain of it
            self._kept[spec.name] = kept
        return kept.loading

    async def _load(self, model: str, source: str) -> ModelTokenizer:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._loaders, ModelTokenizer, source)
        except TokenizerError as error:
            _log.error("tokenizer cannot be used", model=model, error=str(error))
            raise

    async def get(self, spec: cluster_pb2.ModelSpec) -> ModelTokenizer:
        """The model's tokenizer. Raises RequestError (INTERNAL) where it cannot be loaded."""
        try:
            return await asyncio.shield(self.load(spec))
        except TokenizerError as error:
            message = f"model {spec.name!r} cannot be served here: {error}"
            raise RequestError(grpc.StatusCode.INTERNAL, message) from error

    async def encode(self, tokenizer: ModelTokenizer, given: Input, name: str) -> list[int]:
        """ModelTokenizer.encode in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, tokenizer.encode, given, name)

    def forget(self, model: str) -> None:
        """Drops the tokenizer of a model that is gone."""
        self._kept.pop(model, None)

    def close(self) -> None:
        """Ends the threads."""
        for threads in (self._threads, self._loaders):
            threads.shutdown(wait=False, cancel_futures=True)


def _failed(task: asyncio.Task[ModelTokenizer]) -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None)
