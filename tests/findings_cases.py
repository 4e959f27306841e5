"""Embeddings of persons with known faults, and the report's findings on them.

Legend: N samples, D components.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch.distributed as dist

from clustering.report.data import Labelled, labelled
from clustering.report.find import find_all
from clustering.report.findings import Findings
from clustering.service.parts import PartFiles


class Case(NamedTuple):
    """x_ND: float32, unit. person_N: who is shown. label_N: under which label."""

    x_ND: npt.NDArray[np.float32]
    person_N: npt.NDArray[np.int64]
    label_N: npt.NDArray[np.int64]


def persons(count: int, images: int, *, dim: int = 48, spread: float = 0.9, seed: int = 0) -> Case:
    """Images around random directions, labels right; cosines within a person about 1 / (1 + spread^2)."""
    rng = np.random.default_rng(seed)
    centre_CD = rng.standard_normal((count, dim))
    centre_CD /= np.linalg.norm(centre_CD, axis=1, keepdims=True)
    person_N = np.repeat(np.arange(count), images)
    x_ND = centre_CD[person_N] + spread / np.sqrt(dim) * rng.standard_normal((len(person_N), dim))
    x_ND /= np.linalg.norm(x_ND, axis=1, keepdims=True)
    return Case(x_ND.astype(np.float32), person_N, person_N.copy())


def load(folder: Path, case: Case, num_labels: int | None = None) -> Labelled:
    np.save(folder / "x.npy", case.x_ND)
    return labelled(PartFiles(folder / "x.npy"), case.label_N, num_labels or int(case.label_N.max()) + 1)


def found_by_rank(group: dist.ProcessGroup, folder: str, case: Case, num_labels: int | None = None) -> Any:
    """For the pool of ranks, on one rank."""
    findings: Findings = find_all(load(Path(folder), case, num_labels), group)
    return findings
