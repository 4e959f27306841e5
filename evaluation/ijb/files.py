"""The meta files of IJB-B and IJB-C: which image belongs to which template and medium, pairs, galleries, points.

Every file is checked against the others: rows aligned by their position alone can go wrong unseen.

Legend: N images, T templates, P pairs, G templates of a gallery.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from data.errors import DataError
from evaluation.embed.files import Ints
from evaluation.ijb.number_lines import MOST_DIGITS, read_columns
from evaluation.roc import Bools, Floats

_TABLE = 1 << 24
"""Template ids below it are looked up in a table, others searched for."""
_POINTS = 10
"""Coordinates: x and y of five points."""


class Images(NamedTuple):
    """`<set>_face_tid_mid.txt`: row n is image n."""

    path: Path
    names: list[str]
    template_N: Ints
    media_N: Ints


class Points(NamedTuple):
    """`<set>_name_5pts_score.txt`. points_N52: float64 (N, 5, 2), x and y. score_N: the detector's, not negative."""

    points_N52: Floats
    score_N: Floats


class Pairs(NamedTuple):
    """`<set>_template_pair_label.txt`. first_P, second_P: rows of the templates. same_P: whether of one person."""

    first_P: npt.NDArray[np.int32]
    second_P: npt.NDArray[np.int32]
    same_P: Bools


class Persons(NamedTuple):
    """A gallery or the probes: row_G of the templates, and the subject of each."""

    path: Path
    row_G: Ints
    subject_G: Ints


def read_images(path: Path) -> Images:
    """Lines `name template media`. Raises DataError, with the line, for any other, and for an empty file."""
    names, ids = [], []
    for number, words in _lines(path, "name template media"):
        if len(words) != 3 or not (_whole(words[1]) and _whole(words[2])):
            raise DataError(f"{path}: line {number}: expected `name template media`, found {' '.join(words):.80}")
        names.append(words[0])
        ids.append((int(words[1]), int(words[2])))
    template_N, media_N = np.array(ids, np.int64).T
    return Images(path, names, template_N.copy(), media_N.copy())


def read_points(path: Path, images: Images) -> Points:
    """Lines `name x1 y1 … x5 y5 score`, of the same images in the same order.

    Raises DataError, with the line, for any other, a name that is not the image's, and numbers that are not finite.
    """
    rows = []
    for number, words in _lines(path, "name, ten coordinates, score"):
        values = _floats(words[1:])
        if values is None or len(values) != _POINTS + 1:
            raise DataError(
                f"{path}: line {number}: expected a name, ten coordinates and a score, found {' '.join(words):.80}"
            )
        if number <= len(images.names) and words[0] != images.names[number - 1]:
            raise DataError(
                f"{path}: line {number}: expected {images.names[number - 1]}, as in {images.path}, found {words[0]}: "
                "the two files must list the same images in the same order"
            )
        if values[-1] < 0:
            raise DataError(f"{path}: line {number}: expected a score of at least 0, found {values[-1]:g}")
        rows.append(values)
    check_rows(path, len(rows), images)
    table = np.array(rows)
    return Points(table[:, :_POINTS].reshape(-1, 5, 2), table[:, _POINTS])


def check_rows(path: Path, rows: int, images: Images) -> None:
    """Raise DataError unless a file has a row for each image."""
    if rows != len(images.names):
        raise DataError(f"{path}: expected {len(images.names)} rows, one an image of {images.path}, found {rows}")


def read_pairs(path: Path, ids_T: Ints, images: Path) -> Pairs:
    """Lines `template template label`, 1 for one person and 0 for two. ids_T: of all templates, rising.

    Raises DataError, with the line, for other lines and labels, and templates that have no image.
    """
    first_P, second_P, label_P = read_columns(path, 3)
    odd = np.flatnonzero(label_P > 1)
    if len(odd):
        raise DataError(f"{path}: line {odd[0] + 1}: expected the label 0 or 1, found {label_P[odd[0]]}")
    rows = [_rows_of(column, ids_T) for column in (first_P, second_P)]
    for row_P, id_P in zip(rows, (first_P, second_P), strict=True):
        unknown = np.flatnonzero(row_P < 0)
        if len(unknown):
            at = int(unknown[0])
            raise DataError(f"{path}: line {at + 1}: template {id_P[at]} has no image in {images}")
    return Pairs(rows[0].astype(np.int32), rows[1].astype(np.int32), label_P == 1)


def read_persons(path: Path, ids_T: Ints, images: Path) -> Persons:
    """A .csv file whose header names TEMPLATE_ID and SUBJECT_ID; a template may have many lines, of one subject.

    Raises DataError, with the line, for other files, a template of two subjects, and templates that have no image.
    """
    subjects: dict[int, tuple[int, int]] = {}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.reader(file)
            header = [name.strip().upper() for name in next(reader, [])]
            if not {"TEMPLATE_ID", "SUBJECT_ID"} <= set(header):
                raise DataError(f"{path}: expected a header with TEMPLATE_ID and SUBJECT_ID, found {header!s:.80}")
            columns = header.index("TEMPLATE_ID"), header.index("SUBJECT_ID")
            for words in reader:
                number = reader.line_num
                if len(words) != len(header) or not all(_whole(words[column]) for column in columns):
                    raise DataError(f"{path}: line {number}: expected whole numbers as the header names them")
                template, subject = (int(words[column]) for column in columns)
                other, line = subjects.setdefault(template, (subject, number))
                if other != subject:
                    raise DataError(
                        f"{path}: line {number}: template {template} is of subject {subject}, on line {line} of {other}"
                    )
    except OSError as error:
        raise DataError(f"{path}: cannot read it ({error.strerror}): expected templates and subjects") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: expected a table of commas in UTF-8 ({error})") from None
    if not subjects:
        raise DataError(f"{path}: expected templates, found a header alone")
    templates = np.array(list(subjects), np.int64)
    row_G = _rows_of(templates, ids_T)
    if (row_G < 0).any():
        template = int(templates[np.argmin(row_G)])
        raise DataError(f"{path}: line {subjects[template][1]}: template {template} has no image in {images}")
    return Persons(path, row_G, np.array([subject for subject, _ in subjects.values()], np.int64))


def _rows_of(id_P: Ints, ids_T: Ints) -> Ints:
    """Where each id stands in ids_T (rising); -1 where it does not."""
    if ids_T[-1] < _TABLE:
        table = np.full(int(ids_T[-1]) + 2, -1)
        table[ids_T] = np.arange(len(ids_T))
        return np.asarray(table[np.minimum(id_P, len(table) - 1)])
    row_P = np.minimum(np.searchsorted(ids_T, id_P), len(ids_T) - 1)
    return np.where(ids_T[row_P] == id_P, row_P, -1)


def _lines(path: Path, what: str) -> Iterator[tuple[int, list[str]]]:
    """(number from 1 on, words) of each line. Raises DataError when there is none, or it is no text."""
    number = 0
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                yield number, line.split()
    except OSError as error:
        raise DataError(f"{path}: cannot read it ({error.strerror}): expected lines `{what}`") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: line {number + 1} or one after it: expected text in UTF-8") from None
    if not number:
        raise DataError(f"{path}: expected lines `{what}`, found an empty file")


def _whole(word: str) -> bool:
    return word.isascii() and word.isdigit() and len(word) <= MOST_DIGITS


def _floats(words: list[str]) -> list[float] | None:
    try:
        values = list(map(float, words))
    except ValueError:
        return None
    return values if all(map(math.isfinite, values)) else None
