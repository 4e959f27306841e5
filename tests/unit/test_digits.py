"""Numbers read eight digits at a time are those that numpy.loadtxt reads, and odd text is left to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.rec import digits
from data.rec.digits import MOST_DIGITS, pairs_of

KEYS = st.integers(0, 2**31 - 1)
OFFSETS = st.integers(0, 10**MOST_DIGITS - 1)
FEW = digits._FEW


@pytest.fixture(scope="module", autouse=True)
def _few() -> Iterator[None]:
    """Lines of one shape are read as such in short texts too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "_FEW", 64)
        yield


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "train.idx"


def _check(path: Path, pairs: list[tuple[int, int]]) -> None:
    found = pairs_of(path)
    assert found is not None
    assert [column.dtype for column in found] == [np.int32, np.int64]
    assert list(zip(*(column.tolist() for column in found), strict=True)) == pairs


@settings(max_examples=800, deadline=None)
@given(pairs=st.lists(st.tuples(KEYS, OFFSETS), min_size=1, max_size=30), tail=st.booleans(), zeros=st.integers(0, 3))
def test_any_numbers(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[int, int]], tail: bool, zeros: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.idx"
    text = "".join(f"{'0' * zeros if key < 10**9 else ''}{key}\t{offset}\n" for key, offset in pairs)
    path.write_text(text if tail else text[:-1])
    _check(path, pairs)
    np.testing.assert_array_equal(np.loadtxt(path, np.int64, ndmin=2), pairs)


@pytest.mark.parametrize("piece", [40, 1000, 4096, digits._PIECE])
def test_an_index_in_pieces_whose_lines_grow(path: Path, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    """Lines of one shape side by side, and where the number of digits changes, at all places of a piece."""
    monkeypatch.setattr(digits, "_PIECE", piece)
    rng = np.random.default_rng(0)
    count = min(30000, 100 * piece)
    offsets = np.cumsum(rng.integers(1, 3, count) * 4 * 10 ** rng.integers(0, 9, count))
    pairs = [*zip(range(1, count), offsets[:-1].tolist(), strict=True), (0, int(offsets[-1]))]
    path.write_text("".join(f"{key}\t{offset}\n" for key, offset in pairs))
    _check(path, pairs)
    path.write_text("".join(f"{key}\t{offset}\n" for key, offset in reversed(pairs)))
    _check(path, pairs[::-1])


def test_a_long_index(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits, "_FEW", FEW)
    pairs = [(key, 9_000_000 + 4321 * key) for key in range(1, 20000)]
    path.write_text("".join(f"{key}\t{offset}\n" for key, offset in pairs))
    _check(path, pairs)


def test_an_empty_file(path: Path) -> None:
    path.touch()
    _check(path, [])


ODD = [
    *("\n", "1\n", "1\t\n", "\t1\n", "1\t2\t3\n", "1 2\n", "1\t-2\n", "-1\t2\n", "1\t2.0\n", "1\t 2\n", "a\t2\n"),
    *("1\t2\r\n", "1\t2\n\n", "1\t2\n3", "1\t2\n3\t", "1\n\t2", "1:\t2\n", "1\t/\n", "\x00\t1\n", "\xff\t1\n"),
    *(f"1\t{'9' * (MOST_DIGITS + 1)}\n", f"{2**31}\t1\n", "1" * 5000),
]


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("before", [0, 1, 500])
def test_odd_text_is_left_to_others(path: Path, monkeypatch: pytest.MonkeyPatch, odd: str, before: int) -> None:
    monkeypatch.setattr(digits, "_PIECE", 1000)
    path.write_bytes(("12\t34567\n" * before + odd).encode("latin-1"))
    assert pairs_of(path) is None
    path.write_bytes(("12\t34567\n" * before + odd + "\n" + "12\t34567\n" * 99).encode("latin-1"))
    assert pairs_of(path) is None or odd == "1\t2\n3\t"


@settings(max_examples=600, deadline=None)
@given(lines=st.integers(0, 80), at=st.integers(0, 2000), byte=st.integers(0, 255))
def test_any_changed_byte_gives_what_loadtxt_reads_or_is_left_to_it(
    tmp_path_factory: pytest.TempPathFactory, lines: int, at: int, byte: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "changed.idx"
    text = bytearray(b"".join(b"%d\t%d\n" % (100 + n, 123456789012 + n) for n in range(lines)))
    if at < len(text):
        text[at] = byte
    path.write_bytes(text)
    found = pairs_of(path)
    if found is not None and lines:
        table = np.loadtxt(path, np.int64, ndmin=2, delimiter="\t", comments=None, encoding="latin-1")
        np.testing.assert_array_equal(np.stack(found, axis=1), table)
