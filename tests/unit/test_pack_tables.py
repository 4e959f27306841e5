"""`python -m data pack parquet, webdataset`: the images and labels of the files, whatever order they are in."""

from __future__ import annotations

import io
import os
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from configs.extras import installing
from data.__main__ import main
from data.making import spill
from data.making.parquet import ParquetSource, jumps, read_table
from data.making.sources import encode_image
from data.rec.records import RecordSet
from data.verification_bin import read_bin
from tests.image_cases import jpeg

LABELS = [0, 0, 2, 2, 2, 3, 5, 5]


def _table(images: Sequence[bytes | None], labels: Any, *, struct: bool = False) -> pa.Table:
    cells: Any = [{"bytes": image, "path": "a.jpg"} for image in images] if struct else list(images)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())]) if struct else pa.binary()
    return pa.table({"other": range(len(images)), "image": pa.array(cells, kind), "label": labels})


def _pack(kind: str, out: Path, *arguments: object, workers: int = 1) -> int:
    return main(["pack", kind, *map(str, arguments), "--out", str(out), "--workers", str(workers)])


def _refused(capsys: pytest.CaptureFixture[str], kind: str, out: Path, *arguments: object) -> str:
    capsys.readouterr()
    assert _pack(kind, out, *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert not out.exists() or not os.listdir(out)
    return line


def _contents(folder: Path) -> list[tuple[int, bytes]]:
    records = RecordSet.open(folder)
    return [(label, bytes(image)) for label, image in map(records.image, range(records.num_samples))]


@pytest.mark.parametrize("struct", [False, True])
@pytest.mark.parametrize("workers", [1, 2])
def test_parquet_in_the_order_of_its_labels(tmp_path: Path, struct: bool, workers: int) -> None:
    """Two files, several row groups, small and large integers."""
    images = [jpeg(number) for number in range(8)]
    pq.write_table(_table(images[:5], pa.array(LABELS[:5], pa.uint8()), struct=struct), tmp_path / "a.parquet", 2)
    pq.write_table(_table(images[5:], pa.array(LABELS[5:], pa.int64()), struct=struct), tmp_path / "b.parquet", 2)
    out = tmp_path / "set"
    assert _pack("parquet", out, tmp_path, workers=workers) == 0
    assert _contents(out) == list(zip(LABELS, images, strict=True))
    assert RecordSet.open(out).num_classes == 6
    assert sorted(os.listdir(out)) == ["property", "train.idx", "train.rec"]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_with_names_for_labels_in_any_order(tmp_path: Path, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spill, "STEP", 4)  # several files, and steps
    names = ["zoe", "ann", "bob é"] * 7
    images = [jpeg(number) for number in range(21)]
    table = _table(images, pa.array(names).cast(kind)).rename_columns(["other", "face", "who"])
    pq.write_table(table, tmp_path / "a.parquet", 8)
    more = ("--image-column", "face", "--label-column", "who")
    assert _pack("parquet", tmp_path / "set", tmp_path / "a.parquet", *more, workers=2) == 0
    assert (tmp_path / "set" / "identities.txt").read_text(encoding="utf-8").splitlines() == ["ann", "bob é", "zoe"]
    order = np.argsort(names, kind="stable").tolist()
    assert _contents(tmp_path / "set") == [(place // 7, images[row]) for place, row in enumerate(order)]
    assert sorted(os.listdir(tmp_path / "set")) == ["identities.txt", "property", "train.idx", "train.rec"]

    held_out = ("--verification-identities", "2", "--pairs", "10")
    assert _pack("parquet", tmp_path / "two", tmp_path / "a.parquet", *more, *held_out) == 0
    owner = dict(zip(images, names, strict=True))
    verified, same = read_bin(tmp_path / "two" / "verification.bin")
    assert [owner[a] == owner[b] for a, b in zip(verified[::2], verified[1::2], strict=True)] == same.tolist()
    (name,) = (tmp_path / "two" / "identities.txt").read_text(encoding="utf-8").splitlines()
    assert {owner[image] for _, image in _contents(tmp_path / "two")} == {name}
    assert name not in {owner[image] for image in verified}


def test_mixed_labels_are_set_aside_and_sorted_ones_are_not(tmp_path: Path) -> None:
    rows = np.array([[0, 0, 0], [0, 0, 1], [0, 1, 0], [1, 0, 0]])
    assert jumps(rows) == 3
    assert jumps(rows[[1, 0, 2, 3]]) == 4
    assert jumps(rows[[3, 0, 2, 1]]) == 4
    images = [jpeg(number) for number in range(6)]
    pq.write_table(_table(images, [0, 0, 1, 1, 2, 2]), tmp_path / "a.parquet", 2)
    table = read_table([tmp_path / "a.parquet"], image_column="image", label_column="label")
    assert isinstance(table.source, ParquetSource)
    assert table.source.encode(table.rows[[5, 0, 3, 3]]) == [images[5], images[0], images[3], images[3]]


@pytest.mark.parametrize("mixed", [False, True])
def test_parquet_with_images_that_cannot_be_had(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], mixed: bool
) -> None:
    images = [*(jpeg(number) for number in range(10)), b"text", None]
    labels = [0, 1] * 6 if mixed else [0] * 6 + [1] * 6
    pq.write_table(_table(images, labels, struct=True), tmp_path / "a.parquet", 12)
    assert "a.parquet: row 10 of row group 0: expected a JPEG" in _refused(
        capsys, "parquet", tmp_path / "set", tmp_path / "a.parquet"
    )
    assert _pack("parquet", tmp_path / "set", tmp_path / "a.parquet", "--skip-bad") == 0
    printed = capsys.readouterr()
    assert "row 11 of row group 0: expected the bytes of an image, found none: a path alone" in printed.err
    assert "10 images of 2 identities" in printed.out
    assert [image for _, image in _contents(tmp_path / "set")] == [
        images[row] for row in np.argsort(labels[:10], kind="stable")
    ]


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"image": [b""]}, "expected a column label, found image"),
        (
            {"image": [b"x"] * 4, "label": ["a", "b" * 1000, "a", "c" * 1001]},
            "a.parquet: row 3 of row group 0: column label: expected a name of 1,000 characters at most, found 1,001",
        ),
        ({"image": ["a.jpg"], "label": [0]}, "column image: expected bytes, or a struct with `bytes`, found string"),
        ({"image": [{"path": "a"}], "label": [0]}, "column image: expected bytes, or a struct with `bytes`"),
        ({"image": [{"bytes": 3}], "label": [0]}, "column image: expected bytes, or a struct with `bytes`"),
        ({"image": [b"x"], "label": [0.5]}, "column label: expected integers or strings, found double"),
        ({"image": [b"x"], "label": [None, 0][:1]}, "column label: expected integers or strings, found null"),
        ({"image": [b"x", b"y"], "label": [None, 0]}, "column label: expected a label in each row, found a null"),
        ({"image": [b"x"], "label": [-3]}, "column label: expected labels from 0 on, found -3"),
        ({"image": [b"x"], "label": ["a\nb"]}, "column label: expected names without line breaks"),
        ({"image": [b"x"], "label": [""]}, "column label: expected names"),
        ({"image": [b"x"], "label": pa.array([1 << 63], pa.uint64())}, "cannot read it as parquet"),
        ({"image": [b"x"], "label": [1000]}, "found 1000 among 1 images: number them anew with --renumber"),
        (
            {"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())},
            "expected rows with images, found none",
        ),
    ],
)
def test_columns_of_other_kinds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], columns: dict[str, Any], said: str
) -> None:
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert said in _refused(capsys, "parquet", tmp_path / "set", tmp_path / "a.parquet")


def test_files_that_are_no_parquet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "expected a .parquet file, or a folder of some" in _refused(capsys, "parquet", tmp_path / "set", tmp_path)
    assert "none: expected a .parquet" in _refused(capsys, "parquet", tmp_path / "set", tmp_path / "none")
    pq.write_table(_table([jpeg(n) for n in range(20)], [0] * 20), tmp_path / "a.parquet")
    good = (tmp_path / "a.parquet").read_bytes()
    for data in (b"", b"text" * 100, good[:500], good[:100] + good[1000:], good[:-300] + bytes(300)):
        (tmp_path / "a.parquet").write_bytes(data)
        assert "cannot read it as parquet" in _refused(capsys, "parquet", tmp_path / "set", tmp_path / "a.parquet")
    for at in range(4, 20000, 1999):
        (tmp_path / "a.parquet").write_bytes(good[:at] + os.urandom(50) + good[at + 50 :])
        assert _pack("parquet", tmp_path / "set", tmp_path / "a.parquet", "--force", "--skip-bad") in (0, 2)
    (tmp_path / "a.parquet").write_bytes(good)
    pq.write_table(_table([jpeg(0)], ["a"]), tmp_path / "b.parquet")
    assert _pack("parquet", tmp_path / "other", tmp_path / "a.parquet", tmp_path / "b.parquet") == 2
    assert "expected one kind of labels, found ['integers', 'strings']" in capsys.readouterr().err


def test_without_pyarrow(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    error = _refused(capsys, "parquet", tmp_path / "set", tmp_path / "a.parquet")
    assert error.endswith(f"pyarrow, {installing('parquet')}")


# ---- shards --------------------------------------------------------------------------------------------------------


def _shard(path: Path, files: dict[str, bytes] | Sequence[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items() if isinstance(files, dict) else files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def _png(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(jpeg(seed, size=(150, 120)))).save(buffer, "PNG")
    return buffer.getvalue()


def test_shards_of_images_of_any_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    large, png = jpeg(1, size=(200, 224)), _png(2)
    _shard(tmp_path / "0.tar", {"a.jpg": jpeg(0), "a.cls": b"1", "b.jpeg": large, "b.cls": b"0", "b.json": b"{}"})
    _shard(tmp_path / "1.tar", {"c.cls": b"1", "c.png": png, "../d.jpg": jpeg(3), "../d.cls": b"0"})
    expected = [(0, encode_image(large)), (0, jpeg(3)), (1, jpeg(0)), (1, encode_image(png))]
    for name, sources in (("x", [tmp_path]), ("y", [tmp_path / "0.tar", tmp_path / "1.tar"])):
        assert _pack("webdataset", tmp_path / name, *sources, workers=1 + (name == "y")) == 0
        assert _contents(tmp_path / name) == expected
    _shard(tmp_path / "1.tar", {"c.cls": b"300000", "c.png": b"text", "d.jpg": jpeg(3), "d.cls": b"9"})
    out = tmp_path / "z"
    assert "--renumber" in _refused(capsys, "webdataset", out, tmp_path)
    assert "1.tar: the image at byte" in _refused(capsys, "webdataset", out, tmp_path, "--renumber")
    assert _pack("webdataset", out, tmp_path, "--renumber", "--skip-bad") == 0
    assert _contents(out) == [(0, encode_image(large)), (1, jpeg(0)), (2, jpeg(3))]
    assert (out / "labels.csv").read_text() == "label,old_label\n0,0\n1,1\n2,9\n3,300000\n"


def test_shards_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "set"
    assert "expected a .tar file, or a folder of some" in _refused(capsys, "webdataset", out, tmp_path)
    _shard(tmp_path / "a.tar", {"a.cls": b"1", "a.jpg": jpeg(0)})
    data = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(data[:2000])
    assert "a.tar" in _refused(capsys, "webdataset", out, tmp_path)
    (tmp_path / "a.tar").write_bytes(b"no tar" * 500)
    assert "uncompressed tar" in _refused(capsys, "webdataset", out, tmp_path / "a.tar")


@pytest.mark.parametrize("again", [("a/x.jpg", "a/x.jpg"), ("a/x.png", "a/x.png"), ("a/x.cls", "a/x.cls")])
def test_shards_with_a_key_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str], again: tuple[str, str]) -> None:
    name, shown = again
    content = b"1" if name.endswith(".cls") else jpeg(1)
    _shard(tmp_path / "a.tar", [("a/x.jpg", jpeg(0)), ("a/x.cls", b"0"), ("x.jpg", jpeg(2)), ("x.cls", b"1")])
    assert _pack("webdataset", tmp_path / "good", tmp_path / "a.tar") == 0, "in folders of their own"
    _shard(tmp_path / "a.tar", [("a/x.jpg", jpeg(0)), ("a/x.cls", b"0"), (name, content)])
    for command in ("webdataset", "convert"):
        if command == "convert":
            assert main(["convert", str(tmp_path), "--out", str(tmp_path / "c")]) == 2
            error = capsys.readouterr().err
        else:
            error = _refused(capsys, "webdataset", tmp_path / "set", tmp_path)
        assert f"a.tar: a/x: expected one {'.cls file' if content == b'1' else 'image'} for each key" in error
        assert shown in error


def test_hidden_tar_files_and_what_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _shard(tmp_path / "0.tar", {"a.jpg": jpeg(0), "a.cls": b"0"})
    (tmp_path / "._0.tar").write_bytes(b"what macOS leaves")
    assert _pack("webdataset", tmp_path / "set", tmp_path) == 0
    assert main(["convert", str(tmp_path), "--out", str(tmp_path / "converted")]) == 0
    (tmp_path / "1.tar").symlink_to(tmp_path / "away")
    assert "1.tar: expected a .tar file, found a folder or a link to nothing" in _refused(
        capsys, "webdataset", tmp_path / "other", tmp_path
    )


def _claims(size: bytes, kind: bytes = b"0", name: bytes = b"a.json") -> bytes:
    """A tar file of one head that claims a size."""
    head = bytearray(name.ljust(100, b"\0") + b"0000644\0" * 3 + size + b"00000000000\0" + b" " * 8 + kind)
    head = head.ljust(512, b"\0")
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head) + bytes(1024)


@pytest.mark.parametrize("kind", [b"0", b"L", b"x", b"g", b"S", b"K"])
def test_absurd_sizes_in_a_tar_file(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: bytes) -> None:
    sizes = [b"\x80" + b"\x7f" * 11, b"\xff" * 10 + b"\xfe\0", b"\x80" + bytes(3) + b"\x7f" + b"\xff" * 7]
    for size in (*sizes, b"77777777777\0", b"-0000000001\0", b"99999999999\0", b"\xff" * 12):
        for name in (b"a.json", b"a.jpg", b"a.cls"):
            (tmp_path / "a.tar").write_bytes(_claims(size, kind, name))
            assert "tar" in _refused(capsys, "webdataset", tmp_path / "set", tmp_path / "a.tar")


def test_names_within_names_in_a_tar_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head = _claims(b"00000001000\0", b"L")[:512]
    (tmp_path / "a.tar").write_bytes((head + b"a.jpg".ljust(512, b"\0")) * 3000)
    assert "a.tar" in _refused(capsys, "webdataset", tmp_path / "set", tmp_path / "a.tar")


def test_a_damaged_head_is_not_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """tarfile would stop there without a word."""
    files = [
        pair for number, name in enumerate("abc") for pair in ((f"{name}.jpg", jpeg(number)), (f"{name}.cls", b"0"))
    ]
    _shard(tmp_path / "a.tar", files)
    data = (tmp_path / "a.tar").read_bytes()
    place = data.index(b"b.jpg")
    (tmp_path / "a.tar").write_bytes(data[:place] + b"B" + data[place + 1 :])
    assert f"damaged or cut at byte {place}" in _refused(capsys, "webdataset", tmp_path / "set", tmp_path)
    (tmp_path / "a.tar").write_bytes(data[: place + 100])
    assert f"damaged or cut at byte {place}" in _refused(capsys, "webdataset", tmp_path / "set", tmp_path)
