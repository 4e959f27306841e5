"""Weights and class centres in files of their own, each whole or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.files import appearing
from evaluation.embed.records import EmbedError, read_weights
from training.checkpoint import CheckpointError


def read_state(path: Path, *, lazily: bool = False) -> Any:
    """What torch.save wrote, as `evaluation.embed.records.read_weights` reads it. Raises CheckpointError."""
    try:
        return read_weights(path, lazily=lazily)
    except EmbedError as error:
        raise CheckpointError(str(error)) from None


def write_weights(tensors: Mapping[str, Tensor], out: Path) -> None:
    """A state dict, as backbone.pt. Raises DataError."""
    with appearing([out]) as (partial,), partial.open("wb") as file:  # a path would hide why it cannot be written
        torch.save(dict(tensors), file)


def write_rows(parts: Iterable[Tensor], shape: tuple[int, int], out: Path) -> None:
    """A .npy of `shape` in float32, of its rows part by part. Raises DataError, and what `parts` raises."""
    with appearing([out]) as (partial,), partial.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        for rows in parts:
            file.write(rows.float().numpy().tobytes())
