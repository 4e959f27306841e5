"""`python -m data hash, check, subset, split, merge, shuffle, convert`: what comes out, and what is refused."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.__main__ import main
from data.checking import checksums
from data.errors import DataError
from data.files import find_all
from data.making import shuffling
from data.making.pack import write_records
from data.making.webdataset import Shards
from data.rec.records import RecordSet
from tests.image_cases import jpeg

COUNTS = (4, 1, 6, 0, 3, 2)


def _set(folder: Path, counts: Any = COUNTS, *, first: int = 0, names: str = "") -> Path:
    """Images of their own, numbered from `first`, with identity headers."""
    folder.mkdir()
    labels = np.repeat(np.arange(len(counts)), counts).tolist()
    images = ((label, jpeg(first + number)) for number, label in enumerate(labels))
    write_records(folder / "train.rec", folder / "train.idx", images, num_classes=len(counts))
    (folder / "property").write_text(f"{len(counts)},112,112\n")
    if names:
        (folder / "identities.txt").write_text("".join(f"{name}\n" for name in names))
    return folder


def _contents(folder: Path) -> list[tuple[int, bytes]]:
    records = RecordSet.open(folder)
    return [(label, bytes(image)) for label, image in map(records.image, range(records.num_samples))]


def _error(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


# ---- hash, check ---------------------------------------------------------------------------------------------------


def test_hashes_are_those_of_the_files_and_damage_is_told_by_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checksums, "BLOCK", 4096)
    folder = _set(tmp_path / "a")
    (folder / "lfw.bin").write_bytes(b"pairs")
    assert main(["hash", str(folder)]) == 0
    content = json.loads((folder / "hashes.json").read_text())
    assert sorted(content["files"]) == ["lfw.bin", "property", "train.idx", "train.rec"]
    data = (folder / "train.rec").read_bytes()
    assert len(data) > 3 * 4096
    assert content["files"]["train.rec"]["sha256"] == hashlib.sha256(data).hexdigest()
    blocks = [hashlib.sha256(data[at : at + 4096]).hexdigest() for at in range(0, len(data), 4096)]
    assert content["files"]["train.rec"]["blocks"] == blocks
    assert main(["check", str(folder)]) == 0
    for threads in ("1", "3"):
        changed = bytearray(data)
        changed[4096 + 7] ^= 1
        (folder / "train.rec").write_bytes(changed)
        (folder / "property").write_text("6,112,112\n\n")
        (folder / "lfw.bin").unlink(missing_ok=True)
        capsys.readouterr()
        assert main(["check", str(folder), "--json", "--threads", threads]) == 1
        faults = json.loads(capsys.readouterr().out)["faults"]
        assert {"file": "train.rec", "what": "changed", "begin": 4096, "end": 8192} in faults
        assert {"file": "lfw.bin", "what": "missing", "begin": None, "end": None} in faults
        assert any(fault["file"] == "property" and "expected 10 bytes, found 11" in fault["what"] for fault in faults)
    for changes in ({"blocks": []}, {"sha256": "0" * 64}):
        lying = json.loads(json.dumps(content))
        lying["files"] = {"train.idx": {**content["files"]["train.idx"], **changes}}
        (folder / "hashes.json").write_text(json.dumps(lying))
        assert "contradict each other" in _error(capsys, "check", folder)
    (folder / "hashes.json").write_text(json.dumps(content))
    capsys.readouterr()
    assert main(["check", str(folder)]) == 1
    assert "train.rec: bytes 4096 … 8192: changed" in capsys.readouterr().out


_HASHES = '{"version": 1, "algorithm": "sha256", "block": 4, "files": %s}'
NO_HASHES = [
    *("", "[]", '{"version": 1}', _HASHES.replace("1,", "2,", 1) % "{}", _HASHES % "{}"),
    _HASHES % '{"../x": {"size": 1, "sha256": "", "blocks": []}}',
    _HASHES.replace("4,", "99999999999999,") % '{"x": {"size": 1, "sha256": "", "blocks": []}}',
    "[" * 200_000,
]


@pytest.mark.parametrize("text", NO_HASHES)
def test_files_that_are_no_hashes_are_refused(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _set(tmp_path / "a")
    (folder / "hashes.json").write_text(text)
    assert "expected what `python -m data hash` writes" in _error(capsys, "check", folder)


def test_without_hashes_or_a_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "python -m data hash" in _error(capsys, "check", _set(tmp_path / "a"))
    assert "expected a set" in _error(capsys, "hash", tmp_path / "none")


# ---- subset, split, merge ------------------------------------------------------------------------------------------


def test_subset_draws_identities_and_images(tmp_path: Path) -> None:
    folder, before = _set(tmp_path / "a", names="uvwxyz"), dict(enumerate(_contents(tmp_path / "a")))
    out = tmp_path / "b"
    arguments = [
        "subset",
        str(folder),
        "--out",
        str(out),
        "--identities",
        "3",
        "--min-images",
        "2",
        "--max-images",
        "3",
    ]
    assert main([*arguments, "--seed", "1"]) == 0
    records = RecordSet.open(out)
    assert records.num_classes == 3
    assert records.layout == "insightface"
    assert max(Counter(records.labels.tolist()).values()) <= 3
    with (out / "labels.csv").open() as file:
        rows = list(csv.DictReader(file))
    old = {int(row["label"]): int(row["old_label"]) for row in rows}
    assert all(COUNTS[label] >= 2 for label in old.values())
    assert [int(row["images"]) for row in rows] == np.bincount(records.labels).tolist()
    assert (out / "identities.txt").read_text().split() == ["uvwxyz"[old[label]] for label in range(3)]
    for label, image in _contents(out):
        assert (old[label], image) in before.values()
    drawn = set()
    for seed in range(8):
        assert main([*arguments, "--force", "--seed", str(seed)]) == 0
        drawn.add(tuple(image for _, image in _contents(out)))
    assert len(drawn) > 4, "other seeds draw others"


def test_subset_of_a_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, chosen = _set(tmp_path / "a", names="uvwxyz"), tmp_path / "list.txt"
    chosen.write_text("w\n\n5\n")
    assert main(["subset", str(folder), "--out", str(tmp_path / "b"), "--list", str(chosen)]) == 0
    assert RecordSet.open(tmp_path / "b").labels.tolist() == [0] * 6 + [1] * 2
    command = ("subset", folder, "--out", tmp_path / "c")
    for text, said in (("q\n", "line 1: expected a class from 0 to 5 or a name"), ("x\n", "nothing would be left")):
        chosen.write_text(text)
        assert said in _error(capsys, *command, "--list", chosen)
    assert "at most the 5 that are left, got 6" in _error(capsys, *command, "--identities", 6)
    assert "cannot read it" in _error(capsys, *command, "--list", tmp_path / "none")
    (folder / "identities.txt").write_text("1\n2\n3\n4\n5\n6\n")
    chosen.write_text("1\n")
    assert "a name of identities.txt and another class's number" in _error(capsys, *command, "--list", chosen)
    assert "expected another folder" in _error(capsys, "subset", folder, "--out", folder)
    assert not (tmp_path / "c").exists()


def test_split_has_no_identity_on_both_sides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, one, other = _set(tmp_path / "a"), tmp_path / "b", tmp_path / "c"
    assert main(["split", str(folder), "--out", str(one), "--rest", str(other), "--share", "0.4"]) == 0
    first, second = _contents(one), _contents(other)
    assert len({label for label, _ in first}) == 2
    assert len({label for label, _ in second}) == 3
    assert Counter(image for _, image in (*first, *second)) == Counter(image for _, image in _contents(folder))
    assert "--share" in _error(capsys, "split", folder, "--out", one, "--rest", other, "--share", "0.05", "--force")
    before = {path: path.read_bytes() for path in one.iterdir()}
    assert "found train.rec" in _error(
        capsys, "split", folder, "--out", tmp_path / "d", "--rest", other, "--share", "0.4"
    )
    assert not (tmp_path / "d").exists(), "neither, if one cannot be"
    assert {path: path.read_bytes() for path in one.iterdir()} == before
    assert "than --out" in _error(capsys, "split", folder, "--out", one, "--rest", one, "--share", "0.5")


def test_merge_behind_each_other_by_name_and_by_map(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = _set(tmp_path / "a", (2, 3), names="xy"), _set(tmp_path / "b", (1, 0, 2), first=50, names="yzx")
    of_a, of_b = [image for _, image in _contents(a)], [image for _, image in _contents(b)]

    def merged(*more: object) -> list[tuple[int, bytes]]:
        assert main(["merge", str(a), str(b), "--out", str(tmp_path / "m"), "--force", *map(str, more)]) == 0
        return _contents(tmp_path / "m")

    assert merged() == list(zip([0, 0, 1, 1, 1, 2, 4, 4], [*of_a, *of_b], strict=True))
    assert RecordSet.open(tmp_path / "m").num_classes == 5
    assert (tmp_path / "m" / "identities.txt").read_text().split() == [*"xyyzx"]
    assert merged("--by-name") == [(0, of_a[0]), (0, of_a[1]), (0, of_b[1]), (0, of_b[2])] + [
        (1, image) for image in (*of_a[2:], of_b[0])
    ]
    assert (tmp_path / "m" / "identities.txt").read_text().split() == [*"xyz"]
    table = tmp_path / "map.csv"
    table.write_text("set,label,new_label\n1,1,7\n2,0,7\n2,2,3\n")
    assert merged("--map", table) == [(0, of_b[1]), (0, of_b[2])] + [(1, image) for image in (*of_a[2:], of_b[0])]
    assert not (tmp_path / "m" / "identities.txt").exists()
    for text, said in (
        ("label,new\n", "expected the heading"),
        ("set,label,new_label\n3,0,0\n", "line 2: expected a set from 1 to 2"),
        ("set,label,new_label\n1,0,0\n1,0,1\n", "stands there twice"),
        ("set,label,new_label\n2,1,0\n", "no class that has images"),
    ):
        table.write_text(text)
        assert said in _error(capsys, "merge", a, b, "--out", tmp_path / "n", "--map", table)
    (b / "identities.txt").unlink()
    assert "identities.txt" in _error(capsys, "merge", a, b, "--out", tmp_path / "n", "--by-name")
    (b / "property").write_text("3,96,96\n")
    assert "one image size, got 96x96, 112x112" in _error(capsys, "merge", a, b, "--out", tmp_path / "n")


# ---- shuffle -------------------------------------------------------------------------------------------------------


def test_a_shuffled_set_has_the_same_images_in_another_order_whatever_the_memory(
    tmp_path: Path,
) -> None:
    folder = _set(tmp_path / "a", (30, 20, 10))
    out, orders = tmp_path / "b", []
    for memory in (shuffling.MEMORY, 20_000, 3_000):
        images = list(shuffling.shuffled(RecordSet.open(folder), seed=4, folder=tmp_path, memory=memory))
        assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []
        orders.append(images)
    assert orders[0] == orders[1] == orders[2]
    assert main(["shuffle", str(folder), "--out", str(out), "--seed", "4", "--memory", "1"]) == 0
    assert RecordSet.open(out).layout == "sequential"
    assert _contents(out) == orders[0]
    assert Counter(orders[0]) == Counter(_contents(folder))
    labels = [label for label, _ in orders[0]]
    assert labels != sorted(labels)
    assert 20 < np.mean([place for place, label in enumerate(labels) if label == 0]) < 40, "spread over the file"
    assert sorted(os.listdir(out)) == ["property", "train.idx", "train.rec"]
    assert main(["shuffle", str(folder), "--out", str(out), "--seed", "5", "--force"]) == 0
    assert _contents(out) != orders[0]


def test_no_place_for_the_buckets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _set(tmp_path / "a")
    (tmp_path / "file").write_text("")
    assert "cannot" in _error(capsys, "shuffle", folder, "--out", tmp_path / "file" / "b")
    with pytest.raises(DataError, match="cannot keep the images there meanwhile"):
        next(shuffling.shuffled(RecordSet.open(folder), seed=0, folder=tmp_path / "file" / "b"))
    with pytest.raises(DataError, match="memory: expected 1 MB or more"):
        next(shuffling.shuffled(RecordSet.open(folder), seed=0, folder=tmp_path, memory=50))


def test_shuffling_a_set_whose_last_classes_have_no_image(tmp_path: Path) -> None:
    folder = _set(tmp_path / "a", (2, 3, 0), names="xyz")
    assert main(["shuffle", str(folder), "--out", str(tmp_path / "b")]) == 0
    assert RecordSet.open(tmp_path / "b").num_classes == 2
    assert (tmp_path / "b" / "identities.txt").read_text().split() == ["x", "y"]


# ---- convert -------------------------------------------------------------------------------------------------------


def test_to_shards_and_back(tmp_path: Path) -> None:
    folder, shards, back = _set(tmp_path / "a"), tmp_path / "s", tmp_path / "b"
    assert main(["convert", str(folder), "--out", str(shards), "--shard-images", "5"]) == 0
    assert [path.name for path in find_all([shards], ".tar")] == [
        "000000.tar",
        "000001.tar",
        "000002.tar",
        "000003.tar",
    ]
    with tarfile.open(shards / "000001.tar") as tar:  # another reader
        names = tar.getnames()
        file = tar.extractfile("000000005.jpg")
        assert file is not None
        assert file.read() == _contents(folder)[5][1]
    assert names[:2] == ["000000005.jpg", "000000005.cls"]
    assert len(names) == 10
    assert main(["convert", str(shards), "--out", str(back)]) == 0
    assert _contents(back) == _contents(folder)
    first = (shards / "000002.tar").read_bytes()
    assert main(["convert", str(folder), "--out", str(shards), "--shard-images", "5", "--force"]) == 0
    assert (shards / "000002.tar").read_bytes() == first
    (shards / "backup.tar").write_bytes(b"somebody's")
    assert main(["convert", str(folder), "--out", str(shards), "--force"]) == 0
    assert sorted(os.listdir(shards)) == ["000000.tar", "backup.tar"], "shards of before go, others' files stay"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "s"]


def _tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            (path.parent / "one").write_bytes(content)
            tar.add(path.parent / "one", name)
        (path.parent / "one").unlink()


def test_shards_of_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Paths in names, classes before images, unsorted classes, files of other kinds."""
    folder = tmp_path / "s"
    folder.mkdir()
    _tar(
        folder / "x.tar",
        {"p/1.cls": b"2\n", "p/1.jpeg": jpeg(1), "p/1.json": b"{}", "../q.jpg": jpeg(2), "../q.cls": b"0"},
    )
    _tar(folder / "y.tar", {"1.seg.png": b"", "1.JPG": jpeg(3), "1.cls": b"x"})
    assert "expected a class number" in _error(capsys, "convert", folder, "--out", tmp_path / "b")
    _tar(folder / "y.tar", {"5.jpg": jpeg(3), "5.cls": b"2"})
    assert Shards(find_all([folder], ".tar")).labels.tolist() == [2, 0, 2]
    assert main(["convert", str(folder), "--out", str(tmp_path / "b")]) == 0
    assert _contents(tmp_path / "b") == [(0, jpeg(2)), (2, jpeg(1)), (2, jpeg(3))]
    assert not (tmp_path / "q.jpg").exists(), "nothing is unpacked"
    _tar(folder / "y.tar", {"5.jpg": jpeg(3, size=(96, 112)), "5.cls": b"2"})
    assert "image 2: expected 112x112 pixels" in _error(capsys, "convert", folder, "--out", tmp_path / "c")
    _tar(folder / "y.tar", {"5.jpg": jpeg(3), "5.cls": b"123456789"})
    assert "--renumber" in _error(capsys, "convert", folder, "--out", tmp_path / "c")
    assert main(["convert", str(folder), "--out", str(tmp_path / "d"), "--renumber"]) == 0
    assert _contents(tmp_path / "d") == [(0, jpeg(2)), (1, jpeg(1)), (2, jpeg(3))]
    assert (tmp_path / "d" / "labels.csv").read_text() == "label,old_label\n0,0\n1,2\n2,123456789\n"
    _tar(folder / "y.tar", {"5.jpg": jpeg(3)})
    assert "5 lacks a .cls file" in _error(capsys, "convert", folder, "--out", tmp_path / "c")
    (folder / "y.tar").write_bytes(b"no tar file" * 100)
    assert "uncompressed tar" in _error(capsys, "convert", folder, "--out", tmp_path / "c")
    for path in folder.iterdir():
        path.unlink()
    assert "expected a .tar file, or a folder of some" in _error(capsys, "convert", folder, "--out", tmp_path / "c")
    assert list((tmp_path / "c").iterdir()) == [], "nothing is left of what failed"
