"""Record sets: each layout gives the same samples; whatever disagrees is said in one line before training."""

from __future__ import annotations

import pickle
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import DataError
from data.rec.header import EXACT, Header, class_labels, pack
from data.rec.heads import read_heads
from data.rec.index import Index, read_index, rebuild, write_index
from data.rec.properties import Properties, read_properties
from data.rec.recordio import MAGIC_BYTES, RecordError, RecordReader
from data.rec.records import RecordSet
from tests.record_files import image_record, insightface_records, write_set

COUNTS = [3, 0, 2, 4]
LABELS = [0, 0, 0, 2, 2, 3, 3, 3, 3]


def _check(records: RecordSet) -> None:
    assert (records.num_samples, records.num_classes, records.image_size) == (9, 4, (112, 112))
    assert records.labels.dtype == np.int64
    assert records.labels.tolist() == LABELS
    for sample, label in enumerate(LABELS):
        found, image = records.image(sample)
        assert (found, bytes(image)) == (label, f"image {sample + 1}".encode())


def _fails(folder: Path, *parts: str) -> None:
    with pytest.raises(DataError) as caught:
        RecordSet.open(folder)
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_insightface_layout(tmp_path: Path) -> None:
    records = RecordSet.open(write_set(tmp_path, insightface_records(COUNTS), classes=4))
    assert records.layout == "insightface"
    _check(records)
    _check(pickle.loads(pickle.dumps(records)))
    for sample in (-1, 9):
        with pytest.raises(IndexError, match="expected 0 to 8"):
            records.image(sample)


def test_images_only_index_of_the_same_file(tmp_path: Path) -> None:
    folder = write_set(tmp_path, insightface_records(COUNTS), classes=4)
    built = rebuild(RecordReader(folder / "train.rec"), images_only=True)
    write_index(folder / "train.idx", built.index)
    records = RecordSet.open(folder)
    assert records.layout == "sequential"
    _check(records)


@pytest.mark.parametrize("first_key", [0, 1, 7])
@pytest.mark.parametrize("landmarks", [[], [0.5, float("nan")]])
def test_sequential_layout(tmp_path: Path, first_key: int, landmarks: list[float]) -> None:
    images = [
        image_record(first_key + n, [label, *landmarks], f"image {n + 1}".encode()) for n, label in enumerate(LABELS)
    ]
    records = RecordSet.open(write_set(tmp_path, images, classes=4))
    assert records.layout == "sequential"
    _check(records)


def test_records_moved_within_the_file(tmp_path: Path) -> None:
    """A shuffled file: samples are in file order, classes still those of the keys' ranges."""
    records = insightface_records(COUNTS)
    order = np.random.default_rng(0).permutation(len(records))
    opened = RecordSet.open(write_set(tmp_path, [records[i] for i in order], classes=4))
    keys = [records[i][0] for i in order if 1 <= records[i][0] <= 9]
    assert opened.labels.tolist() == [LABELS[key - 1] for key in keys]
    assert [bytes(opened.image(n)[1]) for n in range(9)] == [f"image {key}".encode() for key in keys]


def test_identity_headers_in_another_order_than_the_classes(tmp_path: Path) -> None:
    """Ranges number identities by their place; where the images say other classes, the images are right."""
    swapped = [image_record(n + 1, [[1, 0][n // 2]]) for n in range(4)]
    headers = [image_record(5, [1, 3], b""), image_record(6, [3, 5], b""), image_record(0, [5, 7], b"")]
    records = RecordSet.open(write_set(tmp_path, swapped + headers, classes=2))
    assert records.labels.tolist() == [1, 1, 0, 0]
    assert records.image(0)[0] == 1


def test_labels_above_float32_are_pairs(tmp_path: Path) -> None:
    classes = EXACT + 3
    numbers = [5, EXACT - 1, EXACT, EXACT + 1, EXACT + 2]
    images = [image_record(n, class_labels(number, pair=True)) for n, number in enumerate(numbers)]
    properties = Properties(num_classes=classes, image_size=(112, 112), pair=True)
    folder = write_set(tmp_path, images, classes=classes, extra="labels,hi,lo\n")
    assert (folder / "property").read_text() == properties.text()
    assert read_properties(folder / "property") == properties
    records = RecordSet.open(folder)
    assert records.labels.tolist() == numbers
    assert [records.image(n)[0] for n in range(5)] == numbers
    (folder / "property").write_text(f"{classes},112,112\n")
    _fails(folder, "property", f"{classes} classes with single labels", "pack the set again")


def test_images_whose_keys_float32_does_not_count_are_read_by_their_own_headers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if float32 were exact to 8 only: ranges say nothing from key 8 on, here wrong ones on purpose."""
    records = insightface_records(COUNTS)
    records[12] = image_record(13, [6, 9], b"")  # in truth 6 … 10
    folder = write_set(tmp_path, records, classes=4)
    _fails(folder, "byte", "expected an identity header with the keys from 6 on, all of them to 9", "--images-only")
    monkeypatch.setattr("data.rec.layout.EXACT", 8)
    _check(RecordSet.open(folder))
    records[8] = image_record(9, [2], b"image 9")
    opened = RecordSet.open(write_set(tmp_path, records, classes=4))
    assert opened.labels.tolist() == [*LABELS[:8], 2]
    records[12] = image_record(13, [6, 7], b"")
    _fails(write_set(tmp_path, records, classes=4), "keys from 6 on", "the labels 6, 7")


@pytest.mark.parametrize("name", ["train.rec", "property"])
def test_missing_files(tmp_path: Path, name: str) -> None:
    folder = write_set(tmp_path / "set", insightface_records(COUNTS), classes=4)
    (folder / name).unlink()
    _fails(folder, f"{name}: missing", {"property": "classes,height"}.get(name, ""))
    _fails(tmp_path / "nowhere", "nowhere/train.rec: missing")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "4",
        "4,112",
        "four,112,112",
        "4,112,112,3",
        "0,112,112",
        "4;112;112",
        "4,-112,112",
        "4,\x1f112,112",
        "9" * 5000 + ",112,112",
    ],
)
def test_property_that_says_something_else(tmp_path: Path, text: str) -> None:
    folder = write_set(tmp_path, insightface_records(COUNTS), classes=4)
    (folder / "property").write_text(text)
    _fails(folder, "property: expected a first line `classes,height,width`", repr(text)[:80])


@pytest.mark.parametrize("classes", [3, 5])
def test_wrong_class_count(tmp_path: Path, classes: int) -> None:
    _fails(
        write_set(tmp_path / "a", insightface_records(COUNTS), classes=classes), "property", f"{classes}", "4 identity"
    )
    images = [image_record(n, [label]) for n, label in enumerate(LABELS)]
    parts = ("byte", "a class number from 0 to 2", "label 3", "key 5") if classes == 3 else ("property", "5 against 4")
    _fails(write_set(tmp_path / "b", images, classes=classes), *parts)


@pytest.mark.parametrize("label", [4.0, 99.0, -1.0, 0.5, float("nan"), float("inf"), 1.0])
def test_a_label_that_is_none_of_the_set(tmp_path: Path, label: float) -> None:
    """Among few images it shows when the set is opened, in the middle of many when its image is read."""
    records = insightface_records(COUNTS)
    records[4] = image_record(5, [label])
    folder = write_set(tmp_path / "few", records, classes=4)
    if label == 1.0:  # a class, only not the one that the identity header says: then the images are right
        assert RecordSet.open(folder).labels.tolist() == [0, 0, 0, 2, 1, 3, 3, 3, 3]
    else:
        _fails(folder, "train.rec: byte", "expected a class number", "key 5", f"label {label:g}")

    records = insightface_records([2000, 2000])
    records[5] = image_record(6, [label])
    opened = RecordSet.open(write_set(tmp_path / "many", records, classes=2))
    assert opened.image(4)[0] == 0
    with pytest.raises(RecordError, match=rf"train\.rec: byte 200: expected .* label {label:g} in key 6"):
        opened.image(5)


def test_a_record_that_is_no_image(tmp_path: Path) -> None:
    for number, payload in enumerate([b"", b"short", pack(Header(0, (2.0,), 0, 0), b"")]):
        records = insightface_records(COUNTS)
        records[4] = (5, payload)
        _fails(write_set(tmp_path / f"a{number}", records, classes=4), "train.rec: byte", "key 5")
        images = [image_record(n, [label]) for n, label in enumerate(LABELS)]
        images[4] = (4, payload)
        expected = "expected an image" if number == 2 else "expected a header"
        _fails(write_set(tmp_path / f"b{number}", images, classes=4), "train.rec: byte 160", expected)


def test_cut_files(tmp_path: Path) -> None:
    folder = write_set(tmp_path, insightface_records(COUNTS), classes=4)
    rec = folder / "train.rec"
    index = read_index(folder / "train.idx", RecordReader(rec))
    content = rec.read_bytes()
    for size in range(4, len(content), 4):
        rec.write_bytes(content[:size])
        _fails(folder, "train.rec: byte", "python -m data index")
    # Cut between two records, with an index of what is left: key 0 is missed by name.
    for last in (10, 12):
        rec.write_bytes(content[: index.offsets[last + 1]])
        write_index(folder / "train.idx", Index(index.keys[: last + 1], index.offsets[: last + 1]))
        _fails(folder, "expected the record of key 0, found the end", "--images-only")


def test_index_that_lacks_records(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "a", insightface_records(COUNTS), classes=4)
    index = read_index(folder / "train.idx", RecordReader(folder / "train.rec"))
    for leave_out in (0, 4, 8, 9, 12):
        write_index(folder / "train.idx", Index(*(np.delete(column, leave_out) for column in index)))
        _fails(folder, "train.idx: expected ", "python -m data index")
    images = write_set(tmp_path / "b", [image_record(n, [label]) for n, label in enumerate(LABELS)], classes=4)
    index = read_index(images / "train.idx", RecordReader(images / "train.rec"))
    for leave_out in (0, 4, 8):
        write_index(images / "train.idx", Index(*(np.delete(column, leave_out) for column in index)))
        _fails(images, "expected an image that the index lists, found one that it lacks", "python -m data index")


def test_index_of_another_file(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "a", insightface_records(COUNTS), classes=4)
    for name, counts in (("shorter", [2, 0, 2, 3]), ("longer", [3, 9, 2, 4])):
        other = write_set(tmp_path / name, insightface_records(counts), classes=4)
        (folder / "train.idx").write_bytes((other / "train.idx").read_bytes())
        _fails(folder, "train", "python -m data index")
    index = read_index(folder / "train.idx", RecordReader(other / "train.rec"))
    write_index(folder / "train.idx", Index(index.keys + 5, index.offsets))
    _fails(folder, "train", "python -m data index")


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damage_raises_data_error_or_opens(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = write_set(tmp_path_factory.getbasetemp() / "damaged_set", insightface_records(COUNTS), classes=4)
    name = data.draw(st.sampled_from(["train.rec", "train.idx", "property"]))
    content = bytearray((folder / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (folder / name).write_bytes(content)
    try:
        records = RecordSet.open(folder)
        samples = [records.image(sample) for sample in range(records.num_samples)]
    except DataError:
        return
    assert all(0 <= label < records.num_classes for label, _ in samples)


def test_heads_of_records_in_parts_and_many(tmp_path: Path) -> None:
    """A magic inside the header (id) or right behind it cuts the record where heads are read."""
    in_id = pack(Header(1, (3.0,), int.from_bytes(MAGIC_BYTES + b"\1\0\0\0", "little"), 0), b"image")
    behind = pack(Header(2, (3.0, 7.5), 0, 0), MAGIC_BYTES + b"image")
    folder = write_set(tmp_path, [(0, in_id), (1, behind), image_record(2, [2])], classes=4)
    reader = RecordReader(folder / "train.rec")
    offsets = read_index(folder / "train.idx", reader).offsets
    heads = read_heads(reader, np.append(np.full(1 << 20, offsets[2]), offsets))  # more than one chunk
    assert heads.flag[-3:].tolist() == [1, 2, 0]
    assert heads.image_bytes[-3:].tolist() == [5, 9, 5]
    np.testing.assert_array_equal(heads.labels[-3:], [[3, np.nan], [3, 7.5], [2, np.nan]])
    np.testing.assert_array_equal(heads.end[-3:], [*offsets[1:], reader.size])


def test_threads_read_at_once(tmp_path: Path) -> None:
    records = RecordSet.open(write_set(tmp_path, insightface_records([50, 50]), classes=2))
    wrong: list[int] = []

    def read() -> None:
        for sample in range(100):
            label, image = records.image(sample)
            if (label, bytes(image)) != (sample // 50, f"image {sample + 1}".encode()):
                wrong.append(sample)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    records.close()
