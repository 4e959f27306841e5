"""The benchmark of the index measures what it says, on an index that is one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import index
from data.rec.index import read_index
from data.rec.recordio import MAX_LENGTH


def test_the_index_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "_PIECE", 100)
    path = tmp_path / "train.idx"
    size = index.write_index(path, 250, seed=0)
    found = read_index(path, index._Size(path, size))
    assert found.keys.tolist() == [*range(1, 250), 0]
    sizes = np.diff(found.offsets, append=size)
    assert found.offsets[0] == 0
    assert 4000 <= sizes.min() <= sizes.max() < 14000 < MAX_LENGTH
    assert len(set(sizes.tolist())) > 200


def test_every_way_reads_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "index.md"
    assert index.main(["--lines", "3000", "--repeats", "2", "--out", str(out)]) == 0
    assert index.OURS in capsys.readouterr().out
    rows = json.loads(out.with_suffix(".json").read_text())["rows"]
    assert [row["way"] for row in rows] == list(index.WAYS)
    assert all(len(row["seconds"]) == 2 and min(row["seconds"]) > 0 for row in rows)
    path = tmp_path / "train.idx"
    size = index.write_index(path, 500, seed=1)
    assert {read(path, size) for read in index.WAYS.values()} == {500}
