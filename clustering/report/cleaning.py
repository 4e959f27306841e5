"""What a cleaned set is to hold: findings that somebody has looked through, as a new label for each sample or none.

Legend: N samples, C labels of the set, L labels of the cleaned set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clustering.job.together import InputError
from clustering.report.data import Ints
from clustering.report.findings import Copy, Duplicate, Noise, Split
from clustering.report.findings_csv import check_ids, read_table

DROPPED = -1


@dataclass(frozen=True, kw_only=True, slots=True)
class Actions:
    """What to do about the findings; each reads the CSV file of its kind."""

    relabel: bool = False
    """Samples that look like another label go there."""
    drop_noise: bool = False
    """Other suspected wrong labels are left out; all of them without `relabel`."""
    split: bool = False
    """Groups that look like another person get a label of their own, or that of the label they look like."""
    merge_duplicates: bool = False
    """Labels that look like one person become one."""
    drop_copies: bool = False
    """Copies are left out as long as what they are copies of stays."""
    min_images: int = 1
    """Labels that are left with fewer samples are left out."""

    @property
    def any(self) -> bool:
        flags = (self.relabel, self.drop_noise, self.split, self.merge_duplicates, self.drop_copies)
        return any(flags) or self.min_images > 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The cleaned set."""

    label_N: Ints
    """New label of each sample, 0 … L - 1, or DROPPED."""
    why_N: list[str]
    """Why a sample's label is not what it was, apart from the renumbering; "" for a sample that stays."""
    origin_L: list[tuple[int, ...]]
    """The old labels that each new one stands for, ascending: several where labels were merged; of a group that was
    split off, the label it was under."""

    @property
    def kept(self) -> int:
        return int(np.count_nonzero(self.label_N >= 0))


def plan(folder: Path, labels: Ints, num_labels: int, actions: Actions) -> Plan:
    """Read the CSV files that the actions need from a report's folder, and decide.

    labels: int64 (N,), those of the set. Order: wrong labels, groups, copies, duplicates, small labels; a sample
    that was left out or moved as wrong is left alone by splits, and what is left out stays out. Raises InputError for
    files that do not fit the set or themselves, or when nothing is left.
    """
    draft = _Draft(labels, num_labels)
    if actions.relabel or actions.drop_noise:
        draft.noise(folder / "noise.csv", relabel=actions.relabel, drop=actions.drop_noise)
    if actions.split:
        draft.splits(folder / "splits.csv")
    if actions.drop_copies:
        draft.copies(folder / "copies.csv")
    if actions.merge_duplicates:
        draft.merges(folder / "duplicates.csv")
    return draft.finish(actions.min_images)


class _Draft:
    """Labels on their way. New labels of groups are numbered from C on."""

    def __init__(self, labels: Ints, num_labels: int) -> None:
        self.before, self.label = labels, labels.copy()
        self.num_labels = self.total = num_labels
        self.why = [""] * len(labels)
        self.from_label = list(range(num_labels))
        self.into = list(range(num_labels))

    def noise(self, path: Path, *, relabel: bool, drop: bool) -> None:
        rows = read_table(path, Noise)
        self._check(path, [row.sample for row in rows], [row.label for row in rows])
        self._check_once(path, [row.sample for row in rows])
        check_ids(path, "looks_like", [row.looks_like for row in rows], least=-1, total=self.num_labels)
        for row in rows:
            if (row.kind == "closed") != (row.looks_like >= 0):
                raise InputError(
                    f"{path}: sample {row.sample}: expected a label in looks_like for closed and -1 for open, got "
                    f"{row.kind} and {row.looks_like}"
                )
            if relabel and row.kind == "closed":
                self._move(row.sample, row.looks_like, "wrong label: looks like another")
            elif drop:
                self._move(row.sample, DROPPED, "wrong label: dropped")

    def splits(self, path: Path) -> None:
        rows = read_table(path, Split)
        samples = [sample for row in rows for sample in row.samples]
        self._check(path, samples, [row.label for row in rows for _ in row.samples])
        self._check_once(path, samples)
        check_ids(path, "looks_like", [row.looks_like for row in rows], least=-1, total=self.num_labels)
        for row in sorted(rows, key=lambda row: (row.label, row.group)):
            target = row.looks_like
            if target < 0:
                target, self.total = self.total, self.total + 1
                self.from_label.append(row.label)
                self.into.append(target)
            why = "split: a person of its own" if row.looks_like < 0 else "split: looks like another"
            for sample in row.samples:
                if not self.why[sample]:
                    self._move(sample, target, why)

    def copies(self, path: Path) -> None:
        rows = read_table(path, Copy)
        self._check(path, [row.sample for row in rows], [row.label for row in rows])
        self._check(path, [row.copy_of for row in rows], [row.label_of for row in rows])
        self._check_once(path, [row.sample for row in rows])
        both = {row.sample for row in rows} & {row.copy_of for row in rows}
        if both:
            raise InputError(f"{path}: sample {min(both)}: expected a copy or what others are copies of, got both")
        stays: set[int] = set()
        for row in sorted(rows, key=lambda row: (row.copy_of, row.sample)):
            if self.label[row.copy_of] >= 0 or row.copy_of in stays:
                if self.label[row.sample] >= 0:
                    self._move(row.sample, DROPPED, f"copy of {row.copy_of}")
            elif self.label[row.sample] >= 0:  # the original was left out: the first copy of it stays in its place
                stays.add(row.copy_of)

    def merges(self, path: Path) -> None:
        rows = read_table(path, Duplicate)
        for name in ("label", "other_label"):
            check_ids(path, name, [getattr(row, name) for row in rows], least=0, total=self.num_labels)
        for row in rows:
            if row.label == row.other_label:
                raise InputError(f"{path}: label {row.label}: expected two labels that differ, got the same twice")
            first, second = sorted((self._root(row.label), self._root(row.other_label)))
            self.into[second] = first
        for sample in np.flatnonzero(self.label >= 0).tolist():
            label = self._root(int(self.label[sample]))
            if label != self.label[sample]:
                self._move(sample, label, "duplicate identity: merged")

    def finish(self, min_images: int) -> Plan:
        count = np.bincount(self.label[self.label >= 0], minlength=self.total)
        for sample in np.flatnonzero(self.label >= 0).tolist():
            if count[self.label[sample]] < min_images:
                self._move(sample, DROPPED, f"its label has fewer than {min_images} images left")
        kept = self.label >= 0
        if not kept.any():
            raise InputError("nothing would be left: choose fewer actions, or a smaller --min-images")
        used, new = np.unique(self.label[kept], return_inverse=True)
        label_N = np.full(len(self.label), DROPPED)
        label_N[kept] = new.ravel()
        merged: dict[int, list[int]] = {}
        for label in range(self.num_labels):
            merged.setdefault(self._root(label), []).append(label)
        origin = [tuple(merged.get(label, [self.from_label[label]])) for label in used.tolist()]
        return Plan(label_N=label_N, why_N=self.why, origin_L=origin)

    def _root(self, label: int) -> int:
        """The label that a label was merged into, itself if none."""
        while self.into[label] != label:
            self.into[label] = self.into[self.into[label]]
            label = self.into[label]
        return label

    def _move(self, sample: int, label: int, why: str) -> None:
        self.label[sample] = label
        self.why[sample] = f"{self.why[sample]}; {why}" if self.why[sample] else why

    def _check(self, path: Path, samples: Sequence[int], labels: Sequence[int]) -> None:
        check_ids(path, "sample", samples, least=0, total=len(self.before))
        for sample, label in zip(samples, labels, strict=True):
            if self.before[sample] != label:
                raise InputError(
                    f"{path}: sample {sample}: expected label {self.before[sample]}, as the records have it, got "
                    f"{label}: is the report of another set?"
                )

    def _check_once(self, path: Path, samples: Sequence[int]) -> None:
        values, counts = np.unique(np.array(samples, dtype=np.int64), return_counts=True)
        if (counts > 1).any():
            raise InputError(f"{path}: sample {values[np.argmax(counts > 1)]}: expected one row, got several")
