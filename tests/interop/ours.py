"""What we write: mxnet reads it, record by record and through its own data sets and iterators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from data.loading.decode import decode_image
from data.making.pack import write_sequence
from data.rec.header import EXACT
from data.rec.properties import Properties
from data.rec.records import RecordSet
from data.verification_bin import read_bin
from tests.image_cases import jpeg
from tests.interop.shared import Mxnet, ask, run_data, same_to_both, samples
from tests.mxnet_cases import sha256

_LEVELS = 3
"""Grey levels by which pixels of two JPEG decoders may differ."""


def a_packed_set(folder: Path, mxnet: Mxnet) -> str:
    pack = ("pack", "synthetic", "--identities", 12, "--images-per-identity", 5, "--label-noise", 0.1)
    run_data(*pack, "--verification-identities", 6, "--pairs", 20, "--workers", 2, "--out", folder / "set")
    assert RecordSet.open(folder / "set").num_samples == 60
    return _by_identities(folder / "set", mxnet)


def its_verification_set(folder: Path, mxnet: Mxnet) -> str:
    path = folder / "set" / "verification.bin"
    theirs, ours = ask(mxnet, "bin", path), read_bin(path)
    assert theirs == {"images": [sha256(i) for i in ours.images], "same": ours.same.tolist(), "kinds": ["bytes"]}
    return f"plain unpickling gives the {len(ours.same)} pairs that we read"


def it_shuffled(folder: Path, mxnet: Mxnet) -> str:
    run_data("shuffle", folder / "set", "--out", folder / "shuffled", "--seed", 3)
    assert sorted(samples(RecordSet.open(folder / "shuffled"))) == sorted(samples(RecordSet.open(folder / "set")))
    return (
        f"{same_to_both(folder / 'shuffled' / 'train.rec', 'images', mxnet)}; {_iterated(folder / 'shuffled', mxnet)}"
    )


def it_split_and_merged(folder: Path, mxnet: Mxnet) -> str:
    run_data("split", folder / "set", "--out", folder / "part", "--rest", folder / "rest", "--share", 0.3)
    run_data("merge", folder / "part", folder / "rest", folder / "set", "--out", folder / "merged")
    assert RecordSet.open(folder / "merged").num_samples == 120
    return "; ".join(f"{name}: {_by_identities(folder / name, mxnet)}" for name in ("part", "rest", "merged"))


def more_classes_than_float32_counts(folder: Path, mxnet: Mxnet) -> str:
    """Labels as pairs: mxnet sees two floats, from which the class is had exactly."""
    classes = 2 * EXACT + 12_345
    drawn = np.random.default_rng(0).integers(EXACT, classes, 36).tolist()
    labels = [0, 1, EXACT - 1, EXACT, EXACT + 1, *drawn, classes - 1]
    to = folder / "large"
    to.mkdir()
    images = ((label, jpeg(number)) for number, label in enumerate(labels))
    write_sequence(to / "train.rec", to / "train.idx", images, num_classes=classes)
    properties = Properties(num_classes=classes, image_size=(112, 112), pair=True)
    (to / "property").write_text(properties.text())
    assert RecordSet.open(to).labels.tolist() == labels
    return f"{same_to_both(to / 'train.rec', 'images', mxnet)}; {_iterated(to, mxnet, width=2)}"


def _by_identities(folder: Path, mxnet: Mxnet) -> str:
    """As insightface's iterators go through a set: by key 0 and the ranges of the identity headers."""
    told = same_to_both(folder / "train.rec", "images", mxnet)
    records = RecordSet.open(folder)
    assert records.layout == "insightface"
    walked = ask(mxnet, "identities", folder / "train.rec", folder / "train.idx")
    assert [(int(labels[0]), image) for labels, image in walked["images"]] == samples(records)
    by_range = [label for label, (begin, end) in enumerate(walked["ranges"]) for _ in range(begin, end)]
    assert len(walked["ranges"]) == records.num_classes
    assert by_range == records.labels.tolist()
    return f"{told}, and by key 0 {records.num_samples} images of {records.num_classes} identities"


def _iterated(folder: Path, mxnet: Mxnet, *, width: int = 1) -> str:
    """Labels and pixels as mxnet's data set and iterators give them."""
    records = RecordSet.open(folder)
    names = ask(mxnet, "iterate", folder / "train.rec", folder / "train.idx", width, folder / "pixels.npz")
    pixels = np.stack([decode_image(records.image(n)[1], records.image_size) for n in range(records.num_samples)])
    worst = 0
    with np.load(folder / "pixels.npz") as seen:
        for name in names:
            label_NW = seen[f"{name} labels"].astype(np.int64).reshape(-1, width)
            label_N = label_NW[:, 0] if width == 1 else label_NW[:, 0] * EXACT + label_NW[:, 1]
            np.testing.assert_array_equal(label_N, records.labels, name)
            worst = max(worst, int(np.abs(seen[f"{name} pixels"].astype(int) - pixels).max()))
    assert worst <= _LEVELS, f"pixels {worst} grey levels apart"
    return f"through {', '.join(names)} too, pixels at most {worst} grey levels apart"


CHECKS: Sequence[Callable[[Path, Mxnet], str]] = (
    a_packed_set,
    its_verification_set,
    it_shuffled,
    it_split_and_merged,
    more_classes_than_float32_counts,
)
