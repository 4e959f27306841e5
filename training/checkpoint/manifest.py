"""What a checkpoint consists of: `manifest.json`, which names every part and holds the hash of every block of it.

A checkpoint counts once its manifest is there, and the manifest is written last. Its own hash stands in it, so that a
changed one is no manifest. Hashes tell damage; they do not tell a forger.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Any

import torch

from training.checkpoint.errors import DamagedError

NAME = "manifest.json"
FORMAT = 1
BLOCK = 4 << 20
"""Bytes of a part that one hash is of."""
MOST_BYTES = 1 << 30
"""Of a manifest."""

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
"""By their names in safetensors files."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of a tensor, as they lie in a part."""

    file: str
    offset: int
    """Of the first byte in the file."""
    start: int
    """First row."""
    rows: int


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of the whole run, whatever ranks hold it."""

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    """By row; of a scalar one, of one row."""

    @property
    def row_bytes(self) -> int:
        """Bytes of a row; of a scalar, of all."""
        return math.prod(self.shape[1:]) * DTYPES[self.dtype].itemsize

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1


@dataclass(frozen=True, slots=True)
class Part:
    """A file: its bytes, and SHA-256 of each `BLOCK` of them."""

    size: int
    blocks: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """All of a checkpoint but the tensors' numbers."""

    step: int
    """Finished optimizer steps."""
    saved: float
    """When, in seconds since 1970."""
    world_size: int
    run: str
    """Of the training, from its first step on; the same after it has gone on."""
    score: float | None
    """Of the evaluation after this step, if there was one: higher is better."""
    evaluated: bool
    """Whether what was to be evaluated after this step has been."""
    values: dict[str, Any]
    """What is no tensor."""
    tensors: dict[str, Entry]
    parts: dict[str, Part]

    def to_bytes(self) -> bytes:
        content = {"format": FORMAT, **asdict(self)}
        return json.dumps({"sha256": _hash(content), "content": content}).encode() + b"\n"


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What a save is told, rank 0's; as `Manifest` has it."""

    step: int
    run: str
    values: dict[str, Any]
    score: float | None = None
    evaluated: bool = False


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def parse(where: str, data: bytes) -> Manifest:
    """Reads a manifest. where: for messages. Raises DamagedError unless it is whole, and nothing in it contradicts."""
    if len(data) > MOST_BYTES:
        raise DamagedError(f"{where}: no manifest of a checkpoint: more than {MOST_BYTES} bytes")
    try:
        told = json.loads(data)
        content = told["content"]
        if told["sha256"] != _hash(content):
            raise ValueError("its own hash does not agree")
        if content["format"] != FORMAT:
            raise ValueError(f"of format {content['format']!r}, this program reads {FORMAT}")
        found = _manifest(content)
        _check(found)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{where}: damaged or no manifest of a checkpoint ({_words(error)})") from None
    return found


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"


def _manifest(content: dict[str, Any]) -> Manifest:
    tensors = {
        str(name): Entry(
            _is(str, entry["dtype"]),
            tuple(_count(size) for size in entry["shape"]),
            tuple(
                Piece(_is(str, p["file"]), _count(p["offset"]), _count(p["start"]), _count(p["rows"]))
                for p in entry["pieces"]
            ),
        )
        for name, entry in content["tensors"].items()
    }
    parts = {
        str(name): Part(_count(part["size"]), tuple(_is(str, block) for block in part["blocks"]))
        for name, part in content["parts"].items()
    }
    score = content["score"]
    return Manifest(
        step=_count(content["step"]),
        saved=float(content["saved"]),
        world_size=_count(content["world_size"]),
        run=_is(str, content["run"]),
        score=None if score is None else float(score),
        evaluated=_is(bool, content["evaluated"]),
        values=_is(dict, content["values"]),
        tensors=tensors,
        parts=parts,
    )


def _is(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"expected {kind.__name__}, got {type(value).__name__}")
    return value


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"expected a whole number of 0 or more, got {value!r}")
    return value


def _check(manifest: Manifest) -> None:
    """Names lead nowhere else, pieces lie in their parts and cover their tensors, every block has a hash."""
    for name, part in manifest.parts.items():
        if PurePosixPath(name).name != name or name in ("", ".", "..", NAME):
            raise ValueError(f"{name!r} is no plain file name")
        if len(part.blocks) != -(-part.size // BLOCK):
            raise ValueError(f"{name}: {len(part.blocks)} hashes for {part.size} bytes")
    for name, entry in manifest.tensors.items():
        if entry.dtype not in DTYPES:
            raise ValueError(f"{name}: unknown dtype {entry.dtype!r}")
        row = 0
        for piece in entry.pieces:
            if piece.start != row:
                raise ValueError(f"{name}: rows {row} to {piece.start} are missing or there twice")
            if piece.offset + piece.rows * entry.row_bytes > manifest.parts[piece.file].size:
                raise ValueError(f"{name}: reaches beyond the end of {piece.file}")
            row += piece.rows
        if row != entry.rows:
            raise ValueError(f"{name}: {row} of {entry.rows} rows")


def assembled(descriptions: list[dict[str, Any]], facts: Facts) -> Manifest:
    """The manifest of what all ranks have written. descriptions: of `training.checkpoint.part.write`, by rank."""
    parts: dict[str, Part] = {}
    pieces: dict[str, list[Piece]] = {}
    kinds: dict[str, tuple[str, tuple[int, ...]]] = {}
    for told in descriptions:
        parts[told["file"]] = Part(told["size"], tuple(told["blocks"]))
        for name, (dtype, shape, offset, start, rows) in told["tensors"].items():
            kinds[name] = (dtype, tuple(shape))
            pieces.setdefault(name, []).append(Piece(told["file"], offset, start, rows))
    found = Manifest(
        saved=time.time(),
        world_size=len(descriptions),
        tensors={
            name: Entry(*kinds[name], tuple(sorted(pieces[name], key=lambda piece: (piece.start, piece.rows))))
            for name in kinds
        },
        parts=parts,
        **asdict(facts),
    )
    _check(found)
    return found
