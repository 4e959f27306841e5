"""What holds for sets that genuine mxnet wrote: those of tests/fixtures/mxnet, and the ones `make interop` makes."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from data.__main__ import main
from data.making.pack import write_records, write_sequence
from data.rec.header import EXACT, unpack
from data.rec.index import Index, read_index, rebuild, write_index
from data.rec.recordio import HEAD, LENGTH_BITS, RecordReader, RecordWriter
from data.rec.records import RecordSet

FIXTURE = Path(__file__).parent / "fixtures" / "mxnet"
INSIGHTFACE = {"insightface", "face2rec2"}
"""Sets with identity headers."""
WRITERS: dict[str, Callable[..., int]] = {
    "insightface": write_records,
    "sequential": write_sequence,
    "no_index": write_sequence,
    "pairs": write_sequence,
}
"""Sets that we write ourselves, given the images."""


def sha256(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


class MxnetSets:
    """The folder with the sets, and `expected.json`: what mxnet's side knows to be in them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.expected: dict[str, dict[str, Any]] = json.loads((folder / "expected.json").read_text())

    @property
    def with_images(self) -> list[str]:
        return sorted(name for name, entry in self.expected.items() if "samples" in entry)

    def rows(self, name: str) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self.expected[name]["records"]
        return rows

    def reader(self, name: str) -> RecordReader:
        return RecordReader(self.folder / name / "train.rec")

    def records_in_parts(self, name: str) -> int:
        view = self.reader(name).view
        return sum(HEAD.unpack_from(view, row["offset"])[1] >> LENGTH_BITS != 0 for row in self.rows(name))

    def check_payloads(self, name: str) -> None:
        """Every record stands where mxnet put it, with the bytes that it was given, and the index says so."""
        reader, rows = self.reader(name), self.rows(name)
        assert [offset for offset, _ in reader.scan()] == [row["offset"] for row in rows]
        assert [sha256(reader.read_at(row["offset"])) for row in rows] == [row["sha256"] for row in rows]
        path = self.folder / name / "train.idx"
        if path.exists():
            index = read_index(path, reader)
            assert index.keys.tolist() == [row["key"] for row in rows]
            assert index.offsets.tolist() == [row["offset"] for row in rows]
        else:
            assert name == "no_index"

    def check_written_alike(self, name: str, to: Path) -> None:
        """Our writers make the same two files of the same records, and of the same images where the layout is ours."""
        to.mkdir(parents=True, exist_ok=True)
        reader, rows = self.reader(name), self.rows(name)
        with RecordWriter(to / "ours.rec") as writer:
            offsets = [writer.write(bytes(reader.read_at(row["offset"]))) for row in rows]
        write_index(to / "ours.idx", Index(np.array([row["key"] for row in rows]), np.array(offsets)))
        self._same_files(name, to, "ours")
        if name in WRITERS:
            images = [(label, bytes(image)) for label, image in self._images(self.folder / name, to)]
            classes = self.expected[name]["samples"][-1][0] + 1
            WRITERS[name](to / "packed.rec", to / "packed.idx", images, num_classes=classes)
            self._same_files(name, to, "packed")

    def check_rebuilt(self, name: str, to: Path) -> None:
        """A scan numbers the records as their builder did, where that is in file order."""
        reader = self.reader(name)
        if not name.startswith("im2rec"):
            to.mkdir(parents=True, exist_ok=True)
            write_index(to / "rebuilt.idx", rebuild(reader).index)
            assert (to / "rebuilt.idx").read_bytes() == self._idx(name).read_bytes()
        built = rebuild(reader, images_only=True)
        images = [unpack(reader.read_at(offset))[1] for offset in built.index.offsets.tolist()]
        assert [sha256(image) for image in images] == [image for _, image in self.expected[name]["samples"]]

    def check_set(self, name: str, to: Path) -> str:
        """Opened as a set, it has the labels and images that went in; a set without an index gets one by the command.

        Returns a line about it.
        """
        samples = self.expected[name]["samples"]
        records = RecordSet.open(self._with_index(self.folder / name, to))
        assert records.layout == ("insightface" if name in INSIGHTFACE else "sequential")
        assert (records.num_samples, records.image_size) == (len(samples), (112, 112))
        assert records.num_classes == max(label for label, _ in samples) + 1
        assert (records.num_classes > EXACT) == (name == "pairs")
        assert records.labels.tolist() == [label for label, _ in samples]
        found = [records.image(sample) for sample in range(len(samples))]
        assert [[label, sha256(image)] for label, image in found] == samples
        return f"{name} {len(samples)} images ({self.records_in_parts(name)} records in parts)"

    def _images(self, folder: Path, to: Path) -> list[tuple[int, memoryview]]:
        records = RecordSet.open(self._with_index(folder, to))
        return [records.image(sample) for sample in range(records.num_samples)]

    def _with_index(self, folder: Path, to: Path) -> Path:
        if (folder / "train.idx").exists():
            return folder
        copy = to / folder.name
        shutil.copytree(folder, copy, dirs_exist_ok=True)
        with contextlib.redirect_stdout(io.StringIO()):
            assert main(["index", str(copy / "train.rec")]) == 0
        return copy

    def _idx(self, name: str) -> Path:
        return self.folder / ("sequential" if name == "no_index" else name) / "train.idx"

    def _same_files(self, name: str, to: Path, stem: str) -> None:
        assert (to / f"{stem}.rec").read_bytes() == bytes(self.reader(name).view), f"{name}: {stem}.rec"
        assert (to / f"{stem}.idx").read_bytes() == self._idx(name).read_bytes(), f"{name}: {stem}.idx"
