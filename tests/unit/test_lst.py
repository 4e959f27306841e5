"""`python -m data pack lst`: both orders of the columns, labels as they come, and no file outside of the folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.__main__ import main
from data.errors import DataError
from data.making.lst import COLUMNS, read_list
from data.rec.records import RecordSet
from data.verification_bin import read_bin
from tests.image_cases import jpeg


class Photos(NamedTuple):
    """Image files p0/0.jpg … and their contents by path."""

    root: Path
    contents: dict[str, bytes]


@pytest.fixture
def photos(tmp_path: Path) -> Photos:
    contents = {f"p{person}/{image}.jpg": jpeg(10 * person + image) for person in range(4) for image in range(3)}
    contents["p0/bob é.jpg"] = jpeg(99)
    for name, content in contents.items():
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return Photos(tmp_path / "photos", contents)


def _list(tmp_path: Path, *lines: str | bytes) -> Path:
    path = tmp_path / "a.lst"
    path.write_bytes(b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in lines))
    return path


def _pack(lst: Path, photos: Photos, *more: str) -> int:
    out = str(lst.parent / "set")
    return main(["pack", "lst", str(lst), "--root", str(photos.root), "--out", out, "--workers", "1", *more])


def _refused(capsys: pytest.CaptureFixture[str], lst: Path, photos: Photos, *more: str) -> str:
    capsys.readouterr()
    assert _pack(lst, photos, *more) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert not (lst.parent / "set" / "train.rec").exists()
    return line


def _contents(folder: Path) -> list[tuple[int, bytes]]:
    records = RecordSet.open(folder)
    return [(label, bytes(image)) for label, image in map(records.image, range(records.num_samples))]


def _expected(photos: Photos, rows: Sequence[tuple[int, str]]) -> list[tuple[int, bytes]]:
    return [(label, photos.contents[name]) for label, name in sorted(rows, key=lambda row: row[0])]


ROWS = [(2, "p2/0.jpg"), (0, "p0/bob é.jpg"), (0, "p0/1.jpg"), (3, "p3/2.jpg"), (2, "p2/1.jpg")]


@pytest.mark.parametrize(
    ("columns", "line"),
    [
        ("face2rec", "1\t{path}\t{label}"),
        ("face2rec", "1\t{path}\t{label}\t10\t20\t30.5\t40\r"),
        ("im2rec", "{number}\t{label}\t{path}"),
        ("im2rec", "{number}\t{label}.000000\t{path}"),
        ("im2rec", "1\t{label}\t-3.5e-2\t1\t{path}\r"),
    ],
)
@pytest.mark.parametrize("told", [True, False])
def test_both_orders_of_the_columns(tmp_path: Path, photos: Photos, columns: str, line: str, told: bool) -> None:
    lines = [line.format(number=number, label=label, path=path) for number, (label, path) in enumerate(ROWS)]
    assert _pack(_list(tmp_path, *lines, ""), photos, *(["--columns", columns] if told else [])) == 0
    assert RecordSet.open(tmp_path / "set").num_classes == 4, "class 1 has no image, and stays"
    assert _contents(tmp_path / "set") == _expected(photos, ROWS)
    assert sorted(os.listdir(tmp_path / "set")) == ["property", "train.idx", "train.rec"]


def test_the_order_is_never_guessed(tmp_path: Path, photos: Photos, capsys: pytest.CaptureFixture[str]) -> None:
    (photos.root / "5").write_bytes(jpeg(5))
    (photos.root / "7").write_bytes(jpeg(7))
    lst = _list(tmp_path, "1\t5\t7", "1\t7\t5")
    assert "say with --columns which it is" in _refused(capsys, lst, photos)
    assert _pack(lst, photos, "--columns", "im2rec") == 0
    assert _contents(tmp_path / "set") == [(5, jpeg(7)), (7, jpeg(5))]
    assert _pack(lst, photos, "--columns", "face2rec", "--force") == 0
    assert _contents(tmp_path / "set") == [(5, jpeg(7)), (7, jpeg(5))]
    lst = _list(tmp_path, "1\t5\t7", "1\tp1/0.jpg\t0")
    assert _pack(lst, photos, "--force") == 0, "one line decides"
    assert _contents(tmp_path / "set") == [(0, photos.contents["p1/0.jpg"]), (7, jpeg(5))]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], "expected a line for each image, found none"),
        (["\n\r"], "expected a line for each image, found none"),
        (["1 a.jpg 3"], "line 1: expected face2rec's columns"),
        (["1\ta.jpg"], "line 1: expected face2rec's columns"),
        (["1\tp0/0.jpg\tx"], "line 1: expected face2rec's columns"),
        (["1\tp0/0.jpg\t0", "5\t1\tp0/1.jpg"], "line 2: expected aligned, path, label …, found b'5'"),
        (["7\t0\tp0/0.jpg", "8\tx\tp0/1.jpg"], "line 2: expected index, label …, path, found b'x' for a number"),
        (["7\t0\tp0/0.jpg", "8\t1\t"], "line 2: expected index, label …, path, found an empty column"),
        (["0\tp0/0.jpg\t0\t1\t2\t3\t4"], "line 1: expected an aligned face (1 in the first column), found 0: align"),
        (["7\t-1\tp0/0.jpg"], "line 1: expected a label that is a whole number from 0 on"),
        (["7\t1.5\tp0/0.jpg"], "line 1: expected a label that is a whole number"),
        (["7\t1e3\tp0/0.jpg"], "line 1: expected a label that is a whole number"),
        (["7\t1234567890123456789\tp0/0.jpg"], "of 18 digits at most"),
        (["7\t123456789012345678\tp0/0.jpg"], "found 123456789012345678 among 1 images: number them anew"),
        (["7\t0\t" + "x" * (1 << 16)], "line 1: expected less than 65536 bytes"),
        ([b"7\t0\tp0/\xff.jpg"], "line 1: expected a path in UTF-8"),
        (["7\t0\tp0/0.jpg", "8\t0\t/etc/passwd"], "line 2: expected a path below --root, found '/etc/passwd'"),
        (["7\t0\t../photos/p0/0.jpg"], "line 1: expected a path below --root"),
        (["7\t0\tp0/../p0/0.jpg"], "line 1: expected a path below --root"),
        (["7\t0\tp0/0.jpg\0.png"], "line 1: expected a path below --root, found 'p0/0.jpg\\x00.png'"),
        (["7\t0\tp0/0.jpg", "8\t0\tp0/none.jpg"], "line 2: 'p0/none.jpg': expected a file below"),
        (["7\t0\tp0"], "line 1: 'p0': expected a file below"),
    ],
)
def test_what_is_refused_and_where(
    tmp_path: Path, photos: Photos, capsys: pytest.CaptureFixture[str], lines: list[str | bytes], said: str
) -> None:
    error = _refused(capsys, _list(tmp_path, *lines), photos)
    assert said in error
    assert "a.lst" in error


def test_no_file_to_read(tmp_path: Path, photos: Photos, capsys: pytest.CaptureFixture[str]) -> None:
    assert "none.lst: cannot read it (No such file" in _refused(capsys, tmp_path / "none.lst", photos)
    assert "cannot read it (Is a directory)" in _refused(capsys, photos.root, photos)
    away = Photos(tmp_path / "away", {})
    assert "away: expected the folder where the paths" in _refused(capsys, _list(tmp_path, "1\t0\ta.jpg"), away)


@pytest.mark.parametrize("link", ["p0/link.jpg", "away/canary.jpg", "p0/chain.jpg"])
def test_links_out_of_the_folder_are_not_followed(
    tmp_path: Path, photos: Photos, capsys: pytest.CaptureFixture[str], link: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    canary = tmp_path / "outside" / "canary.jpg"
    canary.parent.mkdir()
    canary.write_bytes(jpeg(1234))
    (photos.root / "p0" / "link.jpg").symlink_to(canary)
    (photos.root / "p0" / "chain.jpg").symlink_to("link.jpg")
    (photos.root / "away").symlink_to(canary.parent)
    (photos.root / "p1" / "inside.jpg").symlink_to(photos.root / "p0" / "0.jpg")
    read: list[str] = []
    usual = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(str(path)) or usual(path))
    lst = _list(tmp_path, "1\t0\tp1/inside.jpg", f"2\t0\t{link}")
    for more in ([], ["--skip-bad"]):
        error = _refused(capsys, lst, photos, *more)
        assert f"line 2: '{link}': expected a file below" in error
        assert "found a link out of it" in error
    assert read == [str(photos.root / "p0" / "0.jpg")] * 2, "the canary is not read"
    assert _pack(_list(tmp_path, "1\t0\tp1/inside.jpg"), photos) == 0, "a link within it is followed"


def test_numbers_with_gaps_are_renumbered_on_request(
    tmp_path: Path, photos: Photos, capsys: pytest.CaptureFixture[str]
) -> None:
    far = [(1_000_000, "p1/0.jpg"), (7, "p0/0.jpg"), (1_000_000, "p1/1.jpg")]
    lst = _list(tmp_path, *(f"9\t{label}\t{path}" for label, path in far))
    assert "--renumber" in _refused(capsys, lst, photos)
    assert _pack(lst, photos, "--renumber") == 0
    assert _contents(tmp_path / "set") == _expected(photos, [(1, "p1/0.jpg"), (0, "p0/0.jpg"), (1, "p1/1.jpg")])
    assert (tmp_path / "set" / "labels.csv").read_text() == "label,old_label\n0,7\n1,1000000\n"


def test_identities_held_out_and_images_left_out(
    tmp_path: Path, photos: Photos, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [(2 * int(path[1]), path) for path in photos.contents]
    lst = _list(tmp_path, *(f"9\t{label}\t{path}" for label, path in rows))
    more = ("--verification-identities", "2", "--pairs", "10", "--seed", "3")
    assert _pack(lst, photos, *more) == 0
    owner = {content: 2 * int(path[1]) for path, content in photos.contents.items()}
    old = [int(row.split(",")[1]) for row in (tmp_path / "set" / "labels.csv").read_text().splitlines()[1:]]
    images, same = read_bin(tmp_path / "set" / "verification.bin")
    persons = [owner[image] for image in images]
    assert [a == b for a, b in zip(persons[::2], persons[1::2], strict=True)] == same.tolist()
    assert set(old) | set(persons) == set(range(7))
    assert not set(old) & set(persons)
    packed = _contents(tmp_path / "set")
    assert packed
    assert all(owner[image] == old[label] for label, image in packed)
    (photos.root / "p1" / "0.jpg").write_bytes(b"no image")
    assert "p1/0.jpg: expected a JPEG or PNG image" in _refused_by_force(capsys, lst, photos)
    assert _pack(lst, photos, "--skip-bad", "--force") == 0
    assert "1 left out" in capsys.readouterr().out
    assert len(_contents(tmp_path / "set")) == len(rows) - 1


def _refused_by_force(capsys: pytest.CaptureFixture[str], lst: Path, photos: Photos) -> str:
    capsys.readouterr()
    assert _pack(lst, photos, "--force") == 2
    return capsys.readouterr().err


# ---- any bytes -----------------------------------------------------------------------------------------------------

_TOKENS = [
    *(
        b"\t",
        b"\t",
        b"\t",
        b"\t",
        b"\t",
        b"\n",
        b"\n",
        b"\r\n",
        b"0\t",
        b"1\t",
        b"7\t",
        b"1\ta.jpg\t3\n",
        b"4\t3\ta/b.png\n",
    ),
    *(b"-1", b"1.0", b"12.000000", b"1e9", b"nan", b" 1", b"1_0", b"\xd9\xa1", b"9" * 18, b"9" * 19),
    *(b"a.jpg", b"a/b.png", b"/a", b"../a", b"a/../b", b"a\0b", b"\xff", b"~", b"."),
]
"""What the first values of a byte stand for in the lists below; the others stand for themselves."""
_LISTS = st.binary(max_size=14).map(
    lambda values: b"".join(_TOKENS[value] if value < len(_TOKENS) else bytes([value]) for value in values)
)
_GOOD = st.tuples(st.integers(0, 2 * 10**18), st.sampled_from(["", ".0", ".000000", "."]))


@settings(max_examples=1_000, deadline=None)
@given(st.lists(_LISTS, min_size=10, max_size=10), st.sampled_from([None, *COLUMNS]))
def test_any_bytes_are_a_list_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, lists: list[bytes], columns: str | None
) -> None:
    """10,000 lists, ten at a time, as drawing them takes longer than reading them."""
    path = tmp_path_factory.getbasetemp() / "any.lst"
    for data in lists:
        _check_any(path, data, columns)


def _check_any(path: Path, data: bytes, columns: str | None) -> None:
    path.unlink(missing_ok=True)  # some file systems wait for the disk where a file is cut to be written anew
    path.write_bytes(data)
    try:
        rows, labels = read_list(path, columns)
    except DataError as error:
        said = str(error)
    else:
        said = ""
    if said:
        assert len(said.splitlines()) == 1
        assert said.startswith(f"{path}: ")
        assert len(said) < len(str(path)) + 600
        return
    assert len(rows) == len(labels) == len([line for line in data.split(b"\n") if line.strip(b"\r\n")])
    assert labels.min() >= 0
    for number, begin, length in rows.tolist():
        name = data[begin : begin + length].decode()
        assert data.split(b"\n")[number - 1].find(name.encode()) >= 0
        assert not name.startswith("/")
        assert ".." not in name.split("/")
        assert not set(name) & {"\0", "\t", "\n"}
        assert name


@settings(max_examples=200, deadline=None)
@given(st.lists(_GOOD, min_size=1, max_size=5), st.sampled_from(sorted(COLUMNS)))
def test_lists_are_read_as_plain_python_splits_them(
    tmp_path_factory: pytest.TempPathFactory, items: list[tuple[int, str]], columns: str
) -> None:
    names = [f"d/é{number}.jpg" for number in range(len(items))]
    line = "1\t{1}\t{0}" if columns == "face2rec" else "5\t{0}\t{1}"
    lines = [line.format(f"{label}{point}", name) for (label, point), name in zip(items, names, strict=True)]
    data = "".join(f"{line}\n" for line in lines).encode()
    path = tmp_path_factory.getbasetemp() / "good.lst"
    path.write_bytes(data)
    if max(label for label, _ in items) >= 10**18:
        with pytest.raises(DataError, match="18 digits"):
            read_list(path, columns)
        return
    rows, labels = read_list(path, None)
    assert labels.tolist() == [label for label, _ in items]
    assert [data[begin : begin + length].decode() for _, begin, length in rows.tolist()] == names
    assert np.array_equal(rows, read_list(path, columns).rows)
