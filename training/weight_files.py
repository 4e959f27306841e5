"""Weights and class centres in files of their own, each whole or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.files import appearing


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
