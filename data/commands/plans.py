"""Which images `pack` takes, as which classes, in which order, and whom it holds back for verification."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import PIL

from data.commands.numbering import classes_of, origins_text
from data.errors import DataError
from data.making.pack import Rows, every_image
from data.making.pairs import Pairs, draw_pairs
from data.making.sources import FolderSource, Source, SyntheticSource
from data.synthetic import plan_samples

Say = Callable[[str], None]


class Training(NamedTuple):
    """What to pack: rows of a source, sorted by their labels. texts: files about the set, by their names.

    prepare: work that the source needs first, image by image, given a way to say something.
    """

    source: Source
    wanted: Rows
    labels: Rows
    num_classes: int
    texts: dict[str, str]
    prepare: Callable[[Say], Iterator[int]] | None = None


class HeldOut(NamedTuple):
    """Identities that are not trained on, how many, and the pairs of them to verify with, as rows of the source."""

    source: Source
    pairs: Pairs
    identities: int

    def at(self, rows: Rows) -> HeldOut:
        """With other rows for the numbers that its pairs are of."""
        return self._replace(pairs=Pairs(rows[self.pairs.images[..., 0]], self.pairs.same))


class Labelled(NamedTuple):
    """Images with a label each: rows (N, what the source goes by), labels (N,). where: for messages.

    names: of the classes, which then are numbered from 0 without gaps.
    """

    where: str
    source: Source
    rows: Rows
    labels: Rows
    names: Sequence[str] = ()


class Verification(NamedTuple):
    """identities: how many to hold back; pairs: of their images; seed: what both are drawn by."""

    identities: int
    pairs: int
    seed: int


Plan = tuple[Training, HeldOut | None]


def synthetic_set(
    *,
    identities: int,
    images_per_identity: int,
    label_noise: float,
    long_tail: float,
    difficulty_spread: float,
    verification: Verification,
) -> Plan:
    """A plan of synthetic faces; the held-out identities follow those of the training set. Raises DataError."""
    seed = verification.seed
    plan = plan_samples(
        identities=identities,
        images_per_identity=images_per_identity,
        long_tail=long_tail,
        label_noise=label_noise,
        seed=seed,
    )
    plan = plan[np.argsort(plan[:, 2], kind="stable")]

    def persons(count: int, first: int) -> SyntheticSource:
        return SyntheticSource(
            identities=count,
            images_per_identity=images_per_identity,
            seed=seed,
            first_identity=first,
            difficulty_spread=difficulty_spread,
        )

    training = Training(persons(identities, 0), plan[:, :2], plan[:, 2], identities, {})
    if not verification.identities:
        return training, None
    others = persons(verification.identities, identities)
    return training, HeldOut(others, draw_pairs(others.images, verification.pairs, seed=seed), verification.identities)


def folder_set(folder: Path, verification: Verification) -> Plan:
    """A folder of images: classes in sorted order of the subfolders, less those held out by the seed.

    Raises DataError when the folder has no such images, or too few.
    """
    found = FolderSource.find(folder)
    rows = every_image(found.images)
    return labelled_set(Labelled(str(folder), found, rows, rows[:, 0], found.names), verification)


def labelled_set(images: Labelled, verification: Verification, *, renumber: bool = False) -> Plan:
    """The classes of labelled images, less those held out by the seed, numbered anew where any is.

    Without names, `labels.csv` says what their numbers were, if it is another one. renumber: leave out the numbers
    without images. Raises DataError when labels are too few, or no numbers of classes.
    """
    used = np.unique(images.labels)
    if images.names:
        classes = np.arange(len(images.names))
    else:
        classes = classes_of(images.where, images.labels, renumber=renumber)
    held_out = _drawn(images.where, used, verification)
    classes = np.setdiff1d(classes, held_out, assume_unique=True)
    order = np.argsort(images.labels, kind="stable")
    order = order[~np.isin(images.labels[order], held_out)]
    labels = np.searchsorted(classes, images.labels[order])
    texts = {}
    if images.names:
        texts["identities.txt"] = "".join(f"{images.names[label]}\n" for label in classes.tolist())
    elif renumber or len(held_out):
        texts = origins_text(classes)
    training = Training(images.source, images.rows[order], labels, len(classes), texts)
    if not len(held_out):
        return training, None
    return training, _held_out(images, held_out, verification)


def bin_of_all(folder: Path, *, pairs: int, seed: int) -> HeldOut:
    """Pairs of all identities of a folder. Raises DataError."""
    source = FolderSource.find(folder)
    return HeldOut(source, draw_pairs(source.images, pairs, seed=seed), len(source.names))


def stamp_of(training: Training, held_out: HeldOut | None) -> str:
    """What decides the bytes of a set but the content of the images: two jobs of one stamp are the same."""
    digest = hashlib.sha256(f"{PIL.__version__} {cv2.__version__} {np.__version__} {training.num_classes}".encode())

    def add(content: bytes) -> None:
        digest.update(b"%d " % len(content) + content)

    others = held_out.source.listing() if held_out is not None and held_out.source is not training.source else ()
    for text in chain(training.source.listing(), others, *sorted(training.texts.items())):
        add(text.encode("utf-8", "surrogateescape"))
    for rows in (training.wanted, training.labels, *([] if held_out is None else [held_out.pairs.images])):
        add(repr(rows.shape).encode())
        digest.update(np.ascontiguousarray(rows).data)
    return digest.hexdigest()


def _drawn(where: str, used: Rows, verification: Verification) -> Rows:
    """Labels held out, sorted."""
    if verification.identities >= len(used):
        raise DataError(
            f"--verification-identities: expected fewer than the {len(used)} of {where}, got {verification.identities}"
        )
    rng = np.random.default_rng([verification.seed, 0x73706C6974])  # "split": a stream apart from the pairs'
    return np.sort(used[rng.permutation(len(used))[: verification.identities]])


def _held_out(images: Labelled, held_out: Rows, verification: Verification) -> HeldOut:
    of_them = np.flatnonzero(np.isin(images.labels, held_out))
    of_them = of_them[np.argsort(images.labels[of_them], kind="stable")]
    identity = np.searchsorted(held_out, images.labels[of_them])
    counts = np.bincount(identity, minlength=len(held_out))
    drawn = draw_pairs(counts.tolist(), verification.pairs, seed=verification.seed)
    starts = np.cumsum([0, *counts[:-1].tolist()])
    rows = images.rows[of_them[starts[drawn.images[..., 0]] + drawn.images[..., 1]]]
    return HeldOut(images.source, Pairs(rows, drawn.same), len(held_out))
