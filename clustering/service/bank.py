"""The embedding bank: the embedding of every training sample, each on the rank that owns its class.

It is filled for free from the batch that the head's gather puts on every rank. Rows lie sorted by (class, sample),
so that the order of every sum over a class does not depend on the number of ranks.

Legend: N rows of the global batch, P samples of this rank's classes, D embedding size.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from clustering.errors import ClusterStateError
from clustering.step.choice import step_ops
from clustering.step.plain import BankRows
from partial_fc.collectives import GatheredBatch
from sharding import all_shards


@dataclass(frozen=True, kw_only=True, slots=True)
class Points:
    """This rank's samples as k-means sees them, sorted by (class, sample)."""

    x_PD: Tensor
    """Unit embeddings, in the bank's dtype."""
    class_P: Tensor
    """int64 class."""
    sample_P: Tensor
    """int64 sample id."""
    seen_P: Tensor
    """bool: the row of x_PD has been written."""
    largest: int
    """The largest P of all ranks: decides how many slices a pass takes on each."""


class EmbeddingBank:
    """Embeddings of the samples whose class this rank owns. No method runs a collective."""

    def __init__(
        self,
        *,
        labels: npt.NDArray[np.int64],
        num_classes: int,
        dim: int,
        group: dist.ProcessGroup,
        device: torch.device,
        dtype: torch.dtype = torch.bfloat16,
        momentum: float = 0.0,
    ) -> None:
        """labels: int64 (num_samples,), the class of every training sample, the same on all ranks. momentum: a row
        becomes unit(momentum row + (1 - momentum) embedding) when its sample comes again; 0 keeps the newest.

        Raises ValueError when a label is not in [0, num_classes).
        """
        if labels.size and not 0 <= labels.min() <= labels.max() < num_classes:
            raise ValueError(
                f"labels: expected classes 0 … {num_classes - 1}, got {labels.min()} … {labels.max()}: "
                "check the records"
            )
        self.num_samples, self._momentum = len(labels), momentum
        shards = all_shards(dist.get_world_size(group), num_classes)
        self.shard = shards[dist.get_rank(group)]
        before = np.concatenate([[0], np.cumsum(np.bincount(labels, minlength=num_classes))])
        self.largest = max(int(before[shard.stop] - before[shard.start]) for shard in shards)
        self.first = int(before[self.shard.start])
        own = np.flatnonzero((labels >= self.shard.start) & (labels < self.shard.stop))
        own = own[np.argsort(labels[own], kind="stable")]
        slots = np.full(self.num_samples, -1, dtype=np.int32)
        slots[own] = np.arange(len(own), dtype=np.int32)
        self.size = len(own)
        self.class_P = torch.from_numpy(labels[own].astype(np.int64)).to(device)
        self.sample_P = torch.from_numpy(own.astype(np.int64)).to(device)
        self._slot_of_sample = torch.from_numpy(slots).to(device)
        # One row more than there are samples: rows of the batch that lie elsewhere are written there, which
        # keeps every shape known and the device unsynchronised.
        self._x = torch.zeros(self.size + 1, dim, dtype=dtype, device=device)
        self._seen = torch.zeros(self.size + 1, dtype=torch.bool, device=device)

    def points(self) -> Points:
        """Views of the bank: what is written later shows in them."""
        return Points(
            x_PD=self._x[:-1],
            class_P=self.class_P,
            sample_P=self.sample_P,
            seen_P=self._seen[:-1],
            largest=self.largest,
        )

    def snapshot(self) -> Points:
        """The bank as it is now, copied."""
        points = self.points()
        return dataclasses.replace(points, x_PD=points.x_PD.clone(), seen_P=points.seen_P.clone())

    @torch.no_grad()
    def update(self, batch: GatheredBatch) -> None:
        """Store the rows of the global batch that lie here. No host sync.

        Rows with label -1, and rows that are not finite, are left out: their samples keep what was stored before.
        """
        rows = BankRows(x_XD=self._x, seen_X=self._seen, slot_of_sample=self._slot_of_sample)
        step_ops(self._x).store(rows, batch.x_ND.detach(), batch.sample_ids_N, batch.labels_N, self._momentum)

    def state_dict(self) -> dict[str, Tensor]:
        return {"x": self._x[:-1], "seen": self._seen[:-1]}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Raises ClusterStateError when the rows are not those of this rank's samples."""
        if state["x"].shape != self._x[:-1].shape:
            raise ClusterStateError(
                f"embedding bank: expected {tuple(self._x[:-1].shape)} embeddings on this rank, got "
                f"{tuple(state['x'].shape)}: resume with the same data"
            )
        self._x[:-1].copy_(state["x"])
        self._seen[:-1].copy_(state["seen"])
