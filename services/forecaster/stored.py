"""Predictors as files: with what is known of them and a checksum, replaced as a whole or not at all."""

from __future__ import annotations

import hashlib
import os
import struct
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.message import DecodeError

from services.forecaster.learned import LearnedPredictor, dumps, loads
from services.forecaster.predictors import Predictor, PublishedPredictor
from warmserve.v1 import forecast_pb2

_MAGIC = b"WarmServe predictor 1\n"
_LENGTH = struct.Struct("<I")
PUBLISHED = PublishedPredictor.name


@dataclass(frozen=True)
class Stored:
    """A predictor, and what is known of it."""

    predictor: Predictor
    info: forecast_pb2.PredictorInfo


def published(season: int) -> Stored:
    """The predictor that needs no fitting."""
    return Stored(PublishedPredictor(season), forecast_pb2.PredictorInfo(name=PUBLISHED, relative_loss=1))


def to_bytes(predictor: Predictor, info: forecast_pb2.PredictorInfo) -> bytes:
    """A predictor as the contents of a file."""
    about = info.SerializeToString()
    body = dumps(predictor) if isinstance(predictor, LearnedPredictor) else b""
    rest = _LENGTH.pack(len(about)) + about + body
    return _MAGIC + hashlib.sha256(rest).digest() + rest


def from_bytes(data: bytes, season: int) -> Stored:
    """What `to_bytes` made. ValueError, saying why, where it is broken or was learned for another season."""
    start = len(_MAGIC) + hashlib.sha256().digest_size
    if not data.startswith(_MAGIC):
        raise ValueError("it is not a predictor of this version")
    rest = data[start:]
    if hashlib.sha256(rest).digest() != data[len(_MAGIC) : start]:
        raise ValueError("it is damaged: its checksum does not fit")
    (length,) = _LENGTH.unpack_from(rest)
    try:
        info = forecast_pb2.PredictorInfo.FromString(rest[_LENGTH.size : _LENGTH.size + length])
    except DecodeError as error:
        raise ValueError(f"what it says of itself cannot be read: {error}") from error
    if info.name == PUBLISHED:
        return Stored(PublishedPredictor(season), info)
    return Stored(loads(rest[_LENGTH.size + length :], season), info)


def write(path: Path, data: bytes) -> None:
    """Replaces a file as a whole, so that after a crash there is the old or the new one. OSError where it cannot."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        with beside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
