"""What `pack`, `bin` and `index` do, apart from their arguments."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console

from data.commands.arguments import progress_on, shown
from data.commands.plans import HeldOut, Training, stamp_of
from data.errors import DataError
from data.making.pack import Encoder, encode_all
from data.making.partial import IDX, REC, PartialSet
from data.making.rewrite import SIDE_FILES
from data.making.sources import IMAGE_SIZE
from data.rec.header import EXACT
from data.rec.index import rebuild, write_index
from data.rec.properties import Properties
from data.rec.recordio import RecordReader
from data.verification_bin import write_bin

_SET = (REC, "property", *SIDE_FILES, "verification.bin", IDX)
"""What may be in the folder of a set and is of it."""


_ADVICE = (
    "repair it in place, or leave such images out with --skip-bad, and pack goes on from here; once an image is added "
    "or removed, or a list, tar or parquet file edited, it begins anew"
)


class Options(NamedTuple):
    """workers: processes; force: replace a set that is there; skip_bad: name images that do not decode and go on."""

    workers: int
    force: bool
    skip_bad: bool = False


def pack_set(out: Path, training: Training, held_out: HeldOut | None, options: Options, console: Console) -> None:
    """Write a training set, and a verification set of the held-out identities; all appear at the end or none.

    Goes on where the same pack was stopped. Raises DataError when there is a set already (without `force`), or
    anything cannot be read or written.
    """
    texts = {"property": _properties(training), **training.texts}
    others = ["verification.bin"] if held_out is not None else []
    names = [REC, *texts, *others, IDX]

    def say(text: str, style: str = "") -> None:
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def on_bad(error: DataError) -> None:
        if not options.skip_bad:
            raise DataError(f"{error} ({_ADVICE})")
        say(f"left out: {error}", "yellow")

    with PartialSet(out, names, _SET, force=options.force) as partial:
        try:
            partial.resume(stamp_of(training, held_out), len(training.wanted), skip_bad=options.skip_bad)
            if partial.note:
                say(partial.note)
            if not partial.finished:
                for name, text in texts.items():
                    partial.path(name).write_text(text, encoding="utf-8")
                if training.prepare is not None:
                    deque(shown(training.prepare(say), "images set aside", len(training.wanted), console), maxlen=0)
                sources = [training.source] if held_out is None else [training.source, held_out.source]
                with Encoder(options.workers, *sources) as encoder:
                    images = encoder.encode(training.source, training.wanted[partial.done :])
                    told = shown(images, "training images", len(training.wanted) - partial.done, console)
                    partial.write_records(told, training.labels, training.num_classes, on_bad)
                    if held_out is not None:
                        _write_pairs(partial.path("verification.bin"), encoder, held_out, console)
                for source in sources:
                    source.check()
            partial.appear()
        except KeyboardInterrupt:
            if partial.resumable:
                raise KeyboardInterrupt("the same command goes on from there") from None
            raise
    left_out = f", {len(partial.left_out)} left out" if partial.left_out else ""
    count, size_mb = len(training.wanted) - len(partial.left_out), (out / REC).stat().st_size / 1e6
    print(f"{out}: {count} images of {training.num_classes} identities, {size_mb:.1f} MB{left_out}")
    if held_out is not None:
        print(f"{out / 'verification.bin'}: {len(held_out.pairs.same)} pairs of {held_out.identities} others")


def write_bin_of(out: Path, held_out: HeldOut, options: Options, console: Console) -> None:
    """Write a verification set. Raises DataError."""
    if out.exists() and not options.force:
        raise DataError(f"{out}: expected no file there: name another, or replace it with --force")
    with Encoder(options.workers, held_out.source) as encoder:
        _write_pairs(out, encoder, held_out, console)
    print(f"{out}: {len(held_out.pairs.same)} pairs of {held_out.identities} identities")


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


def _properties(training: Training) -> str:
    size, pair = (IMAGE_SIZE, IMAGE_SIZE), training.num_classes > EXACT
    return Properties(num_classes=training.num_classes, image_size=size, pair=pair).text()


def _write_pairs(path: Path, encoder: Encoder, held_out: HeldOut, console: Console) -> None:
    # An image may be in several pairs: encoded once.
    rows = held_out.pairs.images.reshape(2 * len(held_out.pairs.same), -1)
    wanted, place = np.unique(rows, axis=0, return_inverse=True)
    images = encode_all(encoder, held_out.source, wanted)
    encoded = list(shown(images, "verification images", len(wanted), console))
    write_bin(path, [encoded[at] for at in place.ravel()], held_out.pairs.same)
