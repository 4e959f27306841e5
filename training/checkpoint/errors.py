"""What is wrong with a checkpoint."""

from __future__ import annotations


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read, or belongs to another kind of run; the message says what to do."""


class DamagedError(CheckpointError):
    """A checkpoint is not what was written: a part is missing, cut or changed. An older one may be whole."""
