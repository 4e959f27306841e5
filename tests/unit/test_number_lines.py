"""Columns of whole numbers are those that Python reads line by line, whatever the pieces; odd lines have numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import DataError
from evaluation import number_lines
from evaluation.number_lines import columns_plainly, read_columns

WELL = {
    "one line": b"1 2 3\n",
    "no end": b"1 2 3\n4 5 6",
    "widths": b"1 22 333\n4444 55555 666666\n0 00 000123\n",
    "eighteen digits": b"999999999999999999 1 100000000000000000\n",
    "tabs, many blanks, returns": b"1\t2  3\r\n  4 \t5 6 \r\n",
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
}


def _columns(folder: Path, text: bytes) -> list[list[int]]:
    path = folder / "pairs.txt"
    path.write_bytes(text)
    found = read_columns(path, 3)
    assert all(column.dtype == np.int64 for column in found)
    return [column.tolist() for column in found]


@pytest.mark.parametrize("size", [1, 7, 1 << 20])
@pytest.mark.parametrize("name", WELL)
def test_columns_are_those_of_plain_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, size: int
) -> None:
    monkeypatch.setattr(number_lines, "_PIECE", size)
    assert _columns(tmp_path, WELL[name]) == columns_plainly(WELL[name], 3)


@settings(deadline=None, max_examples=60)
@given(rows=st.lists(st.tuples(*[st.integers(0, 10**18 - 1)] * 3), min_size=1, max_size=30), size=st.integers(1, 60))
def test_any_numbers_and_pieces(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, ...]], size: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(number_lines, "_PIECE", size)
        text = "".join(f"{a} {b} {c}\n" for a, b, c in rows).encode()
        assert _columns(tmp_path_factory.mktemp("text"), text) == [list(column) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize("size", [5, 1 << 20])
@pytest.mark.parametrize("name", ODD)
def test_the_first_odd_line_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, size: int) -> None:
    monkeypatch.setattr(number_lines, "_PIECE", size)
    text, line = ODD[name]
    with pytest.raises(DataError, match=rf"pairs.txt: line {line}: expected 3 whole numbers"):
        _columns(tmp_path, text)
    with pytest.raises(ValueError, match=f"line {line}"):
        columns_plainly(text, 3)


def test_a_file_without_lines_is_not_gathered(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 1: expected 3 whole numbers"):
        _columns(tmp_path, b"7" * (3 << 20))


def test_no_file_and_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read it"):
        read_columns(tmp_path / "none.txt", 3)
    with pytest.raises(DataError, match="found an empty file"):
        _columns(tmp_path, b"")
