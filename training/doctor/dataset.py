"""The training set and the verification sets: whether they open, decode, and fill an epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from backbones import IMAGE_SIZE
from configs.schema import RunConfig
from data.errors import DataError
from data.loading.batch import ImageSource
from data.loading.decode import DecodeError, check_image, decode_image
from data.loading.loader import build_order
from data.order.sampler import BatchPlan
from data.rec.records import RecordSet
from evaluation.pairs import read_pairs
from training.checks import steps_of
from training.doctor.finding import Finding, size_text

_LOOKED_AT = 256
_LOOKED_AT_FAR = 16
"""Of a set that is far away: each costs a block."""
_PAIRED_LOOKED_AT = 64


def opened(records: RecordSet) -> Finding:
    """What it is."""
    files = f", {len(records.names)} record files" if len(records.names) > 1 else ""
    text = f"{records.num_samples} images of {records.num_classes} identities, {size_text(records.bytes)}{files}"
    return Finding("records", "pass", f"{text} ({records.layout}) in {records.address}")


def decoded(records: ImageSource, most_bad: int) -> Finding:
    """Decode some images, spread over the set. most_bad: `data.max_bad_images`."""
    count = min(records.num_samples, _LOOKED_AT_FAR if records.far else _LOOKED_AT)
    bad: list[str] = []
    for sample in np.linspace(0, records.num_samples - 1, count).astype(np.int64).tolist():
        try:
            decode_image(records.image(sample)[1], records.image_size)
        except DecodeError as error:
            bad.append(f"sample {sample}: {error}")
    if not bad:
        return Finding("images", "pass", f"{count} of them, spread over the set, decode")
    expected = round(len(bad) / count * records.num_samples)
    text = f"{len(bad)} of {count} images do not decode ({bad[0]})"
    if expected > most_bad:
        text += f": about {expected} of the set, data.max_bad_images allows {most_bad}"
    cure = "python -m data verify finds them all, its --fix writes a set without them"
    return Finding("images", "fail" if expected > most_bad else "warn", text, cure)


def epoch(records: ImageSource, config: RunConfig, ranks: int) -> Finding:
    """Steps of an epoch. Raises ConfigError or DataError, as a training would, when there is none."""
    data, train = config.data, config.train
    batch_size, accumulation = config.share(ranks)
    order = build_order(
        records,
        sampler=data.sampler,
        images_per_identity=data.images_per_identity,
        window=data.window,
        seed=train.seed,
    )
    plan = BatchPlan(records.num_samples, batch_size=batch_size, rank=0, world_size=ranks, seed=train.seed, order=order)
    steps = steps_of(plan.steps_per_epoch, accumulation)
    images = plan.global_batch * accumulation
    text = f"{steps} steps of {images} images ({ranks} rank(s) x {batch_size} x {accumulation})"
    return Finding("epoch", "pass", f"{text}, {steps * train.epochs} in all")


def verification(names: Sequence[str], file: Callable[[str], Path]) -> Iterator[Finding]:
    """Read every set of `eval.sets`, a finding for each. file: where it lies, as `RecordSet.file` says."""
    stems: set[str] = set()
    for name in names:
        stem = Path(name).stem
        try:
            if stem in stems:
                raise DataError(f"eval.sets: expected files of different names, got {stem} twice")
            yield Finding(f"set {stem}", "pass", _pairs(file(name)))
        except DataError as error:
            yield Finding(f"set {stem}", "fail", str(error))
        stems.add(stem)


def _pairs(path: Path) -> str:
    images, same = read_pairs(path)
    for number in np.linspace(0, len(images) - 1, min(len(images), _PAIRED_LOOKED_AT)).astype(np.int64).tolist():
        try:
            check_image(images[number], IMAGE_SIZE)
        except DecodeError as error:
            raise DataError(f"{path}: image {number} of {len(images)}: {error}: make the set anew") from None
    return f"{len(same)} pairs, {int(same.sum())} of one person"
