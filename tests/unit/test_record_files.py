"""Sets of several record files and without an index are opened as they are; what took long to find out is kept."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from data.errors import DataError
from data.rec import record_files
from data.rec.places import Folder
from data.rec.places import record_files as names_of_files
from data.rec.recordio import MAGIC_BYTES, RecordError
from data.rec.records import RecordSet
from data.stores.cache import Cache, default_folder
from tests.record_files import image_record, insightface_records, write_set

LABELS = [0, 2, 1, 1, 3, 0, 2]


def _parts(folder: Path, *, headers: bool = False) -> Path:
    """Seven images in train_1 (3), train_2 (1) and train_10 (3)."""
    for name, samples in (("train_1", (0, 1, 2)), ("train_2", (3,)), ("train_10", (4, 5, 6))):
        records = [image_record(key, [LABELS[n]], f"image {n}".encode()) for key, n in enumerate(samples, int(headers))]
        if headers:  # each file has those of its own images: a range for each image here
            count = len(samples)
            ranges = [image_record(count + 1 + n, [n + 1, n + 2], b"") for n in range(count)]
            records += [*ranges, image_record(0, [count + 1, 2 * count + 1], b"")]
        write_set(folder, records, classes=4)
        for kind in ("rec", "idx"):
            (folder / f"train.{kind}").rename(folder / f"{name}.{kind}")
    return folder


def _check(records: RecordSet) -> None:
    assert (records.num_samples, records.num_classes) == (7, 4)
    assert records.labels.tolist() == LABELS
    for sample, label in enumerate(LABELS):
        found, image = records.image(sample)
        assert (found, bytes(image)) == (label, f"image {sample}".encode())
    for outside in (-1, 7):
        with pytest.raises(IndexError, match="expected 0 to 6"):
            records.image(outside)


@pytest.mark.parametrize("headers", [False, True])
def test_several_files_are_one_set_in_the_order_of_their_numbers(tmp_path: Path, headers: bool) -> None:
    records = RecordSet.open(_parts(tmp_path, headers=headers))
    _check(records)
    _check(pickle.loads(pickle.dumps(records)))
    assert records.bytes == sum(path.stat().st_size for path in tmp_path.glob("*.rec"))
    (tmp_path / "train_2.idx").unlink()
    _check(RecordSet.open(tmp_path))
    (tmp_path / "property").write_text("5,112,112\n")
    with pytest.raises(DataError, match="found 5 against 4 classes, by the highest label"):
        RecordSet.open(tmp_path)


def test_damage_is_named_by_file_and_byte(tmp_path: Path) -> None:
    records = RecordSet.open(_parts(tmp_path))
    offset = 40  # of the second image
    with (tmp_path / "train_10.rec").open("r+b") as file:
        file.seek(offset)
        file.write(b"\0")
    with pytest.raises(RecordError, match=rf"train_10\.rec: byte {offset}: expected magic"):
        records.image(5)


def test_which_files_are_the_set(tmp_path: Path) -> None:
    place = Folder(tmp_path)
    for name in ("b.rec", "a_10.rec", "a_9.rec", ".hidden.rec", "b.idx"):
        (tmp_path / name).touch()
    assert names_of_files(place) == ["a_9.rec", "a_10.rec", "b.rec"]
    for name in ("train_b.rec", "train_a.rec"):
        (tmp_path / name).touch()
    assert names_of_files(place) == ["train_a.rec", "train_b.rec"]
    (tmp_path / "train.rec").touch()
    assert names_of_files(place) == ["train.rec"]
    with pytest.raises(DataError, match=r"nowhere/train\.rec: missing"):
        RecordSet.open(tmp_path / "nowhere")
    with pytest.raises(DataError, match="cannot read it"):
        RecordSet.open(tmp_path / "b.rec")


@pytest.mark.parametrize("layout", ["insightface", "sequential"])
def test_without_an_index_the_file_is_scanned_once(
    tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = [3, 0, 2]
    images = insightface_records(counts)
    folder = write_set(tmp_path / "set", images if layout == "insightface" else images[:5], classes=3)
    (folder / "train.idx").unlink()
    cache = Cache(tmp_path / "cache")
    records = RecordSet.open(folder, cache)
    assert (records.layout, records.labels.tolist()) == (layout, [0, 0, 0, 2, 2])

    def scanned(*_: object) -> None:
        raise AssertionError("it is scanned again")

    with monkeypatch.context() as patch:
        patch.setattr(record_files, "rebuild", scanned)
        again = RecordSet.open(folder, cache)
        assert again.layout == layout
        assert [bytes(again.image(n)[1]) for n in range(5)] == [b"image %d" % key for key in range(1, 6)]
        assert isinstance(again.labels.base, np.memmap) or again.labels.base is not None  # held once a host
        os.utime(folder / "train.rec", ns=(1, 1))  # a file of another time is another file
        with pytest.raises(AssertionError, match="scanned again"):
            RecordSet.open(folder, cache)
    with (folder / "train.rec").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(RecordError, match=r"the file was cut: .* --images-only"):
        RecordSet.open(folder, cache)


def test_labels_of_many_images_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [image_record(n, [n % 3]) for n in range(9)]
    folder, cache = write_set(tmp_path / "set", images, classes=3), Cache(tmp_path / "cache")
    RecordSet.open(folder, cache)
    assert not list(cache.folder.rglob("*.npy"))  # so few are faster read than kept
    monkeypatch.setattr(record_files, "_MANY", 8)
    RecordSet.open(folder, cache)
    kept = sorted(cache.folder.rglob("*.npy"))
    assert [path.name for path in kept] == ["keys.npy", "labels.npy", "offsets.npy"]
    wrong = np.load(kept[1])[::-1]
    np.save(kept[1], wrong)  # of another set, or damaged
    assert RecordSet.open(folder, cache).labels.tolist() == [n % 3 for n in range(9)]
    for content in (b"", b"garbage", kept[1].read_bytes()[:-8]):
        kept[1].write_bytes(content)
        assert RecordSet.open(folder, cache).labels.tolist() == [n % 3 for n in range(9)]


def test_a_cache_that_cannot_be_written_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_set(tmp_path / "set", [image_record(0, [0])], classes=1)
    (folder / "train.idx").unlink()
    (tmp_path / "cache").touch()
    assert RecordSet.open(folder, Cache(tmp_path / "cache")).num_samples == 1
    monkeypatch.setenv("CLUSTERFACE_CACHE", "/somewhere")
    assert default_folder() == Path("/somewhere")
    monkeypatch.delenv("CLUSTERFACE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/there")
    assert default_folder() == Path("/there/clusterface")


def test_images_of_several_samples_are_those_of_each(tmp_path: Path) -> None:
    plain = [image_record(n, [n % 3], f"image {n}".encode()) for n in range(9)]
    odd = [image_record(9, [0], b"image 9" + MAGIC_BYTES * 2), image_record(10, [1, 0.5], b"image 10")]
    for number, records in enumerate((plain, plain + odd)):
        opened = RecordSet.open(write_set(tmp_path / str(number), records, classes=3))
        samples = np.random.default_rng(0).integers(0, opened.num_samples, 40)
        labels, images = opened.image_batch(samples)
        assert labels.dtype == np.int64
        expected = [(label, bytes(image)) for label, image in map(opened.image, samples.tolist())]
        assert list(zip(labels.tolist(), map(bytes, images), strict=True)) == expected
        none, nothing = opened.image_batch(samples[:0])
        assert (len(none), nothing) == (0, [])
        opened.close()
    opened = RecordSet.open(write_set(tmp_path / "cut", plain, classes=3))
    with (tmp_path / "cut" / "train.rec").open("r+b") as file:
        file.seek(2 * 40 + 4)
        file.write((1 << 20).to_bytes(4, "little"))  # longer than the file
    with pytest.raises(RecordError, match=r"byte 80: expected .* bytes of payload"):
        opened.image_batch(np.array([0, 2]))
    in_parts = RecordSet.open(_parts(tmp_path / "parts"))
    labels, images = in_parts.image_batch(np.array([5, 0, 3]))
    assert (labels.tolist(), [bytes(image) for image in images]) == ([0, 0, 1], [b"image 5", b"image 0", b"image 3"])
