"""Full iterations of spherical k-means over all ranks, exact, without the comparisons that bounds make needless.

Legend: P points of this rank, S centres of its shard, K clusters of all ranks, D embedding size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from clustering.rows import Rows
from configs.head import Impl


@dataclass(frozen=True, kw_only=True, slots=True)
class Iteration:
    """What one iteration did, over all ranks; the same on each."""

    number: int
    """From 1."""
    mean_cosine: float
    """Of all points with a cluster to its centre, before the centres moved."""
    moved: int
    """Points whose cluster changed."""
    empty: int
    """Clusters without a point, before repair."""
    compared: float
    """Cosines that were computed in full or by their projection, over points x clusters."""
    seconds: float
    """On this rank."""


class Lloyd:
    """`iterate()` assigns every point to its nearest centre and moves the centres to their members' unit means."""

    def __init__(
        self,
        rows: Rows,
        *,
        centres_SD: Tensor,
        num_clusters: int,
        group: dist.ProcessGroup,
        first_row: int = 0,
        bounds: bool = True,
        impl: Impl = "auto",
        product_dtype: torch.dtype = torch.float32,
        block: int = 4096,
    ) -> None:
        """rows: this rank's; first_row: the number of its first among all ranks'. centres_SD: its shard by
        `sharding.shard_of`, float32 unit or zero rows (copied).
        """
        self.rows, self.group, self.num_clusters = rows, group, num_clusters
        self.centres_SD = centres_SD.clone()
        self.index_P = torch.full((len(rows),), -1, dtype=torch.int64, device=centres_SD.device)
        self.best_P = torch.full((len(rows),), float("-inf"), dtype=torch.float64, device=centres_SD.device)

    def iterate(self) -> Iteration:
        """One iteration."""
        raise NotImplementedError
