"""Services that lie: what a gain is worth if the same machinery runs on shuffled findings. One rank only.

Legend: R = C classes, K clusters, S = K centres of this only rank, D embedding size, I samples.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from clustering.method.margins import class_margins, smallest_margin
from clustering.service.published import Published
from clustering.service.refresh import Refresh
from clustering.service.service import ClusterService
from clustering.service.shards import add_rows_, unit_or
from partial_fc.collectives import GatheredBatch

_SEED = 1000


def _with_levels(
    service: ClusterService, published: Published, level_R: Tensor, samples_R: Tensor, suspects: int
) -> Published:
    """Margins as they follow from other hard levels."""
    c, n_R = service.config, samples_R.double()
    margin_R = class_margins(
        level_R,
        n_R,
        suspects=0 if published.drops_suspects else suspects,
        margin=service.margin,
        low=c.margin_low,
        high=c.margin_high,
        delta=c.margin_delta,
        direction=c.direction,
    )
    return replace(
        published,
        hard_R=level_R,
        samples_R=samples_R,
        margin_R=margin_R,
        smallest=smallest_margin(margin_R, service.margin),
    )


class _Placebo(ClusterService):
    """Losses and margins see the lie; the next refresh goes on from what was really found."""

    _honest: Published | None = None

    def _adopt(self, published: Published) -> None:
        self._honest = published
        super()._adopt(self._lie(published, torch.Generator().manual_seed(_SEED + published.version)))

    def _lie(self, published: Published, draw: torch.Generator) -> Published:
        raise NotImplementedError

    def _new_refresh(self, block: int | None = None) -> Refresh:
        shown, self._published = self._published, self._honest
        try:
            return super()._new_refresh(block)
        finally:
            self._published = shown


class ShuffledLevels(_Placebo):
    """Each class gets the hard level of another: margins of the same kind, for no reason."""

    def _lie(self, published: Published, draw: torch.Generator) -> Published:
        order_R = torch.randperm(len(published.hard_R), generator=draw)
        suspects = int((published.code_I < 0).sum())
        return _with_levels(self, published, published.hard_R[order_R], published.samples_R, suspects)


class ShuffledEverything(_Placebo):
    """Besides, clusters are the classes themselves, agreement is another class's, and as many suspects as were found
    are drawn by lot."""

    def _lie(self, published: Published, draw: torch.Generator) -> Published:
        order_R = torch.randperm(len(published.hard_R), generator=draw)
        points = self.bank.points()
        C, K = self.num_classes, self.num_clusters
        own_K = torch.cat([torch.arange(C), torch.full((K - C,), -1)])
        code_I = torch.zeros_like(published.code_I)
        code_I[points.sample_P] = (points.class_P + 1).int()
        suspects = int((published.code_I < 0).sum())
        code_I[torch.randperm(len(code_I), generator=draw)[:suspects]] *= -1
        counted_P = (code_I[points.sample_P] > 0).nonzero()[:, 0]
        sums_RD = torch.zeros(C, points.x_PD.shape[1])
        add_rows_(sums_RD, points.class_P[counted_P], points.x_PD, counted_P)
        mean_RD = unit_or(sums_RD, torch.zeros_like(sums_RD))
        lie = replace(
            published,
            c_SD=torch.cat([mean_RD, mean_RD.new_zeros(K - C, mean_RD.shape[1])]),
            anchor_RD=mean_RD.clone(),
            code_I=code_I,
            class_K=own_K,
            owner_K=own_K.clone(),
            weight_K=(own_K >= 0).float(),
            f_R=published.f_R[order_R],
        )
        samples_R = torch.bincount(points.class_P[counted_P], minlength=C)
        return _with_levels(self, lie, published.hard_R[order_R], samples_R, suspects)

    def observe(self, batch: GatheredBatch) -> None:
        super().observe(batch)
        if self._honest is not None:  # its centres are others than the lie's
            self._honest.move(batch, self.config.centre_momentum, self.clusters, self.classes.start)


PLACEBOS: dict[str, type[ClusterService]] = {
    "": ClusterService,
    "shuffled levels": ShuffledLevels,
    "shuffled everything": ShuffledEverything,
}


def service_of(placebo: str) -> type[ClusterService]:
    """Raises KeyError for a name that is not in PLACEBOS."""
    return PLACEBOS[placebo]
