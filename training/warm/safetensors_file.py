"""Tensors of a .safetensors file, mapped and not read: a header of JSON behind 8 bytes with its length, and numbers."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.errors import said
from training.checkpoint import CheckpointError
from training.checkpoint.manifest import DTYPES

_MOST_BYTES = 1 << 24
"""Of a header."""
_OTHER = "__metadata__"


def read_tensors(path: Path) -> dict[str, Tensor]:
    """By name, on the CPU, not to be written to. Raises CheckpointError, one line, unless the file is whole."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
            header = file.read(length) if 8 + length <= size and length <= _MOST_BYTES else b""
        told = json.loads(header)
        content = np.memmap(path, np.uint8, "c", offset=8 + length) if size > 8 + length else np.empty(0, np.uint8)
        return {name: _tensor(content, entry) for name, entry in told.items() if name != _OTHER}
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read it ({error.strerror or error}): expected tensors") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged, or not a file of safetensors ({said(error):.160})") from None


def _tensor(content: np.ndarray[Any, Any], entry: dict[str, Any]) -> Tensor:
    """Raises KeyError, TypeError, ValueError for what is none."""
    dtype, shape, (begin, end) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
    sizes = [*shape, begin, end]
    if not all(isinstance(size, int) and size >= 0 for size in sizes) or end > len(content):
        raise ValueError(f"{sizes} are no sizes within {len(content)} bytes")
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{end - begin} bytes for {shape} of {entry['dtype']}")
    return torch.from_numpy(content[begin:end]).view(dtype).view(shape)
