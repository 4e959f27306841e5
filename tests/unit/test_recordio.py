"""RecordIO: what is written is read, of any payload; a damaged file gives its records or a RecordError."""

from __future__ import annotations

import contextlib
import pickle
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import DataError
from data.rec.recordio import MAGIC_BYTES, MAX_LENGTH, CutError, RecordError, RecordReader, RecordWriter

PAYLOADS = [b"", b"a", b"abcd", MAGIC_BYTES, MAGIC_BYTES * 3, b"abc" + MAGIC_BYTES, b"abcd" + MAGIC_BYTES + b"e" * 9]


def _write(path: Path, payloads: list[bytes]) -> list[int]:
    with RecordWriter(path) as writer:
        return [writer.write(payload) for payload in payloads]


def _read_all(path: Path) -> list[bytes]:
    reader = RecordReader(path)
    return [bytes(reader.read_at(offset)) for offset, _ in reader.scan()]


pieces = st.lists(st.one_of(st.just(MAGIC_BYTES), st.binary(max_size=9), st.just(MAGIC_BYTES[:3])), max_size=8)


@settings(deadline=None)
@given(payloads=st.lists(pieces.map(b"".join), max_size=6))
def test_any_payload_comes_back(tmp_path_factory: pytest.TempPathFactory, payloads: list[bytes]) -> None:
    path = tmp_path_factory.getbasetemp() / "any.rec"
    offsets = _write(path, payloads)
    reader = RecordReader(path)
    assert [bytes(reader.read_at(offset)) for offset in offsets] == payloads
    assert list(reader.scan()) == [(o, len(p)) for o, p in zip(offsets, payloads, strict=True)]
    assert [reader.end_of(offset) for offset in offsets] == [*offsets, reader.size][1:]
    content = path.read_bytes()
    position = 0
    while position < len(content):  # over the parts: the magic is at their starts, and nowhere else where one is sought
        length = struct.unpack_from("<I", content, position + 4)[0] & MAX_LENGTH
        body = content[position + 8 : position + 8 + length]
        assert content[position : position + 4] == MAGIC_BYTES
        assert all(body[at : at + 4] != MAGIC_BYTES for at in range(0, length, 4))
        position += 8 + (length + 3) // 4 * 4


def test_bytes_on_disk(tmp_path: Path) -> None:
    """By hand from the format: a whole record padded to 8, then one cut into parts 1, 2 (empty), 3."""
    offsets = _write(tmp_path / "a.rec", [b"abcde", b"wxyz" + MAGIC_BYTES * 2 + b"!"])
    head = struct.Struct("<4sI").pack
    whole = head(MAGIC_BYTES, 5) + b"abcde\0\0\0"
    parts = head(MAGIC_BYTES, 1 << 29 | 4) + b"wxyz" + head(MAGIC_BYTES, 2 << 29) + head(MAGIC_BYTES, 3 << 29 | 1)
    assert (tmp_path / "a.rec").read_bytes() == whole + parts + b"!\0\0\0"
    assert offsets == [0, 16]


def test_whole_records_are_views(tmp_path: Path) -> None:
    offset = _write(tmp_path / "a.rec", [b"first", b"second"])[1]
    reader = RecordReader(tmp_path / "a.rec")
    payload = reader.read_at(offset)
    assert payload.obj is reader.view.obj
    assert payload.readonly
    reader.close()
    assert bytes(payload) == b"second", "a payload outlives its reader"


def test_readers_and_errors_are_pickled(tmp_path: Path) -> None:
    _write(tmp_path / "a.rec", [b"first"])
    reader = pickle.loads(pickle.dumps(RecordReader(tmp_path / "a.rec")))
    assert bytes(reader.read_at(0)) == b"first"
    with pytest.raises(RecordError) as caught:
        reader.read_at(400)
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value)
    assert (again.path, again.offset) == (tmp_path / "a.rec", 400)


def test_cut_at_every_byte(tmp_path: Path) -> None:
    offsets = _write(tmp_path / "whole.rec", PAYLOADS)
    content = (tmp_path / "whole.rec").read_bytes()
    path = tmp_path / "cut.rec"
    for length in range(len(content)):
        path.write_bytes(content[:length])
        reader, read = RecordReader(path), []
        whole = sum(offset <= length for offset in [*offsets[1:], len(content)])
        if length in offsets:
            read = [bytes(reader.read_at(offset)) for offset, _ in reader.scan()]
        else:
            with pytest.raises(CutError, match=r"cut\.rec: byte \d+: expected .*, found .* \(the file was cut: "):
                read.extend(bytes(reader.read_at(offset)) for offset, _ in reader.scan())
            read = [bytes(reader.read_at(offset)) for offset in offsets[:whole]]
        assert read == PAYLOADS[:whole]


@settings(max_examples=300, deadline=None)
@given(changes=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4))
def test_damage_gives_record_error_or_records(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.rec"
    offsets = _write(path, PAYLOADS)
    content = bytearray(path.read_bytes())
    for position, value in changes:
        content[position % len(content)] = value
    path.write_bytes(content)
    reader = RecordReader(path)
    for offset in [*offsets, *range(-8, len(content) + 8)]:
        with contextlib.suppress(RecordError):
            assert len(reader.read_at(offset)) <= len(content)


@pytest.mark.parametrize(
    ("content", "offset", "message"),
    [
        (b"not a record file at all", 0, "expected magic 0xced7230a, found 0x20746f6e .*not a record file"),
        (struct.pack("<II", 0x3ED7230A, 0), 0, "expected magic 0xced7230a, found 0x3ed7230a, an older dmlc variant"),
        (MAGIC_BYTES + struct.pack("<I", 2 << 29), 0, "the start of a record, found a middle part .*data index"),
        (MAGIC_BYTES + struct.pack("<I", 3 << 29), 0, "the start of a record, found an end part"),
        (MAGIC_BYTES + struct.pack("<I", 7 << 29), 0, "the start of a record, found unknown cflag 7"),
        ((MAGIC_BYTES + struct.pack("<I", 1 << 29)) * 2, 0, "byte 8: expected a middle or end part, found the start"),
        (MAGIC_BYTES + struct.pack("<I", 1 << 29), 0, "byte 8: expected a further part, found the end at 8"),
        (MAGIC_BYTES + struct.pack("<I", 5), 0, "expected 8 bytes of payload and padding, found 0 to the end"),
        (MAGIC_BYTES + bytes(4), 2, "byte 2: expected an offset that is a multiple of 4"),
        (MAGIC_BYTES + bytes(4), 4, "expected a record head of 8 bytes, found 4"),
        (MAGIC_BYTES + bytes(4), 8, "expected a record, found a file of 8 bytes .*cut or the index is of another"),
        (MAGIC_BYTES + bytes(4), -4, "byte -4: expected a record"),
        (b"", 0, "expected a record, found a file of 0 bytes"),
    ],
)
def test_errors_say_what_is_wrong(tmp_path: Path, content: bytes, offset: int, message: str) -> None:
    (tmp_path / "a.rec").write_bytes(content)
    with pytest.raises(RecordError, match=message):
        RecordReader(tmp_path / "a.rec").read_at(offset)


def test_missing_files_and_long_payloads(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no\.rec: cannot read it \(No such file"):
        RecordReader(tmp_path / "no.rec")
    with pytest.raises(DataError, match="cannot write it"):
        RecordWriter(tmp_path / "no" / "a.rec")

    class Long(bytes):
        def __len__(self) -> int:
            return MAX_LENGTH + 1

    with RecordWriter(tmp_path / "a.rec") as writer, pytest.raises(RecordError, match="at most 536870911 bytes"):
        writer.write(Long())
    assert _read_all(tmp_path / "a.rec") == []
