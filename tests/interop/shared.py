"""What the checks of both directions use: our commands, mxnet's side, and one file read by both."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data.rec.header import unpack
from data.rec.index import read_index
from data.rec.recordio import HEAD, LENGTH_BITS, RecordReader
from data.rec.records import RecordSet
from tests.mxnet_cases import sha256

ROOT = Path(__file__).parents[2]
Mxnet = Callable[..., str]
"""Runs a script of ours with mxnet's Python and gives what it prints."""
_SIDE = "tests/interop/mxnet_side.py"


def run_data(*arguments: object) -> None:
    """`python -m data …`"""
    command = [sys.executable, "-m", "data", *map(str, arguments)]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def ask(mxnet: Mxnet, *arguments: object) -> Any:
    """The JSON that a command of mxnet_side.py prints."""
    return json.loads(mxnet(_SIDE, *map(str, arguments)))


def parts(reader: RecordReader) -> int:
    """Number of records in more than one part."""
    return sum(HEAD.unpack_from(reader.view, offset)[1] >> LENGTH_BITS != 0 for offset, _ in reader.scan())


def _dump(reader: RecordReader, idx: Path, kind: str) -> dict[str, Any]:
    """What `mxnet_side.py dump` prints, by our reader."""
    rows = {}
    for key, offset in zip(*(column.tolist() for column in read_index(idx, reader)), strict=True):
        payload = reader.read_at(offset)
        rows[str(key)] = row = {"payload": sha256(payload)}
        if kind == "images":
            header, image = unpack(payload)
            row.update(header._asdict() | {"labels": list(header.labels), "image": sha256(image)})
    return {"by_key": rows, "in_order": [sha256(reader.read_at(offset)) for offset, _ in reader.scan()]}


def same_to_both(rec: Path, kind: str, mxnet: Mxnet) -> str:
    """Keys, headers, labels, images and order of a file are the same to mxnet and to us. kind: "images" or "raw"."""
    reader, idx = RecordReader(rec), rec.with_suffix(".idx")
    ours = _dump(reader, idx, kind)
    theirs = ask(mxnet, "dump", rec, idx, kind)
    version = theirs.pop("mxnet")
    assert theirs["in_order"] == ours["in_order"]
    for key, row in ours["by_key"].items():
        assert theirs["by_key"][key] == row, f"key {key}: mxnet {theirs['by_key'][key]}, ours {row}"
    assert theirs.keys() == ours.keys()
    assert len(theirs["by_key"]) == len(ours["by_key"])
    return f"mxnet {version} reads {len(ours['in_order'])} records alike, {parts(reader)} of them in parts"


def samples(records: RecordSet) -> list[tuple[int, str]]:
    """(label, hash of the image) of every sample."""
    found = (records.image(sample) for sample in range(records.num_samples))
    return [(label, sha256(image)) for label, image in found]
