"""`python -m data verify, hash, check, index` on sets of several record files, with indexes or without."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.__main__ import main
from data.checking import checksums
from data.rec.index import Index, read_index, write_index
from data.rec.recordio import MAGIC_BYTES, RecordReader
from data.rec.records import RecordSet
from tests.image_cases import jpeg
from tests.record_files import Record, image_record, write_set

NAMES = ["train_1.rec", "train_2.rec", "train_10.rec"]
LABELS = {"train_1": [0, 2, 2, 2], "train_2": [1, 1], "train_10": [0, 3, 3]}


def _records(name: str, labels: Sequence[float], images: dict[int, bytes], kind: str) -> list[Record]:
    """kind: "sequential", or where key 0 stands: "first" or "last" of the identity headers."""
    numbers = [10 * list(LABELS).index(name) + n for n in range(len(labels))]
    records = [
        image_record(key, [label], images.get(n, jpeg(number)))
        for n, (key, label, number) in enumerate(
            zip(range(kind != "sequential", len(labels) + 1), labels, numbers, strict=False)
        )
    ]
    if kind == "sequential":
        return records
    start = len(labels) + 1
    ends = np.flatnonzero(np.diff([*LABELS[name], -1])) + 2
    ranges = list(zip([1, *ends[:-1].tolist()], ends.tolist(), strict=True))
    headers = [image_record(start + n, pair, b"") for n, pair in enumerate(ranges)]
    key_0 = image_record(0, [start, start + len(ranges)], b"")
    return [*records, key_0, *headers] if kind == "first" else [*records, *headers, key_0]


def _write(
    folder: Path,
    *,
    kind: str = "sequential",
    labels: dict[str, list[float]] | None = None,
    images: dict[str, dict[int, bytes]] | None = None,
) -> Path:
    """Nine images of four classes in three files; `labels` and `images` of some files are others."""
    for name, whole in LABELS.items():
        records = _records(name, (labels or {}).get(name, whole), (images or {}).get(name, {}), kind)
        write_set(folder, records, classes=4)
        for suffix in ("rec", "idx"):
            (folder / f"train.{suffix}").rename(folder / f"{name}.{suffix}")
    return folder


def _verify(folder: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, Any]:
    capsys.readouterr()
    code = main(["verify", str(folder), "--json", *more])
    return code, json.loads(capsys.readouterr().out)


def _offsets(folder: Path, name: str) -> list[int]:
    offsets: list[int] = read_index(folder / f"{name}.idx", RecordReader(folder / f"{name}.rec")).offsets.tolist()
    return offsets


@pytest.mark.parametrize("kind", ["sequential", "first", "last"])
def test_nothing_is_wrong_with_several_files_indexed_or_not(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = _write(tmp_path, kind=kind)
    code, found = _verify(folder, capsys)
    assert (code, found["ok"], found["findings"]) == (0, True, [])
    assert (found["images"], found["labels"]) == (9, 4)
    assert found["identity_headers"] == (0 if kind == "sequential" else 5 + 3)
    assert (found["record_files"], found["without_index"]) == (NAMES, [])
    assert found["bytes"] == sum(path.stat().st_size for path in folder.glob("*.rec"))
    assert main(["verify", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "in 3 record files\n" in said
    for name in ("train_2", "train_10"):
        (folder / f"{name}.idx").unlink()
    code, found = _verify(folder, capsys)
    assert (code, found["findings"], found["without_index"]) == (0, [], NAMES[1:])
    assert main(["verify", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "without an index, so opening it is a scan: train_2.rec and 1 more\n" in said
    assert "nothing is wrong" in said


def test_findings_name_their_file_in_the_order_of_the_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _write(tmp_path, labels={"train_2": [1, 9]}, images={"train_1": {1: b"no"}, "train_10": {2: b"no"}})
    offsets = {name: _offsets(folder, name) for name in LABELS}
    with (folder / "train_10.rec").open("ab") as file:
        file.write(bytes(8))
    with (folder / "train_2.rec").open("ab") as file:
        file.write(bytes(12))
    path = folder / "train_10.idx"
    write_index(path, Index(np.arange(3), np.array([*offsets["train_10"][:2], offsets["train_10"][1] + 4])))
    code, found = _verify(folder, capsys)
    assert code == 1
    told = [(each["kind"], each["file"], each["offset"]) for each in found["findings"]]
    assert told == [
        ("structure", "train_2.rec", (folder / "train_2.rec").stat().st_size - 12),
        ("structure", "train_10.rec", (folder / "train_10.rec").stat().st_size - 8),
        ("index", "train_10.idx", offsets["train_10"][1] + 4),
        ("index", "train_10.rec", offsets["train_10"][2]),
        ("header", "train_2.rec", offsets["train_2"][1]),
        ("image", "train_1.rec", offsets["train_1"][1]),
        ("image", "train_10.rec", offsets["train_10"][2]),
    ]
    assert main(["verify", str(folder)]) == 1
    line = f"image: train_1.rec, byte {offsets['train_1'][1]}, key 1, label 2: expected JPEG or PNG"
    assert line in capsys.readouterr().out
    path.write_text("no index\n")
    _, found = _verify(folder, capsys)
    (finding,) = (each for each in found["findings"] if each["kind"] == "index")
    assert finding["file"] == "train_10.idx"
    assert finding["what"].startswith("expected lines")


@pytest.mark.parametrize("indexed", [False, True])
def test_identity_headers_are_held_against_the_labels_of_each_file(
    indexed: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where another file is damaged."""
    folder = _write(tmp_path, kind="last", labels={"train_1": [0, 2, 1, 2]})
    offsets = _offsets(folder, "train_1")
    if not indexed:
        for path in folder.glob("*.idx"):
            path.unlink()
    os.truncate(folder / "train_10.rec", (folder / "train_10.rec").stat().st_size - 4)
    code, found = _verify(folder, capsys)
    assert (code, found["counts"]["structure"], found["counts"]["identity"]) == (1, 1, 1)
    finding = found["findings"][-1]
    assert (finding["kind"], finding["file"], finding["offset"]) == ("identity", "train_1.rec", offsets[2])
    assert (finding["label"], finding["what"]) == (1, "its identity header's other images have label 2")


def test_a_cut_between_records_shows_without_an_index_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _write(tmp_path, kind="last")
    last = _offsets(folder, "train_2")[-1]
    (folder / "train_2.idx").unlink()
    os.truncate(folder / "train_2.rec", last)
    code, found = _verify(folder, capsys)
    (finding,) = found["findings"]
    assert (code, finding["kind"], finding["file"]) == (1, "identity", "train_2.rec")
    assert "expected the record of key 0 with the range 3, 3" in finding["what"]
    assert "the file was cut" in finding["what"]


@pytest.mark.parametrize("kind", ["sequential", "last"])
def test_classes_are_counted_over_all_files(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _write(tmp_path, kind=kind)
    (folder / "property").write_text("5,112,112\n")
    code, found = _verify(folder, capsys)
    (finding,) = found["findings"]
    assert (code, finding["kind"], finding["file"]) == (1, "identity", "property")
    assert "found 5 against 4 classes, by the highest label" in finding["what"]
    (folder / "property").write_text("3,112,112\n")
    code, found = _verify(folder, capsys)
    assert (code, [each["file"] for each in found["findings"]]) == (1, ["train_10.rec"] * 2)
    assert "expected a class from 0 to 2, as property says" in found["findings"][0]["what"]


def test_an_index_without_its_file_tells_that_one_is_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _write(tmp_path)
    (folder / "train_2.rec").unlink()
    (folder / "other.idx").touch()  # of no set of this name
    code, found = _verify(folder, capsys)
    told = [(each["kind"], each["file"]) for each in found["findings"]]
    assert (code, told) == (1, [("index", "train_2.idx")])
    assert "expected train_2.rec beside it, found none" in found["findings"][0]["what"]


@pytest.mark.parametrize("indexed", [False, True])
def test_an_empty_file_among_others(indexed: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _write(tmp_path)
    (folder / "train_2.rec").write_bytes(b"")
    if not indexed:
        (folder / "train_2.idx").unlink()
    code, found = _verify(folder, capsys)
    (finding,) = found["findings"]
    told = (code, finding["kind"], finding["file"])
    assert told == ((1, "index", "train_2.idx") if indexed else (1, "identity", "train_2.rec"))
    assert found["images"] == 7


def test_fix_makes_one_set_of_all_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _write(tmp_path / "a", kind="first", images={"train_1": {1: b"no"}})
    (folder / "train_1.idx").unlink()
    os.truncate(folder / "train_10.rec", _offsets(folder, "train_10")[2] + 40)
    out = tmp_path / "b"
    code, found = _verify(folder, capsys, "--fix", str(out))
    assert (code, found["images"]) == (1, 8)
    names = ["findings.json", "property", "train.idx", "train.rec"]
    assert sorted(path.name for path in out.iterdir()) == names
    fixed = RecordSet.open(out)
    assert (fixed.layout, fixed.labels.tolist()) == ("insightface", [0, 0, 1, 1, 2, 2, 3])
    images = [bytes(fixed.image(sample)[1]) for sample in range(7)]
    assert images == [jpeg(number) for number in (0, 20, 10, 11, 2, 3, 21)]
    assert json.loads((out / "findings.json").read_text()) == found
    assert _verify(out, capsys)[0] == 0


# ---- hash, check ---------------------------------------------------------------------------------------------------


def test_hashes_are_of_all_files_of_the_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checksums, "BLOCK", 1024)
    folder = _write(tmp_path)
    for name in ("other.rec", "other.idx", "train.lst"):
        (folder / name).write_text("of no set")
    (folder / "train_2.idx").unlink()
    assert main(["hash", str(folder)]) == 0
    named = sorted(json.loads((folder / "hashes.json").read_text())["files"])
    assert named == sorted([*NAMES, "train_1.idx", "train_10.idx", "property"])
    assert main(["check", str(folder)]) == 0
    assert _verify(folder, capsys)[0] == 0
    changed = {"train_1.idx": 0, "train_2.rec": 1030, "train_10.rec": 5}
    for name, place in changed.items():
        content = bytearray((folder / name).read_bytes())
        content[place] ^= 1
        (folder / name).write_bytes(content)
    capsys.readouterr()
    assert main(["check", str(folder), "--json"]) == 1
    faults = json.loads(capsys.readouterr().out)["faults"]
    places = {name: place // 1024 * 1024 for name, place in changed.items()}
    assert {fault["file"]: fault["begin"] for fault in faults} == places
    code, found = _verify(folder, capsys)
    assert code == 1
    assert {each["file"]: each["offset"] for each in found["findings"] if each["kind"] == "hash"} == places


def test_a_record_file_without_a_hash_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _write(tmp_path)
    kept = (folder / "train_2.rec").read_bytes()
    (folder / "train_2.rec").unlink()
    assert main(["hash", str(folder)]) == 0
    (folder / "train_2.rec").write_bytes(kept)
    capsys.readouterr()
    assert main(["check", str(folder)]) == 1
    said = capsys.readouterr().out
    expected = "expected its hash in hashes.json, found none: write it anew with `python -m data hash"
    assert f"train_2.rec: {expected}" in said
    code, found = _verify(folder, capsys)
    (finding,) = found["findings"]
    assert (code, finding["kind"], finding["file"]) == (1, "hash", "train_2.rec")
    (folder / "train_1.rec").unlink()
    capsys.readouterr()
    assert main(["check", str(folder)]) == 1
    assert "train_1.rec: missing" in capsys.readouterr().out


# ---- index ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sequential", "first", "last"])
def test_the_index_of_any_file_is_rebuilt(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _write(tmp_path, kind=kind)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name, labels in LABELS.items():
        (folder / f"{name}.idx").unlink()
        assert main(["index", str(folder / f"{name}.rec")]) == 0
        headers = 0 if kind == "sequential" else len(set(labels))
        told = f"{folder / name}.idx: {len(labels)} images"
        assert capsys.readouterr().out.startswith(f"{told}, {headers} identity headers" if headers else told)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    with (folder / "train_2.rec").open("ab") as file:
        file.write(MAGIC_BYTES)
    assert main(["index", str(folder / "train_2.rec")]) == 2
    assert "train_2.rec: byte" in capsys.readouterr().err
    assert main(["index", "--images-only", str(folder / "train_2.rec")]) == 0
    assert RecordSet.open(folder).labels.tolist() == list(chain(*LABELS.values()))
