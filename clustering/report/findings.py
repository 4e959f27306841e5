"""What looks wrong with a labelled set: wrong labels, one person twice, two persons in one, copies.

Each finding has a score by which it is ordered. Ours: docs/report.md has the formulas.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from clustering.report.groups import Cut


class Noise(NamedTuple):
    """A sample whose label is probably wrong."""

    score: float
    """Closeness to another label, or what belonging takes, less closeness to its own."""
    sample: int
    label: int
    kind: Literal["closed", "open"]
    """closed: it looks like another label; open: like none."""
    looks_like: int
    """Label, -1 for open."""
    own: float
    """Closeness to the rest of its label."""
    other: float
    """Closeness to the nearest other label."""
    gate: bool
    """The noise gate of k-means suspects it too."""


class Duplicate(NamedTuple):
    """Two labels that are probably one person."""

    score: float
    """The ratio, less half of what is usual around them."""
    label: int
    other_label: int
    ratio: float
    """Mean cosine between them over the geometric mean of their own: 1 for one person."""
    samples: int
    other_samples: int


class Split(NamedTuple):
    """A group under a label that is probably not of the label's person."""

    score: float
    """1 less the ratio of the cosine to the label's largest group to their own: 0 for one person, 1 for strangers."""
    label: int
    group: int
    """From 1 on; 0 is the largest, which keeps the label."""
    looks_like: int
    """The label whose person it probably is, -1 for none."""
    samples: tuple[int, ...]
    largest: int
    """Samples of the label's largest group."""


class Copy(NamedTuple):
    """A picture that is stored again."""

    score: float
    """Cosine."""
    sample: int
    label: int
    copy_of: int
    label_of: int
    same_bytes: bool | None = None
    """Whether the files are the same too; None without records."""


class LabelState(NamedTuple):
    """How a label stands."""

    label: int
    samples: int
    hard_level: float
    agreement: float
    cohesion: float
    suspects: int
    groups: int
    copies: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Findings:
    """Everything, by score, the worst first; copies under another label before all others; labels by hard level."""

    noise: list[Noise]
    duplicates: list[Duplicate]
    splits: list[Split]
    copies: list[Copy]
    labels: list[LabelState]
    cut: Cut
    noise_from: float
    """Score above which samples were held for mislabelled."""
    split: float
    """Ratio below which groups of a label were held for two persons."""
    duplicate: float
    """Score from which on labels were held for one person."""
    iterations: int
    """Of k-means."""

    def with_copies(self, copies: list[Copy]) -> Findings:
        """The same with other rows about copies."""
        return replace(self, copies=copies)
