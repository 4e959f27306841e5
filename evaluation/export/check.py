"""Does an exported file give what the backbone gives? Compared on noise, drawn faces and flat images.

Legend: B images, H, W pixels, D components of an embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from backbones import IMAGE_SIZE, Backbone, normalise_pixels
from data.synthetic import SyntheticFaces
from evaluation.export.form import ExportError

LIMIT = 1e-4
"""The largest difference that is let pass, of any component, in lengths of the embedding."""
BATCHES = (1, 2, 7)
_SEED = 0


def check_images() -> npt.NDArray[np.uint8]:
    """Pixels (20, 112, 112, 3): ten of noise; seven drawn faces, a slope of grey, all black, all white."""
    height, width = IMAGE_SIZE
    noise = np.random.default_rng(_SEED).integers(0, 256, (sum(BATCHES), height, width, 3), np.uint8)
    faces = SyntheticFaces(identities=sum(BATCHES) - 3, seed=_SEED)
    drawn = [faces.pixels(identity, 0) for identity in range(faces.identities)]
    slope = np.broadcast_to(np.linspace(0, 255, width).astype(np.uint8)[None, :, None], (height, width, 3))
    return np.stack([*noise, *drawn, slope, np.zeros_like(slope), np.full_like(slope, 255)])


@torch.no_grad()
def worst_difference(network: Callable[[Tensor], Tensor], exported: Backbone, *, unit: bool) -> float:
    """Of components, the network's against the file's, in lengths of the network's, over `check_images` in `BATCHES`.

    network: from images float32 -1 … 1 to embeddings. unit: whether the file scales them to length 1. Raises
    ExportError above `LIMIT`, and where embeddings are not finite.
    """
    worst = 0.0
    for images_BHW3 in _batches():
        x_B3HW = normalise_pixels(torch.from_numpy(images_BHW3).permute(0, 3, 1, 2))
        expected_BD, found_BD = (embedded(x_B3HW).double() for embedded in (network, exported))
        if unit:
            expected_BD = nn.functional.normalize(expected_BD)
        if not bool(expected_BD.isfinite().all()):
            raise ExportError("the backbone's embeddings are not finite: are these weights of a diverged training?")
        if expected_BD.shape != found_BD.shape:
            raise ExportError(f"expected embeddings {tuple(expected_BD.shape)}, the file gives {tuple(found_BD.shape)}")
        length_B1 = expected_BD.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        worst = max(worst, float(((expected_BD - found_BD).abs() / length_B1).nan_to_num(torch.inf).max()))
    if worst > LIMIT:
        raise ExportError(
            f"expected what the backbone gives, to {LIMIT:g} in unit embeddings; the file differs by {worst:.1e}: "
            "nothing was written; try other versions of torch and onnxruntime"
        )
    return worst


def _batches() -> Iterator[npt.NDArray[np.uint8]]:
    images = check_images()
    for half in np.split(images, 2):
        start = 0
        for size in BATCHES:
            yield half[start : start + size]
            start += size
