"""Records as they are written: labels ascend, as pairs where float32 cannot hold them; and behind what is there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data.errors import DataError
from data.making.pack import SetWriter, write_records
from data.rec.header import EXACT, Header, unpack
from data.rec.recordio import RecordReader, RecordWriter


def test_labels_are_ascending_and_pairs_above_float32(tmp_path: Path) -> None:
    paths = tmp_path / "a.rec", tmp_path / "a.idx"
    for labels in ([1, 0], [0, 2], [-1, 0]):
        with pytest.raises(DataError, match="expected labels ascending"):
            write_records(*paths, [(label, b"image") for label in labels], num_classes=2)
    assert write_records(*paths, [], num_classes=2) == 0

    class EnoughError(Exception):
        """To end before 2^24 identity headers are written."""

    def images() -> object:
        yield EXACT + 1, b"image"
        raise EnoughError

    with pytest.raises(EnoughError):
        write_records(*paths, images(), num_classes=EXACT + 2)  # type: ignore[arg-type]
    header, image = unpack(RecordReader(paths[0]).read_at(0))
    assert (header, bytes(image)) == (Header(2, (1.0, 1.0), 1, 0), b"image")


def test_going_on_behind_images_that_are_there(tmp_path: Path) -> None:
    images = [(label, b"image %d" % number) for number, label in enumerate([0, 0, 2, 2, 3])]
    write_records(tmp_path / "a.rec", tmp_path / "a.idx", images, num_classes=5)
    for begun in range(6):
        paths = tmp_path / f"{begun}.rec", tmp_path / f"{begun}.idx"
        counts = np.bincount([label for label, _ in images[:begun]], minlength=5)
        with RecordWriter(paths[0]) as writer, paths[1].open("w") as index:
            first = SetWriter(writer, index, 5)
            for label, image in images[:begun]:
                first.write(label, image)
            second = SetWriter(writer, index, 5, counts)
            for label, image in images[begun:]:
                second.write(label, image)
            second.write_headers()
        assert second.count == 5
        assert paths[0].read_bytes() == (tmp_path / "a.rec").read_bytes()
        assert paths[1].read_bytes() == (tmp_path / "a.idx").read_bytes()
