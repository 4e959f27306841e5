"""Points of this rank against the centres of one rank after another, a block a slice: what k-means takes its time for.

On a GPU the host waits once a block, at its end, and more often only where points have a crowd of candidates
(`clustering.nearest.nearest`): what else it would have to know is counted once, or read when the pass is over.

Legend: P points of this rank, b points of a block, S centres shown, s of them that exist, D embedding size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clustering.nearest.choice import runs_kernel
from clustering.nearest.nearest import Nearest, nearest_


class Comparing:
    """What is known of points and centres from slice to slice. Nothing of it is saved. No collectives."""

    def __init__(self, x_PD: Tensor, block: int, dtype: torch.dtype) -> None:
        """block: points of a slice. dtype: of the centres, and of points where they are compared exactly."""
        self._x_PD, self._block, self._dtype = x_PD, block, dtype
        self._finite = torch.ones((), dtype=torch.bool, device=x_PD.device)
        self._takers: list[int] | None = None
        """Points of each block that take part."""
        self.shown = -1
        """Rank whose centres they are compared with; -1: none."""
        self._rows: tuple[int, Tensor] | None = None
        self._made: tuple[Tensor, Tensor, Tensor] | None = None

    def begin(self) -> None:
        """A pass over all blocks and all ranks' centres."""
        self._finite.fill_(True)

    def recount(self) -> None:
        """Others take part now."""
        self._takers = None

    def show(self, rank: int, first_cluster: int, shown_SD: Tensor) -> None:
        """Compare with these from now on, clusters from `first_cluster` on; a row of zeros is no centre."""
        self.shown, self._rows, self._made = rank, (first_cluster, shown_SD), None

    def put_away(self) -> None:
        self.shown, self._rows, self._made = -1, None, None

    def check(self) -> None:
        """Raises FloatingPointError if an embedding was not finite in this pass. The host waits."""
        if not bool(self._finite):
            raise FloatingPointError("embeddings are not finite")

    def look(self, block: int) -> None:
        """Whether a block's embeddings are finite, which `check` says."""
        x_bD = self._x_PD[block * self._block :][: self._block]
        self._finite &= torch.isfinite(x_bD).all()

    def compare_(self, block: int, taking_part_P: Tensor, best_P: Tensor, index_P: Tensor) -> None:
        """Keep the better of what is known of a block's points and of the nearest centre shown, in place.

        taking_part_P: bool; others stay as they are. best_P: float64, exact cosines. index_P: int64, clusters.
        """
        part = slice(block * self._block, (block + 1) * self._block)
        x_bD, best_b, index_b = self._x_PD[part], best_P[part], index_P[part]
        if not len(x_bD):
            return
        if self._takers is None:
            self._takers = torch.stack([part_b.sum() for part_b in taking_part_P.split(self._block)]).tolist()
        centres_sD, operand_sD, cluster_s = self._those_that_exist()
        if not len(centres_sD) or not self._takers[block]:
            return
        takers = self._takers[block]
        chosen_b = slice(None) if takers == len(x_bD) else torch.nonzero_static(taking_part_P[part], size=takers)[:, 0]
        state = Nearest.unknown(takers, x_bD.device)
        state.best_b.copy_(best_b[chosen_b])
        state.index_b.copy_(index_b[chosen_b])
        nearest_(
            state,
            x_bD[chosen_b].to(self._dtype),
            centres_sD,
            operand_sD,
            cluster_s,
            kernels=runs_kernel("auto", operand_sD),
        )
        best_b[chosen_b], index_b[chosen_b] = state.best_b, state.index_b

    def _those_that_exist(self) -> tuple[Tensor, Tensor, Tensor]:
        """Centres, the same as products take them, and clusters; made for the first block that asks."""
        if self._made is None:
            assert self._rows is not None
            first, shown_SD = self._rows
            place_s = (shown_SD != 0).any(1).nonzero()[:, 0]
            centres_sD = shown_SD[place_s] if len(place_s) < len(shown_SD) else shown_SD
            # Only GPUs multiply bf16 operands into a float32 result fast.
            operand_sD = centres_sD.to(self._x_PD.dtype if shown_SD.is_cuda else self._dtype)
            self._made = (centres_sD, operand_sD, place_s + first)
        return self._made
