"""Settings of what a run shows of itself beside scalars: pictures in TensorBoard, traces of the profiler."""

from __future__ import annotations

from dataclasses import dataclass

from configs.checks import require

_MOST_CLASSES = 50
_MOST_PICTURES = 10_000
_MOST_STEPS = 100
"""Of a trace: so many of a ResNet-50 on a GPU are some hundred thousand events, which are written amid training."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorBoardConfig:
    """Pictures in TensorBoard, which hold faces of the training and the verification set (docs/operating.md)."""

    sheet_classes: int = 5
    """Hardest, and easiest, classes of which images are shown after each publication of clusters; 0: none."""
    projector_images: int = 1000
    """Images of the first verification set that the embedding projector gets at the end of the run; 0: none."""

    def __post_init__(self) -> None:
        for name, most in (("sheet_classes", _MOST_CLASSES), ("projector_images", _MOST_PICTURES)):
            value = getattr(self, name)
            require(0 <= value <= most, "tensorboard." + name, value, f"0 (none) to {most}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfileConfig:
    """A trace of some steps by torch.profiler (docs/operating.md)."""

    steps: int = 0
    """Optimizer steps that are traced; 0: none."""
    after: int = 10
    """Steps that this process trains before them; during the last of these the profiler warms up."""
    all_ranks: bool = False
    """A trace of every rank, not of rank 0 alone."""

    def __post_init__(self) -> None:
        require(0 <= self.steps <= _MOST_STEPS, "profile.steps", self.steps, f"0 (none) to {_MOST_STEPS}")
        require(self.after >= 2, "profile.after", self.after, "at least 2")
