"""Columns of whole numbers are those that Python reads line by line, whatever the pieces; odd lines have numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import DataError
from data.rec import digits
from evaluation.ijb import number_lines
from evaluation.ijb.number_lines import read_columns

FAST = {
    "one line": b"1 2 3\n",
    "no end": b"1 2 3\n4 5 6",
    "widths": b"1 22 333\n4444 55555 666666\n0 00 000123\n",
    "tabs": b"1\t2\t3\n4\t55\t6\n",
    "many alike, then others": b"12 345 0\n" * 200 + b"1 345 0\n" * 70 + b"1 2 1\n123456789 1 12345678\n" * 9,
}
SLOW = {
    "eighteen digits": b"999999999999999999 1 100000000000000000\n",
    "tabs, many blanks, returns": b"1\t2  3\r\n  4 \t5 6 \r\n",
    "a tab after blanks": b"1 2 3\n4 5\t6\n",
    "a blank after tabs": b"1\t2\t3\n4\t5 6",
}
ODD = {
    "two numbers": (b"1 2 3\n4 5\n", 2),
    "four and two": (b"1 2 3\n1 2 3 4\n1 2\n", 2),
    "two and four": (b"1 2\n1 2 3 4\n", 1),
    "a word": (b"1 2 3\n\n", 2),
    "letters": (b"1 2 3\n1 2 3\n1 x 3\n", 3),
    "a sign": (b"1 -2 3\n", 1),
    "a point": (b"1 2.5 3\n", 1),
    "commas": (b"1,2,3\n", 1),
    "nineteen digits": (b"1 2 3\n1 2 1000000000000000000\n", 2),
    "bytes that are no text": (b"1 2 3\n\xff\xfe\x00\n", 2),
    "a blank line first": (b"\n1 2 3\n", 1),
    "far down": (b"12 345 0\n" * 500 + b"12 345\n678 1 2 0\n", 501),
    "a line of blanks that is cut": (b"1 2 3" + b" " * 4091 + b"4 5 6\n", 1),
}


def _columns(folder: Path, text: bytes) -> list[list[int]]:
    path = folder / "pairs.txt"
    path.write_bytes(text)
    found = read_columns(path, 3)
    assert all(column.dtype == np.int64 for column in found)
    return [column.tolist() for column in found]


def _plainly(text: bytes) -> list[list[int]]:
    rows = [[int(word) for word in line.split()] for line in text.removesuffix(b"\n").split(b"\n")]
    return [list(column) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize(("size", "few"), [(1, 64), (7, 1), (1 << 20, 64), (1 << 20, 1)])
@pytest.mark.parametrize("name", [*FAST, *SLOW])
def test_columns_are_those_of_plain_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, size: int, few: int
) -> None:
    monkeypatch.setattr(digits, "_PIECE", size)
    monkeypatch.setattr(digits, "_FEW", few)
    text = (FAST | SLOW)[name]
    assert _columns(tmp_path, text) == _plainly(text)


@pytest.mark.parametrize("name", FAST)
def test_usual_files_are_read_fast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(number_lines, "_one_by_one", None)
    assert _columns(tmp_path, FAST[name]) == _plainly(FAST[name])


@settings(deadline=None, max_examples=60)
@given(
    rows=st.lists(st.tuples(*[st.integers(0, 10**18 - 1)] * 3), min_size=1, max_size=30),
    size=st.integers(1, 60),
    largest=st.sampled_from([9, 10**5, 10**16 - 1, 10**18 - 1]),
)
def test_any_numbers_and_pieces(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, ...]], size: int, largest: int
) -> None:
    rows = [tuple(number % (largest + 1) for number in row) for row in rows]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "_PIECE", size)
        patch.setattr(digits, "_FEW", 2)
        text = "".join(f"{a} {b} {c}\n" for a, b, c in rows).encode()
        assert _columns(tmp_path_factory.mktemp("text"), text) == [list(column) for column in zip(*rows, strict=True)]


@settings(deadline=None, max_examples=200)
@given(at=st.integers(0, 900), byte=st.integers(0, 255))
def test_any_changed_byte_gives_what_plain_reading_does(
    tmp_path_factory: pytest.TempPathFactory, at: int, byte: int
) -> None:
    text = bytearray(b"".join(b"%d %d %d\n" % (n, 1000 - n, n % 2) for n in range(1, 90)))
    text[at % len(text)] = byte
    try:
        found = _columns(tmp_path_factory.mktemp("text"), bytes(text))
    except DataError:
        lines = bytes(text).removesuffix(b"\n").split(b"\n")
        assert any(len(line.split()) != 3 or not line.replace(b" ", b"").isdigit() for line in lines)
    else:
        assert found == _plainly(bytes(text))


@pytest.mark.parametrize("size", [5, 1 << 20])
@pytest.mark.parametrize("name", ODD)
def test_the_first_odd_line_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, size: int) -> None:
    monkeypatch.setattr(digits, "_PIECE", size)
    text, line = ODD[name]
    with pytest.raises(DataError, match=rf"pairs.txt: line {line}: expected 3 whole numbers"):
        _columns(tmp_path, text)


def test_a_file_without_lines_is_not_gathered(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 1: expected 3 whole numbers"):
        _columns(tmp_path, b"7" * (3 << 20))


def test_no_file_and_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read it"):
        read_columns(tmp_path / "none.txt", 3)
    with pytest.raises(DataError, match="found an empty file"):
        _columns(tmp_path, b"")
