"""A new set out of images of others: chosen, labelled anew, in the order of the labels or any other.

The sets are only read, image by image and checked as in training; what is written appears whole or not at all.

Legend: N samples of all sets, one set behind the other; C classes of the new set.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data.errors import DataError
from data.files import appearing, refuse_existing
from data.making.pack import write_records, write_sequence
from data.rec.header import EXACT
from data.rec.properties import Properties
from data.rec.recordio import Where
from data.rec.records import RecordSet

Ints = npt.NDArray[np.int64]
LEFT_OUT = -1
_NAMES = "identities.txt"
SIDE_FILES = (_NAMES, "labels.csv", "findings.json", "hashes.json")
"""What may lie beside a set and is about it: it goes with it."""
_LAST = "train.idx"


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """What a new set is to hold."""

    sets: Sequence[RecordSet]
    label_N: Ints
    """New label of each sample, or LEFT_OUT."""
    num_classes: int
    names: Sequence[str] = ()
    """Of the new classes, or none."""

    @property
    def kept(self) -> int:
        return int(np.count_nonzero(self.label_N >= 0))

    def ordered(self) -> Ints:
        """Samples that stay, by their new labels, those of one label as before."""
        return np.argsort(self.label_N, kind="stable")[len(self.label_N) - self.kept :]

    def images(self, samples: Iterable[int]) -> Iterator[tuple[int, bytes]]:
        """(new label, encoded image) of each. Raises RecordError at a damaged record."""
        starts = np.cumsum([0, *(records.num_samples for records in self.sets)])
        for sample in samples:
            place = int(np.searchsorted(starts, sample, side="right")) - 1
            _, image = self.sets[place].image(int(sample - starts[place]))
            yield int(self.label_N[sample]), bytes(image)

    def origins(self) -> str:
        """CSV: which old labels each new one was made of, with the number of images."""
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(("label", "set", "old_label", "images"))
        places = np.repeat(np.arange(len(self.sets)), [records.num_samples for records in self.sets])
        old = np.concatenate([records.labels for records in self.sets])
        kept = self.label_N >= 0
        rows, counts = np.unique(np.stack([self.label_N, places, old])[:, kept], axis=1, return_counts=True)
        for (label, place, old_label), count in zip(rows.T.tolist(), counts.tolist(), strict=True):
            table.writerow((label, self.sets[place].address, old_label, count))
        return text.getvalue()


def choose(records: RecordSet, label_N: Ints) -> Selection:
    """Of one set: labels as they are to be grouped, any numbers from 0 on or LEFT_OUT, numbered anew in their order."""
    kept = label_N >= 0
    if not kept.any():
        raise DataError("nothing would be left: choose less strictly")
    used, new = np.unique(label_N[kept], return_inverse=True)
    renumbered_N = np.full(len(label_N), LEFT_OUT, np.int64)
    renumbered_N[kept] = new.ravel()
    names = names_of_set(records)
    picked = [names[label] for label in used.tolist()] if names else ()
    return Selection(sets=[records], label_N=renumbered_N, num_classes=len(used), names=picked)


def names_of_set(records: RecordSet) -> list[str]:
    """`names_of` its identities.txt."""
    return names_of(records.file(_NAMES).parent, records.num_classes) if records.has(_NAMES) else []


def names_of(folder: Path, num_classes: int) -> list[str]:
    """Lines of identities.txt, one a class; empty without that file. Raises DataError when the count is another."""
    path = folder / _NAMES
    if not path.is_file():
        return []
    try:
        names = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot read it ({error})") from None
    if len(names) != num_classes:
        raise DataError(f"{path}: expected a name for each of {num_classes} classes, found {len(names)}: correct it")
    return names


def write_set(
    out: Path,
    images: Iterable[tuple[int, bytes]],
    *,
    num_classes: int,
    image_size: tuple[int, int],
    texts: dict[str, str],
    force: bool,
    sequential: bool = False,
) -> int:
    """Write train.rec, train.idx, property and `texts` by their names; the number of images.

    images: (label, encoded image), labels ascending; with `sequential` in any order, and the file has no identity
    headers. force: replace a set that is there. Raises DataError.
    """
    names = ["train.rec", "property", *texts, _LAST]
    refuse_set(out, force=force)
    with appearing([out / name for name in names]) as partial:
        to = dict(zip(names, partial, strict=True))
        properties = Properties(num_classes=num_classes, image_size=image_size, pair=num_classes > EXACT)
        to["property"].write_text(properties.text(), encoding="ascii")
        for name, text in texts.items():
            to[name].write_text(text, encoding="utf-8")
        write = write_sequence if sequential else write_records
        count = write(to["train.rec"], to[_LAST], images, num_classes=num_classes)
        if not count:
            raise DataError(f"{out}: no image to write")
    for name in set(SIDE_FILES) - set(names):
        (out / name).unlink(missing_ok=True)  # of the set that was replaced
    return count


def refuse_source(out: Path, source: Where) -> None:
    """Raise DataError where what is read would be written over."""
    if isinstance(source, Path) and out.resolve() == source.resolve():
        raise DataError(f"{out}: expected another folder than {source}, which is only read")


def refuse_set(out: Path, *, force: bool) -> None:
    """Raise DataError where a set is, unless it may be replaced."""
    refuse_existing(out, ("train.rec", "property", _LAST, *SIDE_FILES), force=force)


def texts_of(selection: Selection) -> dict[str, str]:
    """labels.csv, which says what the new labels are made of, and the names where there are any."""
    return {"labels.csv": selection.origins(), **names_text(selection.names)}


def names_text(names: Sequence[str]) -> dict[str, str]:
    """identities.txt by its name; nothing where there are no names."""
    return {_NAMES: "".join(f"{name}\n" for name in names)} if names else {}
