"""Pictures of classes: contact sheets of the hardest and the easiest, drawn from the records beside the training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from clustering.service.class_report import ClassReport
from clustering.service.service import ClusterService
from data.contact_sheet import Pixels, contact_sheet
from data.errors import DataError
from data.loading.decode import decode_image
from data.rec.records import RecordSet
from training.distributed import Ranks
from training.showing.drawing import Drawing
from training.showing.metrics import RunLog

_IMAGES = 8
"""Of a class, on a sheet."""
_MISSING = 128
"""Grey in the place of an image that cannot be read."""
_PATIENCE_S = 3.0
"""Seconds that the end of a run waits for a sheet: a store far away may not answer."""


def class_sheet(records: RecordSet, classes: Sequence[ClassReport], images: int) -> Pixels:
    """A row of `images` images for each class, its caption above it, RGB uint8. One that cannot be read is grey."""
    rows, captions = [], []
    for row in classes:
        samples = np.flatnonzero(records.labels == row.label)[:images]
        rows.append([_image(records, int(sample)) for sample in samples])
        captions.append(f"class {row.label}: hard level {row.hard_level:.2f}, margin {row.margin:.3f}")
    return contact_sheet(rows, captions=captions)


def _image(records: RecordSet, sample: int) -> Pixels:
    try:
        return decode_image(records.image(sample)[1], records.image_size)
    except DataError:
        return np.full((*records.image_size, 3), _MISSING, np.uint8)


class _Sheets(NamedTuple):
    hardest: Pixels
    easiest: Pixels


class Gallery:
    """Gives TensorBoard `clusters/hardest` and `clusters/easiest` of each version of the clusters.

    Images are read and drawn in a thread of rank 0, and training goes on meanwhile; nothing in it can end a run.
    """

    def __init__(self, records: RecordSet, service: ClusterService | None, ranks: Ranks, *, classes: int) -> None:
        """classes: on a sheet; 0: no sheets. A version that is there already has been shown."""
        self._records, self._ranks, self._classes = records, ranks, classes
        self._service = service if classes else None
        self._shown = 0 if service is None else service.version
        self._drawing = Drawing[_Sheets]("gallery")

    def after_step(self, step: int, log: RunLog) -> None:
        """Have the sheets of a new version drawn, and log those that are. One all-reduce where there is a new one."""
        if self._service is None:
            return
        self._drawing.show()
        if self._service.version == self._shown:
            return
        self._shown = version = self._service.version
        classes = self._service.easiest_and_hardest(self._classes)
        if self._ranks.is_main and classes and self._drawing.is_idle:
            self._drawing.begin(lambda: self._sheets(classes), lambda drawn: _tell(drawn, step, version, log))

    def close(self) -> None:
        """Log what is still being drawn; of what takes long, nothing."""
        self._drawing.close(within=_PATIENCE_S)

    def _sheets(self, classes: Sequence[ClassReport]) -> _Sheets:
        easiest, hardest = classes[: self._classes], classes[::-1][: self._classes]
        return _Sheets(*(class_sheet(self._records, rows, _IMAGES) for rows in (hardest, easiest)))


def _tell(drawn: Callable[[], _Sheets], step: int, version: int, log: RunLog) -> None:
    try:
        sheets = drawn()
    except Exception as error:  # whatever it is, training goes on
        why = f"{type(error).__name__}: {error}"
        log.say(f"contact sheets of version {version} of the clusters could not be drawn ({why})")
        return
    log.image(step, "clusters/hardest", sheets.hardest)
    log.image(step, "clusters/easiest", sheets.easiest)
