"""Faces that are drawn: deterministic, unlimited, of known identity, difficulty and label noise. No real person.

Everything is a pure function of (seed, identity, image number), so any process can draw any image at any time.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt
import simplejpeg

from data.errors import DataError
from data.faces.drawing import Pixels, draw_face
from data.faces.traits import Circumstances, Traits, draw_circumstances, draw_traits

DIFFICULTY_SPREAD = 0.7
"""What `python -m data pack synthetic` and tests take."""

_TRAITS, _CIRCUMSTANCES, _SENSOR, _PLAN = range(4)
_STEEPEST = 20.0
"""Images of the largest class for each of the smallest, at a long tail of 1."""


class SyntheticFaces:
    """Persons first_identity … first_identity + identities - 1 of a seed, numbered from 0 here.

    difficulty_spread: 0 gives the images of all persons the same difficulty, 1 any, from studio portraits to blurred,
    turned, covered and badly lit ones. Raises DataError for counts or a spread out of range.
    """

    def __init__(
        self, *, identities: int, seed: int, first_identity: int = 0, difficulty_spread: float = DIFFICULTY_SPREAD
    ) -> None:
        if identities < 1 or seed < 0 or first_identity < 0 or not 0 <= difficulty_spread <= 1:
            raise DataError(
                "synthetic faces: expected identities >= 1, seed >= 0, first_identity >= 0 and 0 <= difficulty_spread "
                f"<= 1, got {identities=}, {seed=}, {first_identity=}, {difficulty_spread=}"
            )
        self.identities, self.seed, self.first_identity = identities, seed, first_identity
        self.difficulty_spread = difficulty_spread
        self._traits = lru_cache(maxsize=64)(self._draw_traits)

    def traits(self, identity: int) -> Traits:
        """The person. Raises IndexError when there is no such identity."""
        if not 0 <= identity < self.identities:
            raise IndexError(f"identity {identity}: expected 0 to {self.identities - 1}")
        return self._traits(identity)

    def difficulty(self, identity: int) -> float:
        """0 … 1: how strongly circumstances vary between the person's images; the truth behind a hard level."""
        return self.traits(identity).difficulty

    def circumstances(self, identity: int, image: int) -> Circumstances:
        """How an image of a person came about; images are numbered from 0 and have no end."""
        return draw_circumstances(self._rng(_CIRCUMSTANCES, identity, image), self.traits(identity))

    def pixels(self, identity: int, image: int) -> Pixels:
        """RGB uint8 (112, 112, 3), before compression."""
        return self._draw(identity, image, self.circumstances(identity, image))

    def jpeg(self, identity: int, image: int) -> bytes:
        """The image as a camera would have stored it."""
        circumstances = self.circumstances(identity, image)
        pixels = self._draw(identity, image, circumstances)
        return bytes(simplejpeg.encode_jpeg(pixels, circumstances.quality, colorsubsampling="420"))

    def _draw(self, identity: int, image: int, circumstances: Circumstances) -> Pixels:
        return draw_face(self.traits(identity), circumstances, self._rng(_SENSOR, identity, image))

    def _draw_traits(self, identity: int) -> Traits:
        return draw_traits(self._rng(_TRAITS, identity, 0), spread=self.difficulty_spread)

    def _rng(self, purpose: int, identity: int, image: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, purpose, self.first_identity + identity, image])


def plan_samples(
    *, identities: int, images_per_identity: int, long_tail: float, label_noise: float, seed: int
) -> npt.NDArray[np.int64]:
    """Which images a set has, and under which label: rows (identity, image number, label), int64 (N, 3), by identity.

    long_tail: 0 gives every identity `images_per_identity` images; above, numbers fall exponentially over the
    identities, in an order drawn by the seed, from that many down to a 20^-long_tail part of them (the usual profile
    of long-tailed benchmarks, arXiv 1901.05555), at least one. label_noise: this share of all images, rounded, gets
    the label of another identity, each other one with the same chance. Raises DataError for values out of range.
    """
    if identities < 2 or images_per_identity < 1 or not 0 <= long_tail <= 1 or not 0 <= label_noise <= 1 or seed < 0:
        raise DataError(
            "plan of synthetic faces: expected identities >= 2, images_per_identity >= 1, 0 <= long_tail <= 1, "
            "0 <= label_noise <= 1 and seed >= 0, got "
            f"{identities=}, {images_per_identity=}, {long_tail=}, {label_noise=}, {seed=}"
        )
    rng = np.random.default_rng([seed, _PLAN])
    place = rng.permutation(identities) / (identities - 1)
    counts = np.maximum(1, np.rint(images_per_identity * _STEEPEST ** (-long_tail * place))).astype(np.int64)
    identity = np.repeat(np.arange(identities), counts)
    image = np.concatenate([np.arange(count) for count in counts])
    wrong = rng.permutation(len(identity))[: round(label_noise * len(identity))]
    label = identity.copy()
    label[wrong] = (identity[wrong] + rng.integers(1, identities, len(wrong))) % identities
    return np.stack([identity, image, label], axis=1)
