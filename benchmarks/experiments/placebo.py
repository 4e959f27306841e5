"""Services that lie: what a gain is worth if the same machinery runs on shuffled findings. One rank only.

Legend: R = C classes, K clusters, S = K centres of this only rank, D embedding size, I samples.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from clustering.margins import class_margins, class_weights, smallest_margin
from clustering.published import Published
from clustering.service import ClusterService
from clustering.shards import add_rows_, unit_or

_SEED = 1000


def _shuffled_margins(service: ClusterService, published: Published, draw: torch.Generator) -> Published:
    """Each class gets the hard level of another: margins and weights of the same kind, for no reason."""
    c = service.config
    order_R = torch.randperm(len(published.hard_R), generator=draw)
    hard_R = published.hard_R[order_R]
    suspects = 0 if c.drop_suspects else int((published.code_I < 0).sum())
    margin_R = class_margins(
        hard_R,
        published.samples_R.double(),
        suspects=suspects,
        margin=service.margin,
        low=c.margin_low,
        high=c.margin_high,
        delta=c.margin_delta,
        direction=c.direction,
    )
    g_C = class_weights(hard_R, published.samples_R.double(), c.level_weight).float()
    smallest = smallest_margin(margin_R, service.margin)
    return replace(published, hard_R=hard_R, margin_R=margin_R, smallest=smallest, g_C=g_C)


class ShuffledLevels(ClusterService):
    """Hard levels are dealt out anew among the classes; all else is as it is."""

    def _adopt(self, published: Published) -> None:
        draw = torch.Generator().manual_seed(_SEED + published.version)
        super()._adopt(_shuffled_margins(self, published, draw))


class ShuffledEverything(ClusterService):
    """Besides, clusters are the classes themselves, and as many samples as were suspect are drawn by lot."""

    def _adopt(self, published: Published) -> None:
        draw = torch.Generator().manual_seed(_SEED + published.version)
        points = self.bank.points()
        every_I = torch.arange(len(points.class_P))
        sums_RD = add_rows_(self._zeros(points.x_PD), points.class_P, points.x_PD, every_I)
        mean_RD = unit_or(sums_RD, torch.zeros_like(sums_RD))
        C, K = self.num_classes, self.num_clusters
        own_K = torch.cat([torch.arange(C), torch.full((K - C,), -1)])
        code_I = torch.zeros_like(published.code_I)
        code_I[points.sample_P] = (points.class_P + 1).int()
        suspects = int((published.code_I < 0).sum())
        code_I[torch.randperm(len(code_I), generator=draw)[:suspects]] *= -1
        lie = replace(
            published,
            c_SD=torch.cat([mean_RD, mean_RD.new_zeros(K - C, mean_RD.shape[1])]),
            anchor_RD=mean_RD.clone(),
            code_I=code_I,
            class_K=own_K,
            owner_K=own_K.clone(),
            weight_K=(own_K >= 0).float(),
            f_R=torch.ones_like(published.f_R),
        )
        super()._adopt(_shuffled_margins(self, lie, draw))

    def _zeros(self, x_PD: Tensor) -> Tensor:
        return torch.zeros(self.num_classes, x_PD.shape[1], device=x_PD.device)


PLACEBOS: dict[str, type[ClusterService]] = {
    "": ClusterService,
    "levels": ShuffledLevels,
    "everything": ShuffledEverything,
}


def service_of(placebo: str) -> type[ClusterService]:
    """Raises KeyError for a name that is not in PLACEBOS."""
    return PLACEBOS[placebo]
