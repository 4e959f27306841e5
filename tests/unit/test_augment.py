"""Augmentations: drawn alike whoever asks, applied as float64 arithmetic says, and by both loaders alike."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F

from configs.augment import AugmentConfig
from configs.checks import ConfigError
from data.loading.augment import BOXES, Augment, Drawn, apply_
from data.loading.batch import Batch
from data.loading.loader import build_loader
from tests.image_cases import MemorySet, jpeg

SIZE = (112, 112)
EVERYTHING = AugmentConfig(colour=0.5, grey=0.2, low_resolution=0.4, blur=0.4, crop=0.4, occlusion=0.4)
IDS = np.arange(4000, dtype=np.int64)
GOOD = MemorySet([jpeg(seed, quality=60 + seed % 40) for seed in range(53)])


def _drawn(config: AugmentConfig = EVERYTHING, ids: Any = IDS, *, seed: int = 1, epoch: int = 2) -> Drawn:
    return Augment(config, size=SIZE, seed=seed).draw(ids, epoch)


def _differs(one: Drawn, other: Drawn) -> bool:
    return not all(np.array_equal(getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(one))


def test_what_is_drawn_depends_on_seed_epoch_and_sample_alone() -> None:
    drawn, some = _drawn(), IDS[[7, 3999, 12]]
    assert not _differs(_drawn(ids=some), drawn.take(some))
    assert _differs(_drawn(seed=2), drawn)
    assert _differs(_drawn(epoch=3), drawn)
    one_kind = _drawn(AugmentConfig(blur=0.4))
    assert np.array_equal(one_kind.sigma_B, drawn.sigma_B), "whatever else is switched on"


def test_each_comes_as_often_as_asked_within_its_range() -> None:
    drawn = _drawn()
    grey_B = np.ptp(drawn.matrix_B33, axis=1).max(1) < 1e-6  # rows alike
    coloured_B = (drawn.matrix_B33 != np.eye(3)).any((1, 2))
    cropped_B = (drawn.boxes_BK4[:, :4, 2] * drawn.boxes_BK4[:, :4, 3] > 0).any(1)
    shares = {
        0.2: grey_B,
        0.5 + 0.5 * 0.2: coloured_B,
        0.4: drawn.sigma_B > 0,
    }
    for share, chosen_B in shares.items():
        assert chosen_B.mean() == pytest.approx(share, abs=0.03)
    assert cropped_B.mean() == pytest.approx(0.4, abs=0.03)
    assert (drawn.boxes_BK4[:, 4, 2] > 0).mean() == pytest.approx(0.4, abs=0.03)
    assert (drawn.sides_B2[:, 0] < 112).mean() == pytest.approx(0.4, abs=0.03)
    assert 22 <= drawn.sides_B2.min() < 25
    assert drawn.sides_B2.max() == 112
    assert 0.3 <= drawn.sigma_B[drawn.sigma_B > 0].min() < 0.35
    assert 1.9 < drawn.sigma_B.max() <= 2.0
    area_B = drawn.boxes_BK4[:, 4, 2] * drawn.boxes_BK4[:, 4, 3] / 112**2
    assert 0.23 < area_B.max() < 0.26
    stays_B = 1 - (drawn.boxes_BK4[:, :4, 2] * drawn.boxes_BK4[:, :4, 3]).sum(1) / 112**2
    assert 0.19 < stays_B.min() < 0.22
    assert (drawn.boxes_BK4 >= 0).all()
    assert (drawn.boxes_BK4[..., 0] + drawn.boxes_BK4[..., 2] <= 112).all()
    assert (drawn.boxes_BK4[..., 1] + drawn.boxes_BK4[..., 3] <= 112).all()
    # Middles of rectangles are all over the image.
    middle_B = drawn.boxes_BK4[:, 4, 1] + drawn.boxes_BK4[:, 4, 3] / 2
    assert middle_B[area_B > 0].std() > 15


def test_nothing_asked_for_is_nothing() -> None:
    augment = Augment(AugmentConfig(), size=SIZE, seed=1)
    assert augment.idle
    assert not _differs(augment.draw(IDS, 1), Drawn.nothing(len(IDS), SIZE))
    pixels = _face()
    apply_(pixels, augment.draw(IDS, 1), 5)
    assert np.array_equal(pixels, _face())
    assert _drawn(ids=IDS[:0]).sigma_B.shape == (0,)


def _face(seed: int = 0) -> npt.NDArray[np.uint8]:
    """Smooth, in colours that no augmentation cuts much off."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 14, 14, generator=generator) * 160 + 40
    pixels = F.interpolate(coarse, SIZE, mode="bicubic", align_corners=False)[0].permute(1, 2, 0)
    return pixels.clamp(0, 255).round().byte().contiguous().numpy()


def _only(**changes: Any) -> Drawn:
    drawn = Drawn.nothing(1, SIZE)
    return dataclasses.replace(drawn, **changes)


def _off(found: npt.NDArray[np.uint8], truth: npt.NDArray[np.float64]) -> float:
    return float(np.abs(found - np.clip(truth, 0, 255)).max())


def test_colours_are_the_formula() -> None:
    augment = Augment(AugmentConfig(colour=1.0), size=SIZE, seed=0)
    for sample in range(20):
        drawn, pixels = augment.draw(np.array([sample]), 0), _face(sample)
        weights = np.array([0.299, 0.587, 0.114])
        matrix, shift = drawn.matrix_B33[0].astype(np.float64), drawn.shift_B3[0].astype(np.float64)
        # Of an affine map: brightness and contrast from what becomes of grey, saturation from the rest.
        gain = matrix.sum(1)[0]
        saturation = (matrix[1, 1] / gain - weights[1]) / (1 - weights[1])
        b = (shift[0] + 127.5 * gain) / 127.5
        c = gain / b
        assert 0.5 <= b <= 1.5
        assert 0.5 <= c <= 1.5
        x = pixels.astype(np.float64)
        grey = (x @ weights)[..., None]
        s = (matrix[0, 0] / gain - weights[0]) / (1 - weights[0])
        assert saturation == pytest.approx(s, abs=1e-3)
        assert 0.5 - 1e-6 <= s <= 1.5 + 1e-6
        truth = b * (c * (s * x + (1 - s) * grey) + 127.5 * (1 - c))
        apply_(pixels, drawn, 0)
        assert _off(pixels, truth) <= 0.75  # of a fixed-point product


def test_grey_has_no_colours() -> None:
    drawn, pixels = Augment(AugmentConfig(grey=1.0), size=SIZE, seed=0).draw(np.array([3]), 0), _face()
    truth = np.repeat((_face().astype(np.float64) @ [0.299, 0.587, 0.114])[..., None], 3, 2)
    apply_(pixels, drawn, 0)
    assert _off(pixels, truth) <= 0.75  # of a fixed-point product
    assert np.ptp(pixels, axis=2).max() == 0


@pytest.mark.parametrize("side", [22, 57, 100])
def test_low_resolution_is_a_triangular_filter_and_back(side: int) -> None:
    pixels = _face(side)
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None].double()
    small = F.interpolate(x, (side, side), mode="bilinear", antialias=True, align_corners=False)
    truth = F.interpolate(small, SIZE, mode="bilinear", align_corners=False)[0].permute(1, 2, 0).numpy()
    apply_(pixels, _only(sides_B2=np.array([[side, side]], np.int32)), 0)
    assert _off(pixels, truth) <= 1.6
    assert side == 100 or np.abs(pixels - _face(side).astype(int)).mean() > 0.5


@pytest.mark.parametrize("sigma", [0.3, 1.0, 1.9])
def test_blur_is_a_gaussian(sigma: float) -> None:
    drawn, pixels = _only(sigma_B=np.array([sigma], np.float32)), _face()
    radius = int(drawn.windows_B[0]) // 2
    assert radius == int(np.ceil(3 * np.float32(sigma)))
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    kernel /= kernel.sum()
    x = np.pad(pixels.astype(np.float64), ((radius, radius), (radius, radius), (0, 0)), mode="reflect")
    for axis in (0, 1):
        x = np.apply_along_axis(lambda line: np.convolve(line, kernel, "valid"), axis, x)
    apply_(pixels, drawn, 0)
    assert _off(pixels, x) <= 1.0


def test_rectangles_are_black_and_the_rest_as_before() -> None:
    boxes = np.zeros((1, BOXES, 4), np.int32)
    boxes[0, 0], boxes[0, 4] = (0, 0, 10, 112), (50, 100, 20, 12)
    pixels = _face()
    apply_(pixels, _only(boxes_BK4=boxes), 0)
    black = np.zeros(SIZE, bool)
    black[:10] = black[50:70, 100:] = True
    assert (pixels[black] == 0).all()
    assert np.array_equal(pixels[~black], _face()[~black])


def _batches(backend: Any, config: AugmentConfig, records: Any = GOOD, **changes: Any) -> list[Batch]:
    settings: dict[str, Any] = {"batch_size": 8, "rank": 0, "world_size": 1, "seed": 3, "threads": 2, "prefetch": 2}
    settings |= {"flip": True, "device": torch.device("cpu"), "augment": config} | changes
    return list(build_loader(records, backend=backend, **settings).epoch(1))


TOLERANCES = {
    "colours": (AugmentConfig(colour=1.0), 1),
    "grey": (AugmentConfig(grey=0.5), 1),
    "low resolution": (AugmentConfig(low_resolution=1.0), 4),
    "blur": (AugmentConfig(blur=1.0), 1),
    "crop": (AugmentConfig(crop=1.0), 0),
    "occlusion": (AugmentConfig(occlusion=1.0), 0),
    "all": (EVERYTHING, 6),
}
"""Grey levels by which DALI may differ on CPUs, where its decoder is the same."""


@pytest.mark.parametrize("name", TOLERANCES)
def test_both_loaders_do_the_same(name: str) -> None:
    pytest.importorskip("nvidia.dali")
    config, tolerance = TOLERANCES[name]
    ours, dalis, plain = _batches("cpu", config), _batches("dali", config), _batches("cpu", AugmentConfig())
    changed = 0
    for a, b, c in zip(ours, dalis, plain, strict=True):
        assert a.sample_ids.equal(b.sample_ids)
        assert a.sample_ids.equal(c.sample_ids)
        difference = (a.images.int() - b.images.int()).abs()
        assert difference.max() <= tolerance
        assert difference.float().mean() <= 0.5
        changed += int((a.images != c.images).any(1).any(1).any(1).sum())
    assert changed > 8


@pytest.mark.parametrize("backend", ["cpu", "dali"])
def test_ranks_and_a_bad_image(backend: str) -> None:
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    (whole, *_), parts = (
        _batches(backend, EVERYTHING),
        [_batches(backend, EVERYTHING, batch_size=4, rank=rank, world_size=2)[0] for rank in range(2)],
    )
    assert torch.cat([part.images for part in parts]).equal(whole.images)
    bad = int(whole.sample_ids[3])
    encoded = [jpeg(seed, quality=60 + seed % 40) for seed in range(53)]
    encoded[bad] = b"\xff\xd8 no image"
    first = _batches(backend, EVERYTHING, MemorySet(encoded))[0]
    assert first.labels[3] == -1
    assert first.images[3].equal(whole.images[4]), "the next good image with what was drawn of that"
    assert first.images[4:].equal(whole.images[4:])


@pytest.mark.parametrize("setting", [{"blur": 1.1}, {"crop_area": 0.0}, {"blur_sigma": 0.0}, {"colour_range": -0.1}])
def test_settings_out_of_range(setting: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"augment.{next(iter(setting))}"):
        AugmentConfig(**setting)
