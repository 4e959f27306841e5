"""Which class of an old set each class of a new one is: by number, by name, or by a table.

Legend: C classes of the new set, P pairs of a new class and an old one.
"""

from __future__ import annotations

import csv
import itertools
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data.errors import DataError
from data.rec.places import where
from data.rec.properties import whole_number

Ints = npt.NDArray[np.int64]
Rows = Iterator[tuple[int, list[str]]]
"""(number of its line, cells) of each line that has any."""
_ORIGINS = ["label", "set", "old_label", "images"]
"""Heading of labels.csv, as `python -m data subset`, `split` and `merge` write it."""
_CLEANED = ["new_label", "old_labels"]
"""As `python -m clustering clean` writes it."""
_PLAIN = (["new", "old"], ["label", "old_label"])
_SHOWN = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassMap:
    """Pairs of a new class and an old one. No old class is in two of them."""

    num_classes: int
    """C."""
    num_old: int
    new_P: Ints
    old_P: Ints
    weight_P: npt.NDArray[np.float64]
    """Of an old class where a new one was made of several."""

    @property
    def count_C(self) -> Ints:
        """Old classes of each new one, (C,): 0 for a class without a counterpart."""
        return np.bincount(self.new_P, minlength=self.num_classes)

    @property
    def unused(self) -> int:
        """Old classes that no new one is made of."""
        return self.num_old - len(self.old_P)


def no_classes(num_classes: int, num_old: int) -> ClassMap:
    """None has a counterpart."""
    return _plain(num_classes, num_old, np.empty(0, np.int64), np.empty(0, np.int64))


def same_classes(num_classes: int, num_old: int) -> ClassMap:
    """Each class is the one of its number. Raises DataError unless there are as many."""
    if num_classes != num_old:
        raise DataError(
            f"data.path: its records have {num_classes} classes, the centres are {num_old}: expected as many, for the "
            "same classes: say which is which by name or by a map, or begin with new centres"
        )
    return _plain(num_classes, num_old, np.arange(num_old), np.arange(num_old))


def by_name(new: Sequence[str], old: Sequence[str], *, new_at: str, old_at: str) -> ClassMap:
    """Each class is the one of its name.

    new, old: names by class, of the sets at new_at and old_at. Raises DataError where a name is there twice in a set,
    or none is in both.
    """
    number = _numbers(old, old_at)
    pairs = [(label, number[name]) for name, label in _numbers(new, new_at).items() if name in number]
    if not pairs:
        raise DataError(f"{new_at}: none of its {len(new)} names is one of the {len(old)} of {old_at}")
    new_P, old_P = np.array(pairs, np.int64).T
    return _plain(len(new), len(old), new_P, old_P)


def read_map(path: Path, *, num_classes: int, num_old: int, old_set: str = "") -> ClassMap:
    """Read a table: lines `new old` or `new,old`, or a labels.csv that a command of ours wrote beside the new set.

    old_set: where the centres' classes are from, for a labels.csv that names sets; "": the only one that it names. A
    class that `data merge` or `clustering clean` made of several old ones has several pairs; one that was split off
    has none where the class that it was split from is there. Raises DataError for a line that is none, a class that
    there is not, a class that stands there twice, a set that is not named, or no pair at all.
    """
    rows, draft = _rows(path), _Draft(path, num_classes, num_old)
    first = next(rows, None)
    if first is None:
        return draft.finish()
    heading = [cell.strip() for cell in first[1]]
    if heading == _ORIGINS:
        _read_origins(rows, draft, old_set)
    elif heading == _CLEANED:
        _read_cleaned(rows, draft)
    else:
        is_heading = " ".join(heading).split() in _PLAIN
        _read_plain(rows if is_heading else itertools.chain([first], rows), draft)
    return draft.finish()


def _plain(num_classes: int, num_old: int, new_P: Ints, old_P: Ints) -> ClassMap:
    return ClassMap(
        num_classes=num_classes, num_old=num_old, new_P=new_P, old_P=old_P, weight_P=np.ones(len(new_P), np.float64)
    )


def _numbers(names: Sequence[str], at: str) -> dict[str, int]:
    number: dict[str, int] = {}
    for label, name in enumerate(names):
        if (other := number.setdefault(name, label)) != label:
            raise DataError(
                f"{at}: classes {other} and {label} are both named {name!r:.80}: expected names that tell classes "
                "apart: use a map instead"
            )
    return number


def _rows(path: Path) -> Rows:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.reader(file)
            for row in reader:
                if any(cell.strip() for cell in row):
                    yield reader.line_num, row
    except OSError as error:
        raise DataError(f"{path}: cannot read it ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except csv.Error as error:
        raise DataError(f"{path}: not a table of text ({error})") from None


class _Draft:
    """Pairs as they are read."""

    def __init__(self, path: Path, num_classes: int, num_old: int) -> None:
        self.path, self._num_classes, self._num_old = path, num_classes, num_old
        self._pairs = array("q")
        self._weights = array("d")
        self._old = bytearray(num_old)
        self._new = bytearray(num_classes)

    def check(self, at: int, row: list[str], new: int, old: Sequence[int]) -> None:
        """Raise DataError unless these are classes."""
        if not old or not 0 <= new < self._num_classes or min(old) < 0 or max(old) >= self._num_old:
            raise DataError(
                f"{self.path}: line {at}: expected a class of the new set, from 0 to {self._num_classes - 1}, and an "
                f"old one, from 0 to {self._num_old - 1}, found {','.join(row)!r:.60}"
            )

    def check_once(self, at: int, new: int) -> None:
        """Raise DataError where this class was there before."""
        if self._new[new]:
            raise DataError(f"{self.path}: line {at}: class {new} stands there twice: expected one line for each")
        self._new[new] = 1

    def has_old(self, old: int) -> bool:
        return bool(self._old[old])

    def add(self, at: int, new: int, old: int, weight: float = 1.0) -> None:
        if self._old[old]:
            raise DataError(
                f"{self.path}: line {at}: old class {old} stands there twice: two classes with one centre could not "
                "be told apart: leave one of them out"
            )
        self._old[old] = 1
        self._pairs.extend((new, old))
        self._weights.append(weight)

    def finish(self) -> ClassMap:
        if not self._weights:
            raise DataError(f"{self.path}: expected lines with a new class and the old one that it is, found none")
        new_P, old_P = np.array(self._pairs, np.int64).reshape(-1, 2).T
        return ClassMap(
            num_classes=self._num_classes,
            num_old=self._num_old,
            new_P=new_P,
            old_P=old_P,
            weight_P=np.array(self._weights, np.float64),
        )


def _read_plain(rows: Rows, draft: _Draft) -> None:
    for at, row in rows:
        numbers = [whole_number(cell) for cell in " ".join(row).split()]
        new, old = numbers if len(numbers) == 2 else (-1, -1)
        draft.check(at, row, new, [old])
        draft.check_once(at, new)
        draft.add(at, new, old)


def _read_origins(rows: Rows, draft: _Draft, old_set: str) -> None:
    """Of `data subset`, `split` and `merge`: rows of other sets than the old one are passed over."""
    is_old: dict[str, bool] = {}
    for at, row in rows:
        if len(row) != len(_ORIGINS):
            draft.check(at, row, -1, [])
        if (of := row[1]) not in is_old:
            is_old[of] = not old_set or _is_same(of, old_set)
            if not old_set and len(is_old) > 1:
                raise DataError(
                    f"{draft.path}: the new set was made of several ({_listed(is_old)}): say by --old-set which of "
                    "them the centres were trained on"
                )
        if is_old[of]:
            new, old, images = (whole_number(row[column].strip()) for column in (0, 2, 3))
            draft.check(at, row, new, [old] if images > 0 else [])
            draft.add(at, new, old, images)
    if is_old and not any(is_old.values()):
        raise DataError(
            f"{draft.path}: the new set was made of {_listed(is_old)}, and the centres were trained on {old_set}: if "
            "that is one of them, name it by --old-set as it stands there"
        )


def _read_cleaned(rows: Rows, draft: _Draft) -> None:
    """Of `clustering clean`: a group that was split off comes behind the class that it was under, and has its number
    once more."""
    for at, row in rows:
        new = whole_number(row[0].strip())
        numbers = [whole_number(cell) for cell in row[1].split()] if len(row) == 2 else []
        draft.check(at, row, new, numbers)
        draft.check_once(at, new)
        if len(numbers) == 1 and draft.has_old(numbers[0]):
            continue
        for old in numbers:
            draft.add(at, new, old)


def _is_same(one: str, other: str) -> bool:
    places = [where(text) for text in (one, other)]
    return len({place.resolve() if isinstance(place, Path) else place.rstrip("/") for place in places}) == 1


def _listed(names: dict[str, bool]) -> str:
    return ", ".join(list(names)[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
