"""The bytes of single tokens, which may be parts of characters; text alone cannot show those."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def token_bytes(tokenizer: Tokenizer) -> Callable[[int], bytes]:
    """A function that gives a token's bytes; a token that the tokenizer does not have has none.

    How a token's name becomes bytes is the tokenizer's own decoder's matter: byte-level tokenizers write each byte as
    a character, sentencepiece's write spaces as U+2581 and single bytes as <0x0A>.
    """
    kinds = _kinds(json.loads(tokenizer.decoder.__getstate__()) if tokenizer.decoder is not None else {})
    added = {number: token.content for number, token in tokenizer.get_added_tokens_decoder().items()}

    def of(token: int) -> bytes:
        if token in added:
            return added[token].encode()
        name = tokenizer.id_to_token(token)
        if name is None:
            return b""
        if "ByteLevel" in kinds and all(character in _BYTE_OF for character in name):
            return bytes(_BYTE_OF[character] for character in name)
        if "ByteFallback" in kinds and (byte := _BYTE_TOKEN.fullmatch(name)):
            return bytes([int(byte[1], 16)])
        if "Metaspace" in kinds or "Replace" in kinds:
            return name.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()
        return tokenizer.decode([token], skip_special_tokens=False).encode()

    return of


def _kinds(decoder: dict[str, Any]) -> set[str]:
    found = {str(decoder.get("type"))}
    for part in decoder.get("decoders", ()):
        found |= _kinds(part)
    return found


def _byte_characters() -> dict[str, int]:
    """The byte that each character of a byte-level tokenizer stands for: printable Latin-1 characters for themselves,
    the other bytes, in order, for the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_characters()
