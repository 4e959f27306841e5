"""Augmentation drawn before decoding: a pure function of (seed, epoch, sample id), for any loader to apply.

In this order: colours (brightness, contrast and saturation, or grey) as one affine map of RGB; made smaller by a
triangular filter and larger again; blurred by a Gaussian; rectangles made black, which is a crop's outside or an
occlusion. A flip comes last, so that rectangles lie at either side. With b, c, s the three factors, g = (0.299, 0.587,
0.114) and 1 a vector of ones

    x -> b (c (s x + (1 - s) 1 g.x) + 127.5 (1 - c))        of bytes, rounded and cut to 0 … 255

Ours, after what AdaFace (arXiv 2204.00964) and insightface's pipeline do to images; formulas and ranges are our own.

Legend: B rows of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from configs.augment import AugmentConfig
from data.loading.decode import Pixels
from data.order.hashing import AUGMENT, keys, mix

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]
_Uniform = Callable[[str], npt.NDArray[np.float64]]
_Within = Callable[[str, float, float], npt.NDArray[np.float64]]

BOXES = 5
"""Rectangles that become black: four round a crop, and an occlusion."""
_GREY = np.array([0.299, 0.587, 0.114])
_MIDDLE = 127.5
_LEAST_SIGMA = 0.3
_RATIO = 4 / 3
"""Sides of rectangles relate as 1 to at most this."""
_NAMES = (
    *("colour", "brightness", "contrast", "saturation", "grey", "low_resolution", "side", "blur", "sigma"),
    *("crop", "crop_area", "crop_ratio", "crop_top", "crop_left"),
    *("occlusion", "occlusion_area", "occlusion_ratio", "occlusion_top", "occlusion_left"),
)
"""What is drawn of each sample, a uniform number each; new ones only at the end, or every run changes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawn:
    """What happens to each image of a batch."""

    matrix_B33: Floats
    shift_B3: Floats
    """RGB becomes matrix RGB + shift."""
    sides_B2: Ints
    """Height and width to which it is shrunk."""
    sigma_B: Floats
    """0: no blur."""
    boxes_BK4: Ints
    """Top, left, height, width; of height 0: none."""

    @classmethod
    def nothing(cls, count: int, size: tuple[int, int]) -> Drawn:
        """size: (height, width)."""
        return cls(
            matrix_B33=np.tile(np.eye(3, dtype=np.float32), (count, 1, 1)),
            shift_B3=np.zeros((count, 3), np.float32),
            sides_B2=np.tile(np.array(size, np.int32), (count, 1)),
            sigma_B=np.zeros(count, np.float32),
            boxes_BK4=np.zeros((count, BOXES, 4), np.int32),
        )

    def take(self, rows_B: npt.NDArray[np.int64]) -> Drawn:
        """Of other rows."""
        return Drawn(**{field.name: getattr(self, field.name)[rows_B] for field in fields(self)})

    @property
    def windows_B(self) -> Ints:
        """Sides of the blur's kernels, odd; 1 where there is none."""
        return (2 * np.ceil(3 * self.sigma_B) + 1).astype(np.int32)


class Augment:
    """Draws what happens to samples of one run."""

    def __init__(self, config: AugmentConfig, *, size: tuple[int, int], seed: int) -> None:
        """size: (height, width) of the images."""
        self.config, self._size, self._seed = config, size, seed
        self.idle = config.idle
        self.colours = config.colour > 0 or config.grey > 0
        """Whether any image's may change; the next three alike."""
        self.shrinks = config.low_resolution > 0
        self.blurs = config.blur > 0
        self.covers = config.crop > 0 or config.occlusion > 0

    def draw(self, samples_B: npt.NDArray[np.int64], epoch: int) -> Drawn:
        """samples_B: int64 sample ids."""
        c, count = self.config, len(samples_B)
        drawn = Drawn.nothing(count, self._size)
        if self.idle or not count:
            return drawn
        key_of = dict(zip(_NAMES, keys(len(_NAMES), seed=self._seed, epoch=epoch, purpose=AUGMENT), strict=True))
        ids_B = samples_B.astype(np.uint64)

        def uniform(name: str) -> npt.NDArray[np.float64]:
            return (mix(mix(ids_B ^ key_of[name])) >> np.uint64(11)).astype(np.float64) * 2.0**-53

        def within(name: str, low: float, high: float) -> npt.NDArray[np.float64]:
            return low + (high - low) * uniform(name)

        if self.colours:
            changed_B = uniform("colour") < c.colour
            brightness_B, contrast_B, saturation_B = (
                np.where(changed_B, within(name, 1 - c.colour_range, 1 + c.colour_range), 1.0)
                for name in ("brightness", "contrast", "saturation")
            )
            saturation_B = np.where(uniform("grey") < c.grey, 0.0, saturation_B)
            of_grey_33 = np.ones((3, 1)) * _GREY
            matrix_B33 = saturation_B[:, None, None] * (np.eye(3) - of_grey_33) + of_grey_33
            plain_B = (saturation_B == 1) & ~changed_B  # exactly nothing, whatever rounding says of the sum above
            matrix_B33 = np.where(plain_B[:, None, None], np.eye(3), matrix_B33)
            drawn.matrix_B33[:] = (brightness_B * contrast_B)[:, None, None] * matrix_B33
            drawn.shift_B3[:] = (brightness_B * _MIDDLE * (1 - contrast_B))[:, None]
        if self.shrinks:
            share_B = np.where(
                uniform("low_resolution") < c.low_resolution, within("side", c.low_resolution_side, 1), 1
            )
            drawn.sides_B2[:] = np.maximum(1, np.rint(share_B[:, None] * np.array(self._size)))
        if self.blurs:
            sigma_B = within("sigma", min(_LEAST_SIGMA, c.blur_sigma), c.blur_sigma)
            drawn.sigma_B[:] = np.where(uniform("blur") < c.blur, sigma_B, 0)
        if self.covers:
            self._boxes(drawn, uniform, within)
        return drawn

    def _boxes(self, drawn: Drawn, uniform: _Uniform, within: _Within) -> None:
        H, W = self._size
        c = self.config

        def rectangles(name: str, low: float, high: float) -> list[Ints]:
            area_B = within(f"{name}_area", low, high)
            ratio_B = _RATIO ** within(f"{name}_ratio", -0.5, 0.5)
            height_B = np.clip(np.rint(H * np.sqrt(area_B) * ratio_B), 1, H)
            width_B = np.clip(np.rint(W * np.sqrt(area_B) / ratio_B), 1, W)
            top_B = np.floor(uniform(f"{name}_top") * (H + 1 - height_B))
            left_B = np.floor(uniform(f"{name}_left") * (W + 1 - width_B))
            return [values.astype(np.int32) for values in (top_B, left_B, height_B, width_B)]

        top_B, left_B, height_B, width_B = rectangles("crop", c.crop_area, 1.0)
        zero_B, whole_B = np.zeros_like(top_B), np.full_like(top_B, W)
        round_it = (
            (zero_B, zero_B, top_B, whole_B),
            (top_B + height_B, zero_B, H - top_B - height_B, whole_B),
            (top_B, zero_B, height_B, left_B),
            (top_B, left_B + width_B, height_B, W - left_B - width_B),
        )
        cropped_B = uniform("crop") < c.crop
        for number, box in enumerate(round_it):
            drawn.boxes_BK4[cropped_B, number] = np.stack(box, 1)[cropped_B]
        least = min(0.02, c.occlusion_area)
        covered_B = uniform("occlusion") < c.occlusion
        drawn.boxes_BK4[covered_B, 4] = np.stack(rectangles("occlusion", least, c.occlusion_area), 1)[covered_B]


def apply_(pixels: Pixels, drawn: Drawn, row: int) -> None:
    """Do to an image, uint8 (H, W, 3) RGB in place, what was drawn of that row."""
    matrix_33, shift_3 = drawn.matrix_B33[row], drawn.shift_B3[row]
    if shift_3.any() or not np.array_equal(matrix_33, _IDENTITY):
        cv2.transform(pixels, np.hstack([matrix_33, shift_3[:, None]]), dst=pixels)
    height, width = drawn.sides_B2[row].tolist()
    if (height, width) != pixels.shape[:2]:
        small = Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)  # triangular when it shrinks
        cv2.resize(np.asarray(small), pixels.shape[1::-1], dst=pixels, interpolation=cv2.INTER_LINEAR)
    if sigma := float(drawn.sigma_B[row]):
        window = 2 * math.ceil(3 * np.float32(sigma)) + 1
        kernel = cv2.getGaussianKernel(window, sigma, cv2.CV_32F)
        cv2.sepFilter2D(
            pixels, -1, kernel, kernel, dst=pixels
        )  # a third of GaussianBlur's time, which rounds otherwise
    for top, left, height, width in drawn.boxes_BK4[row].tolist():
        pixels[top : top + height, left : left + width] = 0


_IDENTITY = np.eye(3, dtype=np.float32)
