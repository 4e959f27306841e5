"""What mxnet and its im2rec.py write: we read it, and write the same bytes."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

from data.rec.index import read_index
from data.rec.recordio import MAGIC_BYTES, RecordReader, RecordWriter
from data.rec.records import RecordSet
from tests.image_cases import jpeg
from tests.interop.shared import Mxnet, ask, parts, run_data, same_to_both, samples
from tests.mxnet_cases import FIXTURE, MxnetSets

_MAKE = "tests/fixtures/mxnet/make_fixture.py"
_COUNTS = (7, 1, 4, 12, 2, 30)
"""Images of each identity."""


def random_payloads_are_read(folder: Path, mxnet: Mxnet) -> str:
    mxnet("tests/interop/mxnet_side.py", "write", str(folder))
    payloads = [bytes.fromhex(text) for text in json.loads((folder / "payloads.json").read_text())]
    reader = RecordReader(folder / "mx.rec")
    index = read_index(folder / "mx.idx", reader)
    assert index.keys.tolist() == list(range(len(payloads)))
    assert [bytes(reader.read_at(offset)) for offset in index.offsets.tolist()] == payloads
    with RecordWriter(folder / "ours.rec") as writer:
        offsets = [writer.write(payload) for payload in payloads]
    assert offsets == index.offsets.tolist()
    assert (folder / "ours.rec").read_bytes() == bytes(reader.view)
    (folder / "ours.idx").write_bytes((folder / "mx.idx").read_bytes())
    same_to_both(folder / "ours.rec", "raw", mxnet)
    return f"{len(payloads)} payloads, {parts(reader)} in parts; our file of them is the same, and mxnet reads it"


def _images() -> Iterator[tuple[int, bytes]]:
    """JPEG files by label, every third with magics somewhere behind its end."""
    rng, number = random.Random(2), 0
    for label, count in enumerate(_COUNTS):
        for _ in range(count):
            number += 1
            junk = b"".join(rng.choice([MAGIC_BYTES, b"a", b"xyz"]) for _ in range(rng.randrange(1, 9)))
            yield label, jpeg(number) + (junk if number % 3 == 0 else b"")


def every_layout_is_read_and_written_alike(folder: Path, mxnet: Mxnet) -> str:
    given = folder / "images.json"
    given.write_text(json.dumps([(label, image.hex()) for label, image in _images()]))
    mxnet(_MAKE, str(folder / "layouts"), str(given))
    sets = MxnetSets(folder / "layouts")
    for name in sets.expected:
        sets.check_payloads(name)
        sets.check_written_alike(name, folder / "alike" / name)
    for name in sets.with_images:
        sets.check_rebuilt(name, folder / "alike" / name)
    return ", ".join(sets.check_set(name, folder / "alike") for name in sets.with_images)


def im2rec_on_a_folder_of_photos(folder: Path, mxnet: Mxnet) -> str:
    """As its users run it: a list of the folder, shuffled, then records, untouched or encoded anew by two processes."""
    photos = folder / "photos"
    for number, (label, image) in enumerate(_images()):
        (photos / f"person {label}").mkdir(parents=True, exist_ok=True)
        (photos / f"person {label}" / f"{number:03}.jpg").write_bytes(image)
    run_data("pack", "folder", photos, "--out", folder / "ours", "--workers", 1)
    ours = sorted(samples(RecordSet.open(folder / "ours")))
    lines = []
    for name, more in (("untouched", ("--pass-through",)), ("encoded", ("--num-thread", "2"))):
        to = folder / name
        to.mkdir()
        ask(mxnet, "im2rec", to / "train", photos, *more)
        listed = [line.split("\t") for line in (to / "train.lst").read_text().splitlines()]
        (to / "property").write_text(f"{len(_COUNTS)},112,112\n")
        records = RecordSet.open(to)
        index = read_index(to / "train.idx", RecordReader(to / "train.rec"))
        assert index.keys.tolist() == [int(row[0]) for row in listed]
        assert records.labels.tolist() == [int(float(row[1])) for row in listed]
        found = samples(records)
        if name == "untouched":
            assert sorted(found) == ours, "our `pack folder` numbers and stores them alike"
        lines.append(f"{name}: {same_to_both(to / 'train.rec', 'images', mxnet)}")
    return "; ".join(lines)


def the_fixture_comes_out_again(folder: Path, mxnet: Mxnet) -> str:
    mxnet(_MAKE, str(folder / "fixture"))
    made = sorted(path.relative_to(folder / "fixture") for path in (folder / "fixture").rglob("*") if path.is_file())
    kept = sorted(path.relative_to(FIXTURE) for path in FIXTURE.rglob("*") if path.is_file() and path.suffix != ".py")
    assert made == kept
    for path in made:
        assert (folder / "fixture" / path).read_bytes() == (FIXTURE / path).read_bytes(), path
    return f"{len(made)} files"


CHECKS = (
    random_payloads_are_read,
    every_layout_is_read_and_written_alike,
    im2rec_on_a_folder_of_photos,
    the_fixture_comes_out_again,
)
