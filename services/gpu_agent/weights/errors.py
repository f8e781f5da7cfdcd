"""What can be wrong with a checkpoint or an image."""

from __future__ import annotations

from enum import StrEnum


class Problem(StrEnum):
    """The kind of a CheckpointError; each has one gRPC status."""

    NOT_FOUND = "not_found"  # no such folder
    PERMISSION = "permission"  # outside the allowed folders, or not readable
    INVALID = "invalid"  # it cannot be served
    TOO_LARGE = "too_large"  # for the arena, or for the disk


class CheckpointError(Exception):
    """A checkpoint that cannot be served. The message is for the operator: what is wrong and what to do."""

    def __init__(self, kind: Problem, message: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message


class ImageCorrupt(Exception):
    """An image's file is not what was written there. Building it again from the checkpoint mends it."""
