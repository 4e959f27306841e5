"""Arms of the experiment, and the margins that each may try before the runs: as many for all.

Every arm has three tries, on validation identities of seeds that the runs do not use, or takes another's margins
(`like`); ArcFace's three margins are arms of their own, so that it is compared at its best afterwards as well. What
else a recipe holds was found by hand on seeds 100 to 103 (docs/experiments.md): learning rates
(`benchmarks.experiments.tiers`) for ArcFace's sake, the clusters' settings for their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.experiments.fitting import Recipe
from configs.head import HeadConfig
from configs.schema import ClusteringConfig

SCALE = 24.0  # some hundred classes; configs/head.py says 30 for fewer than some thousand
AGAINST = ("full, levels shuffled", "full, all shuffled")
"""Placebos of the primary questions."""
AGREED_AGAINST = ("full, agreed, levels shuffled", "full, agreed, all shuffled")
"""The same, of agreed."""
_KAPPA_MARGINS = (0.7, 1.0, 1.3)  # their mean margin is a third to two thirds of it
_SPREAD = 0.15  # bounds of class margins about their mean
_OFF: dict[str, Any] = {
    "direction": 0,
    "purity_weight": 0.7,
    "contrastive_weight": 0.0,
    "alignment_weight": 0.0,
    "noise_gate": False,
    "noise_gap": 0.0,
    "drop_suspects": False,
    "drop_from": 0.0,
    "drop_kept": 0.0,
    "own_centres": False,
    "block": 4096,
    "bank_momentum": 0.5,
}


@dataclass(frozen=True, slots=True)
class Arm:
    """A method; `recipe(margin)` is it at one of `margins`."""

    about: str
    margins: tuple[float, ...]
    recipe: Callable[[float], Recipe]
    like: str = ""
    """Another arm, whose margins it takes without tries of its own."""


def _arcface(margin: float, **head: Any) -> Recipe:
    return Recipe(head=HeadConfig(scale=SCALE, margin=margin, **head))


def _clusters(placebo: str = "", **settings: Any) -> Callable[[float], Recipe]:
    def recipe(margin: float) -> Recipe:
        bounds = {"margin_low": max(0.0, margin - _SPREAD), "margin_high": margin + _SPREAD}
        clustering = ClusteringConfig(**{**bounds, **_OFF, **settings})
        return replace(_arcface(margin), clustering=clustering, placebo=placebo)

    return recipe


def _kappaface(margin: float) -> Recipe:
    settings = {**_OFF, "margin_rule": "kappaface", "warmup_fraction": 0.0, "ramp_fraction": 0.0}
    return replace(_arcface(margin), clustering=ClusteringConfig(**settings))


_GATE: dict[str, Any] = {"noise_gate": True, "noise_gap": 0.2}
_DROP: dict[str, Any] = {**_GATE, "drop_suspects": True}
_PULL: dict[str, Any] = {"contrastive_weight": 0.5}
_ALIGN: dict[str, Any] = {"alignment_weight": 0.1}
SURE = "full, sure"
AGREED = "full, agreed"
OWN = "full, own"
ONE, LOOSE = "full, own, one margin", "full, own, loose smaller"
"""The last one is what the defaults of configs/clustering.py are."""
_FULL: dict[str, Any] = {**_DROP, **_PULL, **_ALIGN, "direction": 1}
_AGREED: dict[str, Any] = {**_FULL, "drop_from": 0.05, "drop_kept": 0.4}
_OWN: dict[str, Any] = {**_AGREED, "own_centres": True}


def is_arcface(name: str) -> bool:
    """Whether the arm of that name is plain ArcFace."""
    return name.startswith("arcface")


def arms_of(margins: tuple[float, ...]) -> dict[str, Arm]:
    """All of them, with these margins to try."""
    return {
        **{f"arcface {margin}": Arm(f"ArcFace, margin {margin}", (margin,), _arcface) for margin in margins},
        "kappaface": Arm("KappaFace's margins", _KAPPA_MARGINS, _kappaface),
        "subcentres": Arm("ArcFace, 3 sub-centres", margins, lambda margin: _arcface(margin, subcentres=3)),
        "harder larger": Arm("hard classes get larger margins; gated", margins, _clusters(**_GATE, direction=1)),
        "harder smaller": Arm("hard classes get smaller margins; gated", margins, _clusters(**_GATE, direction=-1)),
        "larger, ungated": Arm("hard classes get larger margins; no gate", margins, _clusters(direction=1)),
        "smaller, ungated": Arm("hard classes get smaller margins; no gate", margins, _clusters(direction=-1)),
        "drop": Arm("suspects leave the margin softmax, nothing else", margins, _clusters(**_DROP)),
        "pull": Arm("contrastive loss alone", margins, _clusters(**_GATE, **_PULL)),
        "pull, align": Arm("contrastive and alignment losses", margins, _clusters(**_GATE, **_PULL, **_ALIGN)),
        "full": Arm("drop, pull, align and larger margins for hard classes", margins, _clusters(**_FULL)),
        SURE: Arm("the same, but drops from a share of 5% on", margins, _clusters(**{**_FULL, "drop_from": 0.05})),
        AGREED: Arm(
            "the same, if two fifths of the last version's suspects still are as well",
            margins,
            _clusters(**_AGREED),
            like="full",
        ),
        OWN: Arm(
            "the same, and centres of their owners' samples alone",
            margins,
            _clusters(**_OWN),
            like="full",
        ),
        ONE: Arm("the same with one margin for all", margins, _clusters(**{**_OWN, "direction": 0}), like="full"),
        LOOSE: Arm(
            "the same with smaller margins for classes whose samples lie apart",
            margins,
            _clusters(**{**_OWN, "direction": -1, "purity_weight": 0.0}),
            like="full",
        ),
        "full, one margin": Arm("the same with one margin for all", margins, _clusters(**{**_FULL, "direction": 0})),
        "full, levels shuffled": Arm(
            "placebo: the hard level of another class", margins, _clusters("shuffled levels", **_FULL)
        ),
        "full, all shuffled": Arm(
            "placebo: besides, classes as clusters, and suspects by lot",
            margins,
            _clusters("shuffled everything", **_FULL),
        ),
        AGREED_AGAINST[0]: Arm(
            "placebo of agreed: the hard level of another class",
            margins,
            _clusters("shuffled levels", **_AGREED),
            like=AGAINST[0],
        ),
        AGREED_AGAINST[1]: Arm(
            "placebo of agreed: besides, classes as clusters, and suspects by lot",
            margins,
            _clusters("shuffled everything", **_AGREED),
            like=AGAINST[1],
        ),
    }
