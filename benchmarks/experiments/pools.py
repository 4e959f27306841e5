"""Images and features of both kinds of data, drawn once and kept: the stock from which every training set is taken.

A pool has I identities with M images each. The first PREPARED identities train a small network, by plain ArcFace on
clean labels; the others, which it has never seen, are described by what its last convolution gives, reduced to FEATURES
numbers. These features stand for images in the cheap tier: rich enough to learn from, not solved beforehand.

Legend: I identities, M images of each, S side of an image, F numbers of a feature.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import torch
from rich.progress import track
from torch import Tensor

from benchmarks.experiments import glyphs
from benchmarks.experiments.fitting import Recipe, fit
from benchmarks.experiments.nets import SmallCNN
from configs.head import HeadConfig
from configs.schema import OptimConfig
from data.synthetic import SyntheticFaces

IDENTITIES = 1600
IMAGES = 24
PREPARED = 400
FEATURES = 192
KINDS = ("faces", "glyphs")
_SEED = 77
_RECIPE = Recipe(
    epochs=10,
    batch=128,
    head=HeadConfig(margin=0.3, scale=24.0),
    optim=OptimConfig(lr=0.1, reference_batch=0, warmup_epochs=1),
)


@dataclass(frozen=True, slots=True)
class Pool:
    """Of the identities that the small network has not seen."""

    kind: str
    images: npt.NDArray[np.uint8]
    """(I, M, S, S)."""
    features: npt.NDArray[np.float32]
    """(I, M, F), standard deviation 1 over all numbers."""


def open_pool(kind: str, folder: Path) -> Pool:
    """Read it, or draw and describe it first (some minutes). Raises glyphs.MissingFontsError."""
    file = folder / f"{kind}.npz"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        images = _draw_faces() if kind == "faces" else _draw_glyphs()
        features = describe(images)
        part = file.with_suffix(".part.npz")
        np.savez(part, images=images[PREPARED:], features=features)
        os.replace(part, file)
    with np.load(file, allow_pickle=False) as stored:
        return Pool(kind, stored["images"], stored["features"])


def fingerprint(pool: Pool) -> str:
    """Tells pools apart: fonts and processors differ between machines."""
    return hashlib.sha256(pool.images.tobytes() + pool.features.tobytes()).hexdigest()[:12]


def _in_processes(draw: Callable[[int], npt.NDArray[np.uint8]], said: str) -> npt.NDArray[np.uint8]:
    with ProcessPoolExecutor() as processes:
        drawn = processes.map(draw, range(IDENTITIES), chunksize=8)
        return np.stack(list(track(drawn, said, total=IDENTITIES)))


def _draw_faces() -> npt.NDArray[np.uint8]:
    return _in_processes(_face, "drawing faces")


def _face(identity: int) -> npt.NDArray[np.uint8]:
    faces = SyntheticFaces(identities=IDENTITIES, seed=_SEED)
    size = (glyphs.SIDE, glyphs.SIDE)
    grey = [cv2.cvtColor(faces.pixels(identity, image), cv2.COLOR_RGB2GRAY) for image in range(IMAGES)]
    return np.stack([cv2.resize(image, size, interpolation=cv2.INTER_AREA) for image in grey])


def _draw_glyphs() -> npt.NDArray[np.uint8]:
    return glyphs.draw(IDENTITIES, IMAGES, seed=_SEED)


def normalised(images: npt.NDArray[np.uint8]) -> Tensor:
    """(..., S, S) to float32 (N, 1, S, S), each image of mean 0 and about deviation 1 (flat ones less)."""
    x = torch.from_numpy(images).reshape(-1, 1, *images.shape[-2:]).float()
    return (x - x.mean((2, 3), keepdim=True)) / (x.std((2, 3), keepdim=True) + 8)


def describe(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Features of all but the first PREPARED identities, (I - PREPARED, M, F)."""
    M = images.shape[1]
    x = normalised(images)
    prepared = x[: PREPARED * M]
    labels = torch.arange(PREPARED).repeat_interleave(M)
    net = SmallCNN(embedding_size=128)
    fit(net, prepared, labels, num_classes=PREPARED, recipe=_RECIPE, augment=shifted, seed=_SEED)
    with torch.no_grad():
        described = torch.cat([net.convolved(part) for part in x.split(1024)])
    known = described[: PREPARED * M : 4]
    mean = known.mean(0)
    _, deviation, axes = torch.linalg.svd(known - mean, full_matrices=False)
    # Between the plain axes, which a few directions would rule, and whitened ones, which would amplify noise.
    scaled = axes[:FEATURES].T / (deviation[:FEATURES] / len(known) ** 0.5).sqrt()
    features = (described[PREPARED * M :] - mean) @ scaled
    features /= features.std()
    numbers: npt.NDArray[np.float32] = features.reshape(-1, M, FEATURES).numpy()
    return numbers


def shifted(x: Tensor, generator: torch.Generator) -> Tensor:
    """A batch of images moved by up to two pixels, all alike."""
    down, right = torch.randint(-2, 3, (2,), generator=generator).tolist()
    return x.roll((down, right), (2, 3))
