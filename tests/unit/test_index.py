"""Index files: what is wrong with one is said in one line; a rebuilt one is what the builders write."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import DataError
from data.rec.header import EXACT, HeaderError
from data.rec.index import Index, find_identities, read_index, rebuild, write_index
from data.rec.recordio import CutError, RecordError, RecordReader
from data.rec.records import RecordSet
from data.stores.cache import Cache
from tests.record_files import image_record, insightface_records, write_set


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_set(tmp_path / "set", insightface_records([3, 0, 2]), classes=3)


def _open(folder: Path) -> tuple[Path, RecordReader]:
    return folder / "train.idx", RecordReader(folder / "train.rec")


def test_write_and_read_sorts_by_offset(folder: Path) -> None:
    path, reader = _open(folder)
    index = read_index(path, reader)
    assert index.keys.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 0]
    assert index.offsets.tolist() == [offset for offset, _ in reader.scan()]
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("\r\n".join(line.strip() for line in reversed(lines)))
    again = read_index(path, reader)
    np.testing.assert_array_equal(again.keys, index.keys)
    np.testing.assert_array_equal(again.offsets, index.offsets)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected lines `key<TAB>offset`, found none"),
        ("\n\n", "expected lines `key<TAB>offset`, found none"),
        ("\n" * 20, "expected lines `key<TAB>offset`, found none"),
        ("1\t0\n2\tsixty\n", "expected lines `key<TAB>offset`: could not convert string 'sixty'"),
        ("1 0\n2 60\n", "expected lines `key<TAB>offset`: could not"),
        ("1\n2\n", "expected lines `key<TAB>offset`: found 1 columns"),
        ("1\t0\t5\n", "expected lines `key<TAB>offset`: found 3 columns"),
        ("1\t0.5\n", "expected lines `key<TAB>offset`: could not"),
        ("1\t0\n2\t99999999999999999999\n", "expected lines `key<TAB>offset`: could not"),
        ("1\t0\n2\t0\n", "offset 0 stands there twice"),
        ("1\t0\n1\t40\n", "key 1 stands there twice"),
        ("-1\t0\n2\t40\n", "expected keys from 0 on, found -1"),
        ("1\t-4\n2\t40\n", "expected offsets from 0 on, found -4"),
        ("1\t0\n2\t42\n", "byte 42: expected an offset that is a multiple of 4"),
        ("1\t0\n2\t4000\n", "byte 4000: expected a record, found a file of"),
    ],
)
def test_what_is_wrong_with_an_index(folder: Path, text: str, message: str) -> None:
    path, reader = _open(folder)
    path.write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        read_index(path, reader)
    assert f"python -m data index {folder / 'train.rec'}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_index_names_the_command(folder: Path) -> None:
    path, reader = _open(folder)
    path.unlink()
    with pytest.raises(DataError, match=rf"train\.idx: missing: .*`python -m data index {folder}/train\.rec`"):
        read_index(path, reader)
    path.mkdir()
    with pytest.raises(DataError, match="cannot read it"):
        read_index(path, reader)


lines = st.one_of(st.binary(max_size=20), st.from_regex(rb"-?[0-9]{1,4}\t-?[0-9]{1,4}", fullmatch=True))


@settings(max_examples=200, deadline=None)
@given(content=st.lists(lines, max_size=6).map(b"\n".join))
def test_any_bytes_as_an_index(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = write_set(tmp_path_factory.getbasetemp() / "fuzz", insightface_records([3, 0, 2]), classes=3)
    path, reader = _open(folder)
    path.write_bytes(content)
    with contextlib.suppress(DataError):
        index = read_index(path, reader)
        assert len(index.keys) == len(index.offsets) > 0


def test_rebuilt_as_the_builder_wrote_it(folder: Path) -> None:
    path, reader = _open(folder)
    before = path.read_bytes()
    built = rebuild(reader)
    assert (built.images, built.identities, built.cut) == (5, 3, "")
    write_index(path, built.index)
    assert path.read_bytes() == before
    images = rebuild(reader, images_only=True)
    assert images.index.keys.tolist() == [0, 1, 2, 3, 4]
    assert images.index.offsets.tolist() == built.index.offsets[:5].tolist()


@pytest.mark.parametrize("key_0_first", [False, True])
@pytest.mark.parametrize("counts", [[3, 0, 2], [1], [0, 1], [2, 0], [0, 0, 1, 0]])
def test_key_0_before_or_behind_the_headers(tmp_path: Path, counts: list[int], key_0_first: bool) -> None:
    """Such a set opens with its index; a scan makes the same index, so it opens without one as well."""
    records = insightface_records(counts, key_0_first=key_0_first)
    folder = write_set(tmp_path / "set", records, classes=len(counts))
    path, reader = _open(folder)
    before = path.read_bytes()
    assert read_index(path, reader).keys.tolist() == [key for key, _ in records]
    built = rebuild(reader)
    assert (built.images, built.identities, built.cut) == (sum(counts), len(counts), "")
    for indexed in (True, False):
        opened = RecordSet.open(folder, Cache(tmp_path / "cache"))
        assert (opened.layout, opened.num_classes) == ("insightface", len(counts))
        assert opened.labels.tolist() == np.repeat(np.arange(len(counts)), counts).tolist()
        images = [bytes(opened.image(sample)[1]) for sample in range(opened.num_samples)]
        assert images == [f"image {key}".encode() for key in range(1, sum(counts) + 1)]
        if indexed:
            path.unlink()
    write_index(path, built.index)
    assert path.read_bytes() == before
    assert rebuild(reader, images_only=True).index.offsets.tolist() == built.index.offsets[: sum(counts)].tolist()


@pytest.mark.parametrize("key_0_first", [False, True])
def test_a_cut_anywhere_behind_the_images(tmp_path: Path, key_0_first: bool) -> None:
    counts = [3, 0, 2, 0]
    folder = write_set(tmp_path / "set", insightface_records(counts, key_0_first=key_0_first), classes=4)
    rec, index = folder / "train.rec", read_index(*_open(folder))
    content, first = rec.read_bytes(), int(index.offsets[sum(counts)])
    for size in range(len(content) - 1, first, -1):
        os.truncate(rec, size)
        whole = size in index.offsets
        with pytest.raises(RecordError if whole else CutError, match=r"the file was cut: .* --images-only") as caught:
            rebuild(RecordReader(rec))
        if whole and key_0_first:
            headers = index.offsets.tolist().index(size) - sum(counts) - 1
            expected = "expected 4 identity headers behind the images, as key 0 at their start states"
            assert f"byte {first}: {expected}, found {headers} records" in str(caught.value)
        assert rebuild(RecordReader(rec), images_only=True).images == sum(counts)
    rec.write_bytes(content + content[int(index.offsets[-1]) :])  # a header, or key 0, too many
    with pytest.raises(RecordError, match="--images-only"):
        rebuild(RecordReader(rec))


def test_rebuilt_without_identity_headers(tmp_path: Path) -> None:
    records = [image_record(key, [key % 2, 0.5]) for key in range(4)]
    path, reader = _open(write_set(tmp_path, records, classes=2))
    before = path.read_bytes()
    write_index(path, rebuild(reader).index)
    assert path.read_bytes() == before


def test_cut_files(folder: Path) -> None:
    """A cut within a record, between records before key 0, and in the first record."""
    rec, index = folder / "train.rec", read_index(*_open(folder))
    os.truncate(rec, rec.stat().st_size - 4)
    with pytest.raises(CutError, match="python -m data index --images-only"):
        rebuild(RecordReader(rec))
    built = rebuild(RecordReader(rec), images_only=True)
    assert (built.images, built.cut) == (5, f"cut at byte {index.offsets[-1]} of {rec.stat().st_size}")
    os.truncate(rec, index.offsets[-1])
    with pytest.raises(RecordError, match=r"expected the record of key 0 with the range 6, 8 .*--images-only"):
        rebuild(RecordReader(rec))
    os.truncate(rec, index.offsets[2] + 8)
    assert rebuild(RecordReader(rec), images_only=True).index.keys.tolist() == [0, 1]
    os.truncate(rec, 6)
    with pytest.raises(RecordError, match="expected records, found cut at byte 0 of 6"):
        rebuild(RecordReader(rec), images_only=True)


def test_a_file_without_images(tmp_path: Path) -> None:
    _, reader = _open(write_set(tmp_path, [image_record(1, [1, 1], b""), image_record(0, [1, 2], b"")], classes=1))
    for images_only in (False, True):
        with pytest.raises(RecordError, match="byte 0: expected images, found identity headers only"):
            rebuild(reader, images_only=images_only)


def test_records_without_headers_are_no_images(tmp_path: Path) -> None:
    _, reader = _open(write_set(tmp_path, [(0, b"short"), (1, b"")], classes=1))
    with pytest.raises(RecordError, match="byte 0: expected a header of 24 bytes, found a payload of 5"):
        rebuild(reader)


@pytest.mark.parametrize("images", [5, EXACT - 1, EXACT, EXACT + 1, EXACT + 2, 42_474_557])
def test_identity_headers_are_found_where_float32_rounds(tmp_path: Path, images: int) -> None:
    """Keys above 2^24: key 0 says 42,474,560 where the headers start at 42,474,558; the true key is found."""
    headers = 9
    start, end = images + 1, images + 1 + headers
    write_set(tmp_path, [image_record(1, [0]), image_record(2, [1, 2], b"")], classes=1)
    image, header = read_index(*_open(tmp_path)).offsets.tolist()
    by_key = np.full(end, image, np.int64)  # one image stands for all, one header for all: only their kind counts
    by_key[start:] = header
    by_key[0] = header
    stated = (float(np.float32(start)), float(np.float32(end)))
    assert images != 42_474_557 or stated[0] == 42_474_560
    reader = RecordReader(tmp_path / "train.rec")
    assert find_identities(reader, by_key[1:], stated) == start
    for wrong in ((stated[0] - 8, stated[1]), (stated[0], stated[1] + 8), (stated[1], stated[1]), (0.0, stated[1])):
        with pytest.raises(HeaderError, match="key 0 states"):
            find_identities(reader, by_key[1:], wrong)


def test_an_index_appears_whole_or_not_at_all(folder: Path) -> None:
    before = (folder / "train.idx").read_bytes()
    bad = Index(np.arange(3), np.arange(2))  # ends with an error after two lines
    with pytest.raises(ValueError, match="zip"):
        write_index(folder / "train.idx", bad)
    assert (folder / "train.idx").read_bytes() == before
    assert sorted(os.listdir(folder)) == ["property", "train.idx", "train.rec"]
    with pytest.raises(DataError, match="cannot write it"):
        write_index(folder / "train.rec" / "train.idx", bad)
