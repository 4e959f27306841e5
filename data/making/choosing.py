"""Which samples of which sets a new set is made of: a part, two parts of different persons, or several sets as one.

Legend: N samples, C classes.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.errors import DataError
from data.making.rewrite import LEFT_OUT, Ints, Selection, choose, names_of_set
from data.order.hashing import KEEP, keys, mix
from data.rec.properties import whole_number
from data.rec.records import RecordSet


def subset(
    records: RecordSet,
    *,
    seed: int,
    identities: int | None = None,
    listed: Path | None = None,
    min_images: int = 1,
    max_images: int | None = None,
) -> Selection:
    """Some identities, or some images of each, drawn by the seed.

    listed: a file with a class number or a name of identities.txt on each line; none: all. min_images: identities with
    fewer are left out, before `identities` of those that are left are drawn. max_images: so many of each, drawn.
    Raises DataError when the file names what there is not, or nothing is left.
    """
    label_N, C = records.labels, records.num_classes
    count_C = np.bincount(label_N, minlength=C)
    taken_C = count_C >= max(1, min_images)
    if listed is not None:
        chosen_C = np.zeros(C, np.bool_)
        chosen_C[_listed(listed, names_of_set(records), C)] = True
        taken_C &= chosen_C
    if identities is not None:
        left = np.flatnonzero(taken_C)
        if identities > len(left):
            raise DataError(f"--identities: expected at most the {len(left)} that are left, got {identities}")
        taken_C[:] = False
        taken_C[left[np.argsort(_draw(left, seed), kind="stable")[:identities]]] = True
    new_N = np.where(taken_C[label_N], label_N, LEFT_OUT)
    if max_images is not None:
        new_N[_rank_within(label_N, seed) >= max_images] = LEFT_OUT
    return choose(records, new_N)


def split(records: RecordSet, *, share: float, seed: int) -> tuple[Selection, Selection]:
    """Two sets with no identity in common: `share` of those that have images, drawn by the seed, and the others.

    Raises DataError when one of the two would have none.
    """
    there = np.flatnonzero(np.bincount(records.labels, minlength=records.num_classes))
    count = round(share * len(there))
    if not 0 < count < len(there):
        raise DataError(f"--share: expected some of {len(there)} identities on either side, got {count} by {share:g}")
    first_C = np.zeros(records.num_classes, np.bool_)
    first_C[there[np.argsort(_draw(there, seed), kind="stable")[:count]]] = True
    here_N = first_C[records.labels]
    return tuple(choose(records, np.where(part_N, records.labels, LEFT_OUT)) for part_N in (here_N, ~here_N))  # type: ignore[return-value]


def merge(sets: Sequence[RecordSet], *, by_name: bool = False, table: Path | None = None) -> Selection:
    """Several sets as one: classes one set behind the other, or the same name or number in `table` one class.

    by_name: classes of the same line in identities.txt are one, in the order of their first appearance. table: CSV
    with a heading and the columns set (its place on the command line, from 1), label and new_label; classes that it
    does not name are left out, and new labels are numbered anew in their order. Raises DataError.
    """
    sizes = {records.image_size for records in sets}
    if len(sizes) > 1:
        raise DataError(f"expected sets of one image size, got {', '.join(f'{h}x{w}' for h, w in sorted(sizes))}")
    names = [names_of_set(records) for records in sets]
    if by_name:
        for records, of_set in zip(sets, names, strict=True):
            if not of_set:
                raise DataError(
                    f"{records.address}: expected identities.txt, which --by-name needs: write one, or use --map"
                )
        number: dict[str, int] = {}
        maps = [np.array([number.setdefault(name, len(number)) for name in of_set], np.int64) for of_set in names]
        return Selection(sets=sets, label_N=_through(sets, maps), num_classes=len(number), names=list(number))
    if table is not None:
        label_N = _through(sets, _read_map(table, sets))
        if not (label_N >= 0).any():
            raise DataError(f"{table}: it maps no class that has images")
        used, new = np.unique(label_N[label_N >= 0], return_inverse=True)
        label_N[label_N >= 0] = new.ravel()
        return Selection(sets=sets, label_N=label_N, num_classes=len(used))
    first = np.cumsum([0, *(records.num_classes for records in sets)])
    maps = [np.arange(records.num_classes) + start for records, start in zip(sets, first[:-1].tolist(), strict=True)]
    together = [name for of_set in names for name in of_set] if all(names) else []
    return Selection(sets=sets, label_N=_through(sets, maps), num_classes=int(first[-1]), names=together)


def _through(sets: Sequence[RecordSet], maps: Sequence[Ints]) -> Ints:
    return np.concatenate([of_set[records.labels] for records, of_set in zip(sets, maps, strict=True)])


def _draw(numbers: Ints, seed: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """A random number for each, by itself and the seed alone."""
    return mix(numbers.astype(np.uint64) ^ keys(1, seed=seed, epoch=0, purpose=KEEP))


def _rank_within(label_N: Ints, seed: int) -> Ints:
    """Place of each sample in a random order of its class's samples."""
    order = np.lexsort((_draw(np.arange(len(label_N)), seed), label_N))
    sorted_N = label_N[order]
    rank_N = np.empty(len(label_N), np.int64)
    rank_N[order] = np.arange(len(label_N)) - np.searchsorted(sorted_N, sorted_N)
    return rank_N


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{path}: cannot read it ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None


def _listed(path: Path, names: Sequence[str], num_classes: int) -> list[int]:
    number = {name: label for label, name in enumerate(names)}
    found = []
    for at, line in enumerate(_lines(path), 1):
        text = line.strip()
        if not text:
            continue
        as_number = whole_number(text)
        label = number.get(text, as_number)
        if text in number and 0 <= as_number < num_classes and as_number != label:
            raise DataError(f"{path}: line {at}: {text!r} is a name of identities.txt and another class's number")
        if not 0 <= label < num_classes:
            expected = f"a class from 0 to {num_classes - 1}" + (" or a name of identities.txt" if names else "")
            raise DataError(f"{path}: line {at}: expected {expected}, found {text!r:.60}")
        found.append(label)
    return found


def _read_map(path: Path, sets: Sequence[RecordSet]) -> list[Ints]:
    rows = csv.reader(_lines(path))
    heading = next(rows, [])
    if heading != ["set", "label", "new_label"]:
        raise DataError(f"{path}: expected the heading set,label,new_label, found {','.join(heading)!r:.60}")
    maps = [np.full(records.num_classes, LEFT_OUT, np.int64) for records in sets]
    for at, row in enumerate(rows, 2):
        numbers = [whole_number(text) for text in row]
        place, label, new = numbers if len(numbers) == 3 else (0, -1, -1)
        if not (1 <= place <= len(sets) and 0 <= label < sets[place - 1].num_classes and new >= 0):
            raise DataError(
                f"{path}: line {at}: expected a set from 1 to {len(sets)}, one of its labels and a new label from 0 "
                f"on, found {','.join(row)!r:.60}"
            )
        if maps[place - 1][label] != LEFT_OUT:
            raise DataError(f"{path}: line {at}: set {place}, label {label} stands there twice")
        maps[place - 1][label] = new
    return maps
