"""What `pack`, `bin` and `index` do, apart from their arguments."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console

from data.commands.arguments import progress_on, shown
from data.errors import DataError
from data.files import appearing
from data.header import EXACT
from data.index import rebuild, write_index
from data.pack import Encoder, Rows, encode_all, every_image, labelled, write_records
from data.pairs import Pairs, draw_pairs
from data.properties import Properties
from data.recordio import RecordReader
from data.rewrite import SIDE_FILES
from data.sources import IMAGE_SIZE, FolderSource, Source, SyntheticSource
from data.synthetic import plan_samples
from data.verification_bin import write_bin

_SET = ("train.rec", "property", *SIDE_FILES, "verification.bin", "train.idx")
"""Files of a set in the order they appear; the index last, as whoever looks for a set looks for it."""


class Training(NamedTuple):
    """What to pack: rows (identity, image number) of a source, sorted by their labels; names: of the classes."""

    source: Source
    wanted: Rows
    labels: Rows
    num_classes: int
    names: tuple[str, ...] = ()


class HeldOut(NamedTuple):
    """Identities that are not trained on, and the pairs of them to verify with."""

    source: Source
    pairs: Pairs


class Options(NamedTuple):
    """workers: processes; force: replace a set that is there; skip_bad: name images that do not decode and go on."""

    workers: int
    force: bool
    skip_bad: bool = False


def synthetic_set(
    *,
    identities: int,
    images_per_identity: int,
    seed: int,
    label_noise: float,
    long_tail: float,
    difficulty_spread: float,
    verification_identities: int,
    pairs: int,
) -> tuple[Training, HeldOut | None]:
    """A plan of synthetic faces; the held-out identities follow those of the training set. Raises DataError."""
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

    source = persons(identities, 0)
    training = Training(source, plan[:, :2], plan[:, 2], identities)
    if not verification_identities:
        return training, None
    others = persons(verification_identities, identities)
    return training, HeldOut(others, draw_pairs(others.images, pairs, seed=seed))


def folder_set(folder: Path, *, seed: int, verification_identities: int, pairs: int) -> tuple[Training, HeldOut | None]:
    """A folder of images: classes in sorted order of the subfolders, less those held out by the seed.

    Raises DataError when the folder has no such images, or too few.
    """
    found = FolderSource.find(folder)
    total = len(found.names)
    if verification_identities >= total:
        raise DataError(
            f"--verification-identities: expected fewer than the {total} of {folder}, got {verification_identities}"
        )
    drawn = np.random.default_rng([seed, 0x73706C6974]).permutation(total)  # "split": a stream apart from the pairs'
    held_out = sorted(drawn[:verification_identities].tolist())
    train = found.select(sorted(drawn[verification_identities:].tolist()))
    wanted = every_image(train.images)
    training = Training(train, wanted, wanted[:, 0], len(train.names), train.names)
    if not held_out:
        return training, None
    others = found.select(held_out)
    return training, HeldOut(others, draw_pairs(others.images, pairs, seed=seed))


def pack_set(out: Path, training: Training, held_out: HeldOut | None, options: Options, console: Console) -> None:
    """Write a training set, and a verification set of the held-out identities; all appear at the end or none.

    Raises DataError when there is a set already (without `force`), or anything cannot be read or written.
    """
    there = [name for name in _SET if (out / name).exists()]
    if there and not options.force:
        raise DataError(
            f"{out}: expected no set there, found {there[0]}: name another folder, or replace it with --force"
        )
    names = [name for name in _SET if _has(name, training, held_out)]
    bad: list[DataError] = []

    def on_bad(error: DataError) -> None:
        if not options.skip_bad:
            raise DataError(f"{error} (repair or remove it, or leave such images out with --skip-bad)")
        bad.append(error)
        console.print(f"left out: {error}", style="yellow", markup=False, highlight=False)

    sources = [training.source] if held_out is None else [training.source, held_out.source]
    with appearing([out / name for name in names]) as partial, Encoder(options.workers, *sources) as encoder:
        to = dict(zip(names, partial, strict=True))
        size = (IMAGE_SIZE, IMAGE_SIZE)
        properties = Properties(num_classes=training.num_classes, image_size=size, pair=training.num_classes > EXACT)
        to["property"].write_text(properties.text(), encoding="ascii")
        if training.names:
            to["identities.txt"].write_text("".join(f"{name}\n" for name in training.names), encoding="utf-8")
        images = labelled(encoder, training.source, training.wanted, training.labels, on_bad)
        told = shown(images, "training images", len(training.wanted), console)
        count = write_records(to["train.rec"], to["train.idx"], told, num_classes=training.num_classes)
        if not count:
            raise DataError(f"{out}: no image to pack: all {len(bad)} were left out")
        size_mb = to["train.rec"].stat().st_size / 1e6
        if held_out is not None:
            _write_pairs(to["verification.bin"], encoder, held_out, console)
    for name in set(there) - set(names):
        (out / name).unlink(missing_ok=True)  # of the set that was replaced
    left_out = f", {len(bad)} left out" if bad else ""
    print(f"{out}: {count} images of {training.num_classes} identities, {size_mb:.1f} MB{left_out}")
    if held_out is not None:
        print(f"{out / 'verification.bin'}: {len(held_out.pairs.same)} pairs of {len(held_out.source.images)} others")


def bin_of_folder(folder: Path, out: Path, *, pairs: int, seed: int, options: Options, console: Console) -> None:
    """Write a verification set with pairs of all identities of a folder. Raises DataError."""
    if out.exists() and not options.force:
        raise DataError(f"{out}: expected no file there: name another, or replace it with --force")
    source = FolderSource.find(folder)
    held_out = HeldOut(source, draw_pairs(source.images, pairs, seed=seed))
    with Encoder(options.workers, source) as encoder:
        _write_pairs(out, encoder, held_out, console)
    print(f"{out}: {pairs} pairs of {len(source.names)} identities")


def rebuild_index(rec: Path, *, images_only: bool, console: Console) -> None:
    """Write the index of a record file beside it, from a scan. Raises DataError."""
    reader = RecordReader(rec)
    with progress_on(console) as progress:
        task = progress.add_task("bytes", total=reader.size)
        built = rebuild(
            reader, images_only=images_only, progress=lambda offset: progress.update(task, completed=offset)
        )
    path = rec.with_suffix(".idx")
    write_index(path, built.index)
    cut = f"; the record file is {built.cut}" if built.cut else ""
    print(f"{path}: {built.images} images, {built.identities} identity headers{cut}")


def _has(name: str, training: Training, held_out: HeldOut | None) -> bool:
    sometimes = dict.fromkeys(SIDE_FILES, False)
    sometimes |= {"identities.txt": bool(training.names), "verification.bin": held_out is not None}
    return sometimes.get(name, True)


def _write_pairs(path: Path, encoder: Encoder, held_out: HeldOut, console: Console) -> None:
    # An image may be in several pairs: encoded once.
    wanted, place = np.unique(held_out.pairs.images.reshape(-1, 2), axis=0, return_inverse=True)
    images = encode_all(encoder, held_out.source, wanted)
    encoded = list(shown(images, "verification images", len(wanted), console))
    write_bin(path, [encoded[at] for at in place.ravel()], held_out.pairs.same)
