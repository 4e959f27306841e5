"""Settings of the cluster service and of what it guides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from configs.checks import require


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusteringConfig:
    """The cluster service: k-means beside the training, margins, contrastive and alignment losses (docs/method.md)."""

    enabled: bool = True
    """False gives plain ArcFace or CosFace."""
    extra_clusters: float = 0.15
    """E / C: clusters beyond one for each class, seeded at the worst-fitted samples."""
    iterations: int = 3
    """Lloyd iterations of one refresh (warm-started)."""
    refresh_epochs: float = 1.0
    """Epochs between the starts of two refreshes."""
    refresh_span: float = 0.5
    """Share of that interval over which a refresh is spread, slice by slice."""
    block: int = 0
    """Samples a slice assigns at a time; 0: 4096 on CPUs, and on GPUs by the clusters of a rank, up to 131072."""
    step_budget: float = 0.0
    """Largest share of a training step's time for refreshes, which are spread longer or cut to keep it; 0: no limit."""
    start: str = ""
    """.npy with the cluster of each sample, from a stand-alone k-means, to start the first refresh from."""
    bank_momentum: float = 0.5
    """Moving average of a sample's embeddings over the epochs, of which clusters are made; 0: the newest alone."""
    centre_momentum: float = 0.9
    """Moving average of the cluster centres between refreshes."""
    hard_level_momentum: float = 0.5
    """Moving average of the hard level over refreshes."""
    shrinkage: float = 5.0
    """a: pseudo-samples that pull the hard level of a small class to the mean."""
    purity_weight: float = 0.0
    """Weight of 1 - F in the hard level, how far clusters and class disagree; the rest goes to 1 - rho, the spread in
    the class, which alone was worth something to margins."""
    noise_gate: bool = True
    """Leave samples that look mislabelled out of hard level, centres and contrastive loss."""
    noise_gap: float = 0.2
    """Let pass those whose cosine to their cluster is not above the one to their own class by more than this."""
    drop_suspects: bool = True
    """Leave samples that look mislabelled out of the margin softmax too, once the ramp has begun."""
    drop_from: float = 0.05
    """But only if they are at least this share of the samples: the few that clean data has are hard, not wrong."""
    drop_kept: float = 0.4
    """And if at least this share of the last version's suspects still are: early ones suspect others each time."""
    own_centres: bool = True
    """Centres of the samples of the class that owns the cluster, alone, and for a class that owns none its own mean, so
    that nobody is pulled towards others; false: centres of all samples in the cluster."""
    warmup_fraction: float = 0.2
    """Share of all steps trained as plain ArcFace."""
    ramp_fraction: float = 0.1
    """Share of all steps over which the cluster terms then grow linearly to full weight."""
    margin_rule: Literal["hard_level", "kappaface"] = "hard_level"
    """Margins from our hard level, or KappaFace's share of head.margin; that reads none of the next four settings."""
    direction: Literal[-1, 0, 1] = -1
    """+1: harder classes get larger margins; -1: smaller; 0: one margin for all."""
    margin_delta: float = 0.1
    """Delta, the largest shift of a class margin before it is clipped and centred."""
    margin_low: float = 0.35
    """Smallest class margin. (Samples that look mislabelled get the smallest that any class has.)"""
    margin_high: float = 0.65
    """Largest class margin."""
    temperature: float = 0.1
    """tau of the contrastive loss."""
    contrastive_weight: float = 0.5
    """lambda_scc: pull features to their cluster centre."""
    alignment_weight: float = 0.1
    """lambda_al: align class centres with their cluster centres."""
    hard_negatives: int = 0
    """With head.sample_rate below 1: nearest other classes of each row's class that also take part in a step."""

    def __post_init__(self) -> None:
        at = "clustering."
        require(0 <= self.extra_clusters <= 4, at + "extra_clusters", self.extra_clusters, "0 to 4")
        require(self.iterations >= 1, at + "iterations", self.iterations, "at least 1")
        require(self.refresh_epochs > 0, at + "refresh_epochs", self.refresh_epochs, "more than 0")
        require(0 < self.refresh_span <= 1, at + "refresh_span", self.refresh_span, "0 < span <= 1")
        for name in ("drop_from", "drop_kept"):
            require(0 <= getattr(self, name) <= 1, at + name, getattr(self, name), "0 to 1")
        require(self.block >= 0, at + "block", self.block, "0 or more")
        require(0 <= self.step_budget < 1, at + "step_budget", self.step_budget, "0 (no limit) to below 1")
        for name in ("bank_momentum", "centre_momentum", "hard_level_momentum"):
            value = getattr(self, name)
            require(0 <= value < 1, at + name, value, "0 <= momentum < 1")
        require(self.shrinkage >= 0, at + "shrinkage", self.shrinkage, "0 or more")
        for name in ("purity_weight", "warmup_fraction", "ramp_fraction"):
            value = getattr(self, name)
            require(0 <= value <= 1, at + name, value, "0 to 1")
        rules = ("hard_level", "kappaface")
        require(self.margin_rule in rules, at + "margin_rule", self.margin_rule, "hard_level or kappaface")
        require(self.direction in (-1, 0, 1), at + "direction", self.direction, "-1, 0 or 1")
        require(self.margin_delta >= 0, at + "margin_delta", self.margin_delta, "0 or more")
        require(0 <= self.noise_gap <= 2, at + "noise_gap", self.noise_gap, "0 to 2, a difference of cosines")
        require(
            0 <= self.margin_low <= self.margin_high < 1.5,
            at + "margin_low, margin_high",
            (self.margin_low, self.margin_high),
            "0 <= margin_low <= margin_high < 1.5",
        )
        require(
            self.temperature > 0.02,
            at + "temperature",
            self.temperature,
            "more than 0.02 (exp(1/tau) must fit float32)",
        )
        for name in ("contrastive_weight", "alignment_weight", "hard_negatives"):
            value = getattr(self, name)
            require(value >= 0, at + name, value, "0 or more")

    def num_clusters(self, classes: int) -> int:
        """K: one for each class, and `extra_clusters`."""
        return classes + round(self.extra_clusters * classes)
