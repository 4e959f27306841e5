"""A rank's part of a checkpoint: a safetensors file, with the offsets by which torch.distributed.checkpoint reads it.

safetensors: 8 bytes with the length of a JSON header, the header, then the tensors' bytes without gaps. It holds
numbers alone, no code, unlike torch.distributed.checkpoint's own format, whose metadata is a pickle; that module's
`HuggingFaceStorageReader` reads ours.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import torch
from torch import Tensor

from sharding import Rows
from training.checkpoint.manifest import BLOCK, DTYPE_NAMES
from training.checkpoint.places import Place

_SHARDING = "DCP_SHARDING_INFO"
_VERSION = "DCP_VERSION"


def write(
    place: Place, name: str, rows: Mapping[str, Rows | Tensor], each: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Write a part. name: with its folder. rows: by name, contiguous and on the CPU; a plain tensor is a whole one.
    each: called after every block.

    Returns its description for the manifest, plain values. Raises OSError.
    """
    # Large items first, so that all are aligned.
    order = sorted(rows, key=lambda key: (-_tensor(rows[key]).dtype.itemsize, key))
    header: dict[str, Any] = {}
    tensors: dict[str, list[Any]] = {}
    sharding: dict[str, Any] = {}
    position = 0
    for key in order:
        item = rows[key]
        tensor, start = _tensor(item), item.start if isinstance(item, Rows) else 0
        dtype = DTYPE_NAMES[tensor.dtype]
        header[key] = {
            "dtype": dtype, "shape": list(tensor.shape), "data_offsets": [position, position + tensor.nbytes]
        }  # fmt: skip
        offsets = [start, *([0] * (tensor.dim() - 1))] if tensor.dim() else []
        sharding[key] = {"saved_offsets": offsets}
        tensors[key] = [dtype, list(item.shape), position, start, len(tensor) if tensor.dim() else 1]
        position += tensor.nbytes
    header["__metadata__"] = {"format": "pt", _VERSION: "1.0", _SHARDING: json.dumps(sharding)}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    head = struct.pack("<Q", len(head)) + head
    for told in tensors.values():
        told[2] += len(head)
    with place.create(name) as file:
        hashed = _Hashed(file, each)
        hashed.write(memoryview(head))
        for key in order:
            if (tensor := _tensor(rows[key])).numel():
                hashed.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        blocks = hashed.end()
    file_name = name.rpartition("/")[2]
    return {"file": file_name, "size": len(head) + position, "blocks": blocks, "tensors": tensors}


def _tensor(item: Rows | Tensor) -> Tensor:
    return item.tensor if isinstance(item, Rows) else item


class _Hashed:
    """Writes to a file, and hashes each block of it."""

    def __init__(self, file: BinaryIO, each: Callable[[], None]) -> None:
        self._file, self._each, self._blocks = file, each, list[str]()
        self._hash, self._room = hashlib.sha256(), BLOCK

    def write(self, data: memoryview) -> None:
        while len(data):
            some = data[: self._room]
            self._hash.update(some)
            left = some
            while len(left):  # a raw file may take less than it is given
                left = left[self._file.write(left) :]
            self._room -= len(some)
            data = data[len(some) :]
            if self._room == 0:
                self._next()

    def _next(self) -> None:
        self._blocks.append(self._hash.hexdigest())
        self._each()
        self._hash, self._room = hashlib.sha256(), BLOCK

    def end(self) -> list[str]:
        """Of all blocks."""
        if self._room < BLOCK:
            self._next()
        return self._blocks
