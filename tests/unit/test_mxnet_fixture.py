"""Files that genuine mxnet wrote (tests/fixtures/mxnet) are read right, and written alike byte for byte."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from data.header import unpack
from data.index import read_index, rebuild, write_index
from data.recordio import HEAD, LENGTH_BITS, RecordReader, RecordWriter
from data.records import RecordSet

FIXTURE = Path(__file__).parents[1] / "fixtures" / "mxnet"
EXPECTED: dict[str, Any] = json.loads((FIXTURE / "expected.json").read_text())
SETS = sorted(EXPECTED["records"])


def _sha256(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("name", SETS)
def test_every_payload(name: str) -> None:
    reader = RecordReader(FIXTURE / name / "train.rec")
    rows = EXPECTED["records"][name]
    assert [offset for offset, _ in reader.scan()] == [row["offset"] for row in rows]
    assert [_sha256(reader.read_at(row["offset"])) for row in rows] == [row["sha256"] for row in rows]
    index = read_index(FIXTURE / name / "train.idx", reader)
    assert index.keys.tolist() == [row["key"] for row in rows]
    assert index.offsets.tolist() == [row["offset"] for row in rows]


@pytest.mark.parametrize("name", SETS)
def test_written_alike(name: str, tmp_path: Path) -> None:
    reader = RecordReader(FIXTURE / name / "train.rec")
    with RecordWriter(tmp_path / "ours.rec") as writer:
        for offset, _ in reader.scan():
            writer.write(bytes(reader.read_at(offset)))
    assert (tmp_path / "ours.rec").read_bytes() == bytes(reader.view)
    if name != "raw":  # an index is rebuilt for records of images
        write_index(tmp_path / "ours.idx", rebuild(reader).index)
        assert (tmp_path / "ours.idx").read_text() == (FIXTURE / name / "train.idx").read_text()


@pytest.mark.parametrize("name", ["insightface", "sequential", "array_labels"])
def test_sets(name: str) -> None:
    records = RecordSet.open(FIXTURE / name)
    assert records.layout == ("insightface" if name == "insightface" else "sequential")
    assert (records.num_samples, records.num_classes, records.image_size) == (12, 4, (112, 112))
    assert records.labels.tolist() == EXPECTED["labels"]
    images = [records.image(sample) for sample in range(12)]
    assert [label for label, _ in images] == EXPECTED["labels"]
    assert [_sha256(image) for _, image in images] == EXPECTED["images"]


def test_the_fixture_has_records_in_parts() -> None:
    for name in SETS:
        view = RecordReader(FIXTURE / name / "train.rec").view
        kinds = {HEAD.unpack_from(view, row["offset"])[1] >> LENGTH_BITS for row in EXPECTED["records"][name]}
        assert kinds == {0, 1}


def test_array_labels() -> None:
    reader = RecordReader(FIXTURE / "array_labels" / "train.rec")
    header, _ = unpack(reader.read_at(EXPECTED["records"]["array_labels"][5]["offset"]))
    assert header == (11, (1.0, *(5 + i / 4 for i in range(10))), 5, 0)
