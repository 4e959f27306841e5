"""Two tiers: trainings on features, cheap, for all arms and cells, and trainings on images for the decisive ones.

Learning rates and batches are those at which plain ArcFace did best, of the few that were tried on development seeds
(docs/experiments.md). Margins of 0.7 do not train at all on images in so few steps: the three there are smaller.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from benchmarks.experiments.arms import AGAINST, AGREED, AGREED_AGAINST, LOOSE, ONE, OWN, SURE, Arm, arms_of, is_arcface
from benchmarks.experiments.fitting import Recipe


@dataclass(frozen=True, slots=True)
class Tier:
    arms: Mapping[str, Arm]
    batch: int
    lr: float

    @property
    def arcface(self) -> list[str]:
        """The arms of plain ArcFace."""
        return [name for name in self.arms if is_arcface(name)]

    def recipe(self, arm: str, margin: float) -> Recipe:
        recipe = self.arms[arm].recipe(margin)
        return replace(recipe, batch=self.batch, optim=replace(recipe.optim, lr=self.lr))


_ON_IMAGES = arms_of((0.1, 0.3, 0.5))
_DECISIVE = ("full", SURE, AGREED, OWN, ONE, LOOSE, *AGAINST, *AGREED_AGAINST)
TIERS = {
    "features": Tier(arms_of((0.3, 0.5, 0.7)), batch=256, lr=0.01),
    "images": Tier(
        {name: arm for name, arm in _ON_IMAGES.items() if is_arcface(name) or name in _DECISIVE},
        batch=64,
        lr=0.03,
    ),
}
