"""Numbers of classes: as they come, or anew from 0."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from data.errors import DataError

Ints = npt.NDArray[np.int64]
_MOST_EMPTY = 100
"""Times as many classes as images: more are numbers of another kind."""


def classes_of(where: str, labels: Ints, *, renumber: bool) -> Ints:
    """The labels that classes 0, 1, … stand for: those in use where they are numbered anew, all from 0 if not.

    Raises DataError when that would be far more classes than images.
    """
    if renumber:
        return np.unique(labels)
    largest = int(labels.max())
    if largest >= _MOST_EMPTY * len(labels):
        raise DataError(
            f"{where}: expected classes numbered from 0, found {largest} among {len(labels)} images: number them anew "
            "with --renumber"
        )
    return np.arange(largest + 1)


def origins_text(classes: Ints) -> dict[str, str]:
    """`labels.csv`, which says what the numbers of the classes were."""
    rows = "".join(f"{label},{old}\n" for label, old in enumerate(classes.tolist()))
    return {"labels.csv": f"label,old_label\n{rows}"}
