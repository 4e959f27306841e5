"""`python -m data verify`: finds every kind of damage, with its place, and writes a set without it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.__main__ import main
from data.checking import findings
from data.checking.salvage import Damage, salvage
from data.rec.header import Header, pack
from data.rec.index import Index, read_index, write_index
from data.rec.recordio import MAGIC_BYTES, RecordReader, RecordWriter
from data.rec.records import RecordSet
from tests.image_cases import damaged_images, jpeg
from tests.record_files import Record, image_record, write_set

COUNTS = (3, 0, 4, 1)


def _records(images: dict[int, bytes] | None = None, labels: dict[int, float] | None = None) -> list[Record]:
    """The insightface layout with real images; `images` and `labels` of some keys are others."""
    classes = np.repeat(np.arange(len(COUNTS)), COUNTS).tolist()
    records = [
        image_record(key, [(labels or {}).get(key, label)], (images or {}).get(key, jpeg(key)))
        for key, label in enumerate(classes, start=1)
    ]
    ends = 1 + np.cumsum(COUNTS)
    start = int(ends[-1])
    records += [
        image_record(start + c, [end - n, end], b"") for c, (n, end) in enumerate(zip(COUNTS, ends, strict=True))
    ]
    return [*records, image_record(0, [start, start + len(COUNTS)], b"")]


def _verify(folder: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, Any]:
    code = main(["verify", str(folder), "--json", *more])
    return code, json.loads(capsys.readouterr().out)


def test_nothing_is_wrong_with_a_sound_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for records in (_records(), [image_record(key, [key % 4], jpeg(key)) for key in range(9)]):
        code, found = _verify(write_set(tmp_path, records, classes=4), capsys)
        assert (code, found["ok"], found["findings"]) == (0, True, [])
        assert found["images"] == sum(1 for _, payload in records if len(payload) > 100)
    assert main(["verify", str(tmp_path)]) == 0
    assert "nothing is wrong" in capsys.readouterr().out


@pytest.mark.parametrize("name", damaged_images())
def test_images_that_do_not_decode(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image, reason = damaged_images()[name]
    folder = write_set(tmp_path, _records({5: image}), classes=4)
    code, found = _verify(folder, capsys)
    assert code == 1
    (finding,) = found["findings"]
    offset = int(read_index(folder / "train.idx", RecordReader(folder / "train.rec")).offsets[4])
    assert (finding["offset"], finding["key"], finding["label"]) == (offset, 5, 2)
    assert finding["kind"] == ("image" if image else "header")
    assert (reason if image else "found none") in finding["what"]


@pytest.mark.parametrize(
    ("labels", "kind", "what"),
    [
        ({5: 4.0}, "header", "expected a class from 0 to 3"),
        ({5: 1.5}, "header", "expected a class number"),
        ({5: float("nan")}, "header", "expected a class number"),
        ({5: 3.0}, "identity", "its identity header's other images have label 2"),
    ],
)
def test_labels(
    labels: dict[int, float], kind: str, what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, found = _verify(write_set(tmp_path, _records(labels=labels), classes=4), capsys)
    assert code == 1
    (finding,) = found["findings"]
    assert (finding["kind"], finding["key"]) == (kind, 5)
    assert what in finding["what"]


def test_another_count_of_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = _verify(write_set(tmp_path, _records(), classes=5), capsys)
    assert code == 1
    assert "expected as many classes" in found["findings"][0]["what"]


def test_records_and_index_that_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_set(tmp_path, _records(), classes=4)
    reader = RecordReader(folder / "train.rec")
    index = read_index(folder / "train.idx", reader)
    offsets = index.offsets.copy()
    offsets[2] += 4
    write_index(folder / "train.idx", Index(index.keys, offsets))
    code, found = _verify(folder, capsys)
    assert code == 1
    assert found["counts"] == {"index": 2}
    assert [finding["offset"] for finding in found["findings"]] == [int(index.offsets[2]), int(index.offsets[2]) + 4]
    (folder / "train.idx").unlink()
    (folder / "property").unlink()
    code, found = _verify(folder, capsys)
    assert code == 1
    assert found["counts"] == {"property": 1}
    assert "missing" in found["findings"][0]["what"]
    assert found["without_index"] == ["train.rec"]
    assert found["images"] == 8


def _damaged(folder: Path) -> list[int]:
    """The third record's length is overwritten, and the file is cut in the last image: offsets of the records."""
    write_set(folder, [image_record(key, [key % 4], jpeg(key)) for key in range(9)], classes=4)
    path = folder / "train.rec"
    offsets: list[int] = read_index(folder / "train.idx", RecordReader(path)).offsets.tolist()
    content = bytearray(path.read_bytes())
    content[offsets[2] + 4 : offsets[2] + 8] = b"\xff\xff\xff\x1f"
    path.write_bytes(content[: offsets[8] + 300])
    return offsets


def test_a_scan_goes_on_behind_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    offsets = _damaged(tmp_path)
    found = list(salvage(RecordReader(tmp_path / "train.rec")))
    assert [each for each in found if not isinstance(each, Damage)] == [*offsets[:2], *offsets[3:8]]
    first, last = (each for each in found if isinstance(each, Damage))
    assert (first.offset, first.end) == (offsets[2], offsets[3])
    assert (last.offset, last.end) == (offsets[8], offsets[8] + 300)
    assert "cut" in last.what
    code, said = _verify(tmp_path, capsys)
    assert code == 1
    assert said["counts"]["structure"] == 2
    assert said["images"] == 7


def test_a_magic_within_an_image_is_not_taken_for_a_record(tmp_path: Path) -> None:
    with RecordWriter(tmp_path / "a.rec") as writer:
        tricky = pack(Header(0, (1.0,), 0, 0), b"abcd" + MAGIC_BYTES + b"\0" * 40 + b"x" + MAGIC_BYTES)
        offsets = [writer.write(tricky) for _ in range(3)]
    content = bytearray((tmp_path / "a.rec").read_bytes())
    content[0] ^= 1
    (tmp_path / "a.rec").write_bytes(content)
    damage, *rest = salvage(RecordReader(tmp_path / "a.rec"))
    assert isinstance(damage, Damage)
    assert damage.end == offsets[1]
    assert rest == offsets[1:]
    assert list(salvage(RecordReader(Path("/dev/null")))) == []


@pytest.mark.parametrize("bit", [13, 14, 15])
def test_a_length_that_spans_other_records_loses_one(bit: int, tmp_path: Path) -> None:
    folder = write_set(tmp_path, [image_record(key, [0], jpeg(key)) for key in range(12)], classes=1)
    path = folder / "train.rec"
    offsets: list[int] = read_index(folder / "train.idx", RecordReader(path)).offsets.tolist()
    content = bytearray(path.read_bytes())
    content[offsets[2] + 4 + bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    found = list(salvage(RecordReader(path)))
    assert [each for each in found if not isinstance(each, Damage)] == [*offsets[:2], *offsets[3:]]


def test_a_record_between_damaged_ones_is_kept(tmp_path: Path) -> None:
    folder = write_set(tmp_path, [image_record(key, [0], jpeg(key)) for key in range(6)], classes=1)
    path = folder / "train.rec"
    offsets: list[int] = read_index(folder / "train.idx", RecordReader(path)).offsets.tolist()
    content = bytearray(path.read_bytes())
    content[offsets[2]] ^= 1
    content[offsets[4]] ^= 1
    path.write_bytes(content)
    found = list(salvage(RecordReader(path)))
    assert [each for each in found if not isinstance(each, Damage)] == [*offsets[:2], offsets[3], offsets[5]]


def test_an_empty_record_in_place_of_an_image_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.rec.record_files.SPREAD", 1)
    records = _records()
    records[4] = image_record(5, [1, 2], b"")
    code, found = _verify(write_set(tmp_path, records, classes=4), capsys)
    assert code == 1
    assert "expected images at 8 keys, found 7" in found["findings"][0]["what"]


def test_fix_writes_what_is_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = write_set(tmp_path / "broken", _records({2: b"\xff\xd8 no"}, {5: 9.0}), classes=4)
    (broken / "identities.txt").write_text("a\nb\nc\nd\n")
    before = {path.name: path.read_bytes() for path in broken.iterdir()}
    out = tmp_path / "fixed"
    assert main(["verify", str(broken), "--fix", str(out)]) == 1
    assert {path.name: path.read_bytes() for path in broken.iterdir()} == before
    fixed = RecordSet.open(out)
    assert fixed.layout == "insightface"
    assert fixed.labels.tolist() == [0, 0, 2, 2, 2, 3]
    assert [bytes(fixed.image(n)[1]) for n in range(6)] == [jpeg(key) for key in (1, 3, 4, 6, 7, 8)]
    assert (out / "identities.txt").read_text() == "a\nb\nc\nd\n"
    listed = json.loads((out / "findings.json").read_text())["findings"]
    assert [finding["key"] for finding in listed] == [5, 2]
    capsys.readouterr()
    assert _verify(out, capsys)[0] == 0
    assert main(["verify", str(broken), "--fix", str(broken)]) == 2
    assert "expected another folder" in capsys.readouterr().err
    assert main(["verify", str(broken), "--fix", str(out)]) == 2
    assert "--force" in capsys.readouterr().err
    offsets = _damaged(tmp_path / "cut")
    (out / "labels.csv").write_text("")
    assert main(["verify", str(tmp_path / "cut"), "--fix", str(out), "--force"]) == 1
    assert not (out / "labels.csv").exists()
    assert RecordSet.open(out).num_samples == len(offsets) - 2
    assert not (out / "identities.txt").exists(), "of the set that was replaced"


def test_what_cannot_be_looked_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tmp_path)]) == 2
    assert "train.rec: missing" in capsys.readouterr().err
    (tmp_path / "train.rec").write_bytes(b"no records at all")
    code, found = _verify(tmp_path, capsys)
    assert code == 1
    assert found["images"] == 0
    assert main(["verify", str(tmp_path), "--fix", str(tmp_path / "out")]) == 2
    assert "found none" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_long_list_is_cut_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_set(tmp_path, [image_record(key, [0], b"none") for key in range(5)], classes=1)
    assert main(["verify", str(tmp_path), "--show", "2"]) == 1
    said = capsys.readouterr().out
    assert said.count("expected JPEG or PNG") == 2
    assert "3 more" in said


def test_of_many_findings_some_are_kept_and_all_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(findings, "MOST", 2)
    write_set(tmp_path, [image_record(key, [key % 3], b"none") for key in range(5)], classes=2)
    code, found = _verify(tmp_path, capsys)
    assert code == 1
    assert found["counts"] == {"header": 1, "image": 4}
    assert [finding["kind"] for finding in found["findings"]] == ["header", "image", "image"]
