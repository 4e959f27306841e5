"""Embeddings for evaluation: any number of ranks gives those of one, mirror images summed, errors alike on all."""

from __future__ import annotations

import re
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from backbones import Backbone, build_backbone, normalise_pixels
from data.errors import DataError
from evaluation.embed import embed
from evaluation.embed.embed import embed_images
from evaluation.pairs import embed_pairs
from tests.image_cases import damaged_images, jpeg, odd_images, picture
from tests.ranks import WORLD_SIZES, RankPool


class _Toy(Backbone):
    """Two layers, of which left and right are not alike, with a part for every way that training mode shows."""

    def __init__(self) -> None:
        super().__init__(embedding_size=6)
        self.conv = nn.Conv2d(3, 4, 16, stride=16)
        self.norm = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(0.5)
        self.linear = nn.Linear(4 * 49, 6)

    def body(self, images_B3HW: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(images_B3HW)))

    def head(self, features_BCHW: Tensor) -> Tensor:
        return self.linear(self.dropout(features_BCHW.flatten(1)))


def _toy() -> _Toy:
    """The same on every rank, in training mode, with running statistics that a batch does not have."""
    torch.manual_seed(5)
    toy = _Toy()
    toy.norm.running_mean = torch.randn(4)
    toy.norm.running_var = torch.rand(4) + 0.5
    return toy.train()


def _pixels(count: int) -> npt.NDArray[np.uint8]:
    return np.stack([picture(seed) for seed in range(count)])


def _one_by_one(images: npt.NDArray[np.uint8]) -> Tensor:
    """What embed_images promises, written plainly: each image alone and mirrored by NumPy."""
    toy, rows = _toy().eval(), []
    with torch.no_grad():
        for image in images:
            sides = np.stack([image, image[:, ::-1]]).transpose(0, 3, 1, 2)
            rows.append(toy(normalise_pixels(torch.from_numpy(sides.copy()))).sum(0))
    return torch.stack(rows)


def _embedded(group: dist.ProcessGroup | None, count: int, batch_size: int) -> Tensor:
    return embed_images(_toy(), _pixels(count), batch_size=batch_size, group=group)


def _close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)


# ---- ranks and batches -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize(
    ("count", "batch_size"),
    [(8, 2), (7, 2), (9, 4), (5, 1), (3, 2), (2, 5), (1, 1), (6, 100)],
    ids=str,
)
def test_every_number_of_ranks_gives_the_same_embeddings(
    ranks: RankPool, world_size: int, count: int, batch_size: int
) -> None:
    parts = ranks.run(world_size, _embedded, count, batch_size)
    expected = _one_by_one(_pixels(count))
    assert parts[0].dtype == torch.float32
    assert parts[0].shape == (count, 6)
    _close(parts[0], expected)
    assert all(torch.equal(part, parts[0]) for part in parts), "bit for bit on all ranks"


@pytest.mark.parametrize("batch_size", [1, 3, 7, 8, 1000])
def test_without_a_group_one_process_does_all(batch_size: int) -> None:
    _close(_embedded(None, 7, batch_size), _one_by_one(_pixels(7)))


def _small(group: dist.ProcessGroup | None) -> Tensor:
    torch.manual_seed(5)
    return embed_images(build_backbone("small", embedding_size=16), _pixels(5), batch_size=2, group=group)


def test_a_real_backbone_gives_the_same_on_ranks(ranks: RankPool) -> None:
    (expected, *_), parts = ranks.run(1, _small), ranks.run(4, _small)
    torch.testing.assert_close(parts[2], expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def _collectives(group: dist.ProcessGroup) -> tuple[int, int]:
    with mock.patch.object(embed, "_all_gather", wraps=embed._all_gather) as gather:
        embed_images(_toy(), _pixels(7), batch_size=1, group=group)
        within = gather.call_count
        embed_images(_toy(), _pixels(1), batch_size=1)
    return within, gather.call_count - within


def test_one_collective_with_a_group_and_none_without(ranks: RankPool) -> None:
    assert ranks.run(2, _collectives) == [(1, 0)] * 2


# ---- images ------------------------------------------------------------------------------------------------------


def test_a_mirror_image_has_the_embedding_of_the_image() -> None:
    images = _pixels(3)
    found, mirrored = (embed_images(_toy(), side, batch_size=2) for side in (images, images[:, :, ::-1]))
    _close(found, mirrored)
    with torch.no_grad():
        alone = _toy().eval()(normalise_pixels(torch.from_numpy(images).permute(0, 3, 1, 2)))
    assert (found - 2 * alone).abs().max() > 0.01, "the toy does tell left from right"


def _png_and_pixels(group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    import cv2

    pixels = _pixels(5)
    encoded = [cv2.imencode(".png", image[..., ::-1])[1].tobytes() for image in pixels]
    return tuple(embed_images(_toy(), images, batch_size=2, group=group) for images in (encoded, pixels))  # type: ignore[return-value]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_encoded_images_equal_their_pixels(ranks: RankPool, world_size: int) -> None:
    for encoded, pixels in ranks.run(world_size, _png_and_pixels):
        assert torch.equal(encoded, pixels)


def test_jpegs_and_odd_images_are_decoded() -> None:
    from data.loading.decode import decode_image

    images = [jpeg(3), *odd_images().values()]
    pixels = np.stack([decode_image(image, (112, 112)) for image in images])
    assert torch.equal(embed_images(_toy(), images, batch_size=4), embed_images(_toy(), pixels, batch_size=4))
    views = [memoryview(image) for image in images]
    assert torch.equal(embed_images(_toy(), views, batch_size=4), embed_images(_toy(), pixels, batch_size=4))


@pytest.mark.filterwarnings("error")
def test_pixels_may_be_read_only_or_a_view_and_are_left_alone() -> None:
    pixels = _pixels(4)
    expected, before = embed_images(_toy(), pixels, batch_size=3), pixels.copy()
    np.testing.assert_array_equal(pixels, before)
    pixels.setflags(write=False)
    assert torch.equal(embed_images(_toy(), pixels, batch_size=3), expected)
    backwards = np.ascontiguousarray(pixels[:, ::-1, ::-1])[:, ::-1, ::-1]
    assert torch.equal(embed_images(_toy(), backwards, batch_size=3), expected)


# ---- the backbone is left as it was ------------------------------------------------------------------------------


def _modes(toy: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in toy.named_modules()}


@pytest.mark.parametrize("images", ["good", "bad"])
def test_the_mode_of_every_module_is_restored(images: str) -> None:
    toy = _toy()
    toy.norm.eval()  # a frozen part of a training model
    before = _modes(toy)
    assert set(before.values()) == {True, False}
    state = {key: value.clone() for key, value in toy.state_dict().items()}
    if images == "good":
        embed_images(toy, _pixels(2), batch_size=1)
    else:
        with pytest.raises(DataError):
            embed_images(toy, [jpeg(0), b"none"], batch_size=1)
    assert _modes(toy) == before
    assert torch.is_grad_enabled()
    assert all(torch.equal(value, state[key]) for key, value in toy.state_dict().items())


def test_nothing_is_kept_for_a_backward() -> None:
    assert not embed_images(_toy(), _pixels(2), batch_size=2).requires_grad


def test_autocast_reaches_the_body_and_embeddings_stay_float32() -> None:
    toy, seen = _toy(), []
    toy.conv.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = embed_images(toy, _pixels(3), batch_size=2)
    assert set(seen) == {torch.bfloat16}
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, _one_by_one(_pixels(3)), rtol=0.05, atol=0.05)


# ---- what is refused ---------------------------------------------------------------------------------------------


def _refused(group: dist.ProcessGroup, images: list[bytes]) -> tuple[str, str, Tensor]:
    """The error, and a collective after it: no rank may still be in, or have left out, one of its own."""
    message = kind = ""
    try:
        embed_images(_toy(), images, batch_size=2, group=group)
    except Exception as error:
        kind, message = type(error).__name__, str(error)
    present = torch.ones(1)
    dist.all_reduce(present, group=group)
    return kind, message, present


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("bad", [(0,), (6,), (3,), (5, 2), (0, 1, 2, 3, 4, 5, 6)], ids=str)
def test_an_image_that_does_not_decode_is_the_same_error_on_every_rank(
    ranks: RankPool, world_size: int, bad: tuple[int, ...]
) -> None:
    images = [jpeg(number) for number in range(7)]
    damaged = list(damaged_images().values())
    for number in bad:
        images[number] = damaged[number][0]
    answers = ranks.run(world_size, _refused, images, timeout=60)
    first = min(bad)
    assert len({message for _, message, _ in answers}) == 1
    for kind, message, present in answers:
        assert kind == "DataError"
        assert re.match(rf"image {first} of 7: .*{re.escape(damaged[first][1])}", message)
        assert present == world_size


def test_a_bad_image_does_not_spoil_the_next_call(ranks: RankPool) -> None:
    ranks.run(2, _refused, [jpeg(0), jpeg(1), b"none"], timeout=60)
    _close(ranks.run(2, _embedded, 3, 2)[1], _one_by_one(_pixels(3)))


@pytest.mark.parametrize(
    "other", [None, 7, "text", np.zeros((112, 112, 3), np.uint8)], ids=lambda other: type(other).__name__
)
def test_anything_but_images_is_refused_on_every_rank(ranks: RankPool, other: Any) -> None:
    for kind, message, present in ranks.run(2, _refused, [jpeg(0), jpeg(1), other], timeout=60):
        assert kind == "ValueError"
        assert f"image 2: expected encoded bytes, got {type(other).__name__}" in message
        assert present == 2


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((2, 112, 112, 3), np.float32), ((2, 3, 112, 112), np.uint8), ((2, 112, 96, 3), np.uint8), ((2,), np.uint8)],
)
def test_pixels_of_another_shape_or_type_are_refused(shape: tuple[int, ...], dtype: type) -> None:
    with pytest.raises(
        ValueError, match=rf"uint8 \(2, 112, 112, 3\), got {np.dtype(dtype)} of shape {re.escape(str(shape))}"
    ):
        embed_images(_toy(), np.zeros(shape, dtype), batch_size=2)


@pytest.mark.parametrize("images", [[], np.zeros((0, 112, 112, 3), np.uint8)], ids=["encoded", "pixels"])
def test_no_images_are_refused(images: Any) -> None:
    with pytest.raises(ValueError, match="at least one image, got none"):
        embed_images(_toy(), images, batch_size=2)


@pytest.mark.parametrize("batch_size", [0, -3])
def test_a_batch_of_nothing_is_refused(batch_size: int) -> None:
    with pytest.raises(ValueError, match=f"batch_size: expected at least 1, got {batch_size}"):
        embed_images(_toy(), _pixels(1), batch_size=batch_size)


# ---- pairs -------------------------------------------------------------------------------------------------------


def _paired(group: dist.ProcessGroup) -> tuple[Any, ...]:
    return tuple(embed_pairs(_toy(), _pixels(10), np.arange(5) % 3 == 0, batch_size=3, group=group))


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_images_2i_and_2i_plus_1_are_pair_i(ranks: RankPool, world_size: int) -> None:
    expected = _one_by_one(_pixels(10))
    for first, second, same in ranks.run(world_size, _paired):
        assert first.dtype == second.dtype == np.float32
        for pair in range(5):
            _close(torch.from_numpy(first[pair]), expected[2 * pair])
            _close(torch.from_numpy(second[pair]), expected[2 * pair + 1])
        assert same.tolist() == [True, False, False, True, False]


@pytest.mark.parametrize("shape", [(2,), (4,), (6,), (3, 1)])
def test_another_number_of_pairs_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        ValueError, match=rf"two images a pair, got 6 images and pairs of shape {re.escape(str(shape))}"
    ):
        embed_pairs(_toy(), _pixels(6), np.ones(shape, np.bool_), batch_size=2)
