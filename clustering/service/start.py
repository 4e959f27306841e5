"""Where the first refresh starts when a stand-alone k-means has been there before: its assignment of every sample.

Legend: I samples of the set, P samples of this rank.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from configs.checks import ConfigError

_BLOCK = 1 << 22


def read_start(path: str, *, num_samples: int, num_clusters: int) -> npt.NDArray[np.integer] | None:
    """The cluster of each sample, an integer (num_samples,), -1 for none: read-only, still in its file (.npy).

    None for an empty path. num_clusters: K; the file may use fewer. Raises ConfigError when it is not such a file.
    """
    if not path:
        return None
    at = f"clustering.start: {path}"
    try:
        found = np.load(Path(path), mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, TypeError, OverflowError, EOFError, MemoryError) as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"{at}: cannot read it ({said:.300}): give the .assignments.npy that `python -m clustering kmeans` wrote"
        ) from None
    if not isinstance(found, np.ndarray) or found.ndim != 1 or found.dtype.kind not in "iu":
        got = f"{found.dtype} {found.shape}" if isinstance(found, np.ndarray) else "an archive of several"
        raise ConfigError(
            f"{at}: expected an array of whole numbers with one dimension, got {got}: give the .assignments.npy that "
            "`python -m clustering kmeans` wrote, not the centres"
        )
    if len(found) != num_samples:
        raise ConfigError(
            f"{at}: expected a cluster for each of the {num_samples} samples of data.path, got {len(found)}: embed and "
            "cluster the same records"
        )
    blocks = [found[start : start + _BLOCK] for start in range(0, len(found), _BLOCK)]
    least = min((int(block.min()) for block in blocks), default=-1)
    most = max((int(block.max()) for block in blocks), default=-1)
    if least < -1:
        raise ConfigError(f"{at}: expected clusters from 0, or -1 for none, got {least}: the file is damaged")
    if most >= num_clusters:
        raise ConfigError(
            f"{at}: expected at most {num_clusters} clusters (classes and clustering.extra_clusters of them more), got "
            f"{most + 1}: make it with --k {num_clusters}, or raise clustering.extra_clusters"
        )
    assignments: npt.NDArray[np.integer] = found
    return assignments


def start_of(assignments_I: npt.NDArray[np.integer] | None, sample_P: Tensor) -> Tensor | None:
    """The clusters of this rank's samples, int64 (P,) on their device; None without assignments."""
    if assignments_I is None:
        return None
    return torch.from_numpy(assignments_I[sample_P.cpu().numpy()].astype(np.int64)).to(sample_P.device)
