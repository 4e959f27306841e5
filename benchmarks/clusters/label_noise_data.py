"""Synthetic faces with planted faults, and the truth about them: what `benchmarks.label_noise` looks for.

Legend: N stored images, L labels, Q pairs of labels or of samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import simplejpeg

from data.errors import DataError
from data.files import appearing
from data.loading.decode import decode_image
from data.making.pack import Encoder, write_records
from data.making.pairs import draw_pairs
from data.making.sources import IMAGE_SIZE, SyntheticSource
from data.rec.properties import Properties
from data.synthetic import DIFFICULTY_SPREAD
from data.verification_bin import write_bin

Ints = npt.NDArray[np.int64]

_RECODED_QUALITY = 75


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How much is planted. Numbers of images of a label are drawn evenly from `images` (both ends included)."""

    labels: int = 1000
    images: tuple[int, int] = (10, 20)
    flipped: float = 0.10
    """Share of the stored images that get the label of another person."""
    split: float = 0.05
    """Share of the labels that hold two persons; the smaller one has 30% to 50% of the images."""
    duplicate: float = 0.02
    """Share of the persons that appear under two labels, each with images of its own."""
    copied: float = 0.02
    """Share of the images that are stored twice, every other one encoded anew."""


class Planted(NamedTuple):
    """The truth. person_N, image_N: what a stored image shows. label_N: under which label it is stored.

    home_N: the label it belongs to; label_N differs from it where the label was flipped. copy_N: 0 for the first of an
    image, 1 for the same bytes again, 2 for the same picture encoded anew. split_L: bool, labels of two persons.
    twin_L: the other label of the same person, -1 for none. Rows ascend by label.
    """

    person_N: Ints
    image_N: Ints
    label_N: Ints
    home_N: Ints
    copy_N: Ints
    split_L: npt.NDArray[np.bool_]
    twin_L: Ints

    @property
    def persons(self) -> int:
        return int(self.person_N.max()) + 1


def plant(plan: Plan, seed: int) -> Planted:
    """Draw what is stored under which label; the same for the same arguments."""
    rng = np.random.default_rng([seed, 0x6E6F697365])  # "noise"
    labels = plan.labels
    order = rng.permutation(labels)
    splits, pairs = round(plan.split * labels), round(plan.duplicate * labels)
    split, twins = order[:splits], order[splits : splits + 2 * pairs].reshape(pairs, 2)
    twin_L = np.full(labels, -1)
    twin_L[twins[:, 0]], twin_L[twins[:, 1]] = twins[:, 1], twins[:, 0]
    person_L = np.arange(labels)
    person_L[twins[:, 1]] = twins[:, 0]
    _, person_L = np.unique(person_L, return_inverse=True)
    persons = int(person_L.max()) + 1

    counts = rng.integers(plan.images[0], plan.images[1] + 1, labels)
    home = np.repeat(np.arange(labels), counts)
    person = person_L[home]
    for number, label in enumerate(split):
        rows = np.flatnonzero(home == label)
        second = round(rng.uniform(0.3, 0.5) * len(rows))
        person[rows[:second]] = persons + number
    image = np.zeros(len(home), np.int64)
    for one in range(persons + splits):
        rows = np.flatnonzero(person == one)
        image[rows] = np.arange(len(rows))
    twice = np.sort(rng.permutation(len(home))[: round(plan.copied * len(home))])
    copy = np.concatenate([np.zeros(len(home), np.int64), 1 + np.arange(len(twice)) % 2])
    home, person, image = (np.concatenate([values, values[twice]]) for values in (home, person, image))

    label = home.copy()
    for row in rng.permutation(len(home))[: round(plan.flipped * len(home))]:
        own = home[row]
        others = [other for other in rng.integers(0, labels, 8) if other not in (own, twin_L[own])]
        label[row] = others[0]
    sort = np.argsort(label, kind="stable")
    is_split = np.zeros(labels, bool)
    is_split[split] = True
    return Planted(person[sort], image[sort], label[sort], home[sort], copy[sort], is_split, twin_L)


def pack_planted(folder: Path, plan: Plan, seed: int, *, held_out: int, pairs: int) -> Planted:
    """Write the set, the verification set of persons that are not in it.

    Nothing is drawn again when a set of the same arguments lies there. Raises DataError.
    """
    planted = plant(plan, seed)
    receipt, text = folder / "planted_by.txt", f"{asdict(plan)} seed {seed} held out {held_out} pairs {pairs}\n"
    if receipt.is_file() and receipt.read_text(encoding="utf-8") == text:
        return planted
    shown = int(planted.image_N.max()) + 1
    source = SyntheticSource(
        identities=planted.persons, images_per_identity=shown, seed=seed, difficulty_spread=DIFFICULTY_SPREAD
    )
    others = SyntheticSource(
        identities=held_out,
        images_per_identity=shown,
        seed=seed,
        first_identity=planted.persons,
        difficulty_spread=DIFFICULTY_SPREAD,
    )
    names = [folder / name for name in ("train.rec", "property", "verification.bin", "planted_by.txt", "train.idx")]
    with appearing(names) as (rec, properties, bin_, by, idx), Encoder(1, source, others) as encoder:
        size = (IMAGE_SIZE, IMAGE_SIZE)
        properties.write_text(Properties(num_classes=plan.labels, image_size=size).text(), encoding="ascii")
        write_records(rec, idx, _stored(planted, encoder, source), num_classes=plan.labels)
        drawn = draw_pairs(others.images, pairs, seed=seed)
        wanted, place = np.unique(drawn.images.reshape(-1, 2), axis=0, return_inverse=True)
        encoded = [_bytes(image) for image in encoder.encode(others, wanted)]
        write_bin(bin_, [encoded[at] for at in place.ravel()], drawn.same)
        by.write_text(text, encoding="utf-8")
    return planted


def _stored(planted: Planted, encoder: Encoder, source: SyntheticSource) -> Iterator[tuple[int, bytes]]:
    wanted = np.stack([planted.person_N, planted.image_N], axis=1)
    for label, copy, image in zip(
        planted.label_N.tolist(), planted.copy_N.tolist(), encoder.encode(source, wanted), strict=True
    ):
        encoded = _bytes(image)
        if copy == 2:
            pixels = decode_image(encoded, (IMAGE_SIZE, IMAGE_SIZE))
            encoded = bytes(simplejpeg.encode_jpeg(pixels, _RECODED_QUALITY, colorsubsampling="420"))
        yield label, encoded


def _bytes(image: bytes | DataError) -> bytes:
    if isinstance(image, DataError):
        raise image
    return image
