"""Settings of the augmentations: how often each comes, and how strong it may be."""

from __future__ import annotations

from dataclasses import dataclass

from configs.checks import require


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentConfig:
    """What happens to training images beside the flip; nothing by default. Both loaders do the same (docs/data.md)."""

    colour: float = 0.0
    """Share of the images whose brightness, contrast and saturation change, each by a factor of its own."""
    colour_range: float = 0.5
    """Factors are 1 - range … 1 + range."""
    grey: float = 0.0
    """Share that loses its colours."""
    low_resolution: float = 0.0
    """Share that is made smaller and as large as before again."""
    low_resolution_side: float = 0.2
    """Down to this share of the side, at the least."""
    blur: float = 0.0
    """Share that is blurred by a Gaussian."""
    blur_sigma: float = 2.0
    """Its largest standard deviation, in pixels."""
    crop: float = 0.0
    """Share of which only a rectangle stays; the rest is black."""
    crop_area: float = 0.2
    """The rectangle has this share of the area, at the least."""
    occlusion: float = 0.0
    """Share in which a rectangle is black."""
    occlusion_area: float = 0.25
    """The rectangle has this share of the area, at the most."""

    def __post_init__(self) -> None:
        at = "augment."
        for name in ("colour", "colour_range", "grey", "low_resolution", "blur", "crop", "occlusion"):
            require(0 <= getattr(self, name) <= 1, at + name, getattr(self, name), "0 to 1")
        for name in ("low_resolution_side", "crop_area", "occlusion_area"):
            require(0.02 <= getattr(self, name) <= 1, at + name, getattr(self, name), "0.02 to 1")
        require(0 < self.blur_sigma <= 10, at + "blur_sigma", self.blur_sigma, "more than 0, to 10 pixels")

    @property
    def idle(self) -> bool:
        """Whether nothing ever happens."""
        return not (self.colour or self.grey or self.low_resolution or self.blur or self.crop or self.occlusion)
