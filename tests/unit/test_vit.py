"""What vision transformers leave out in training: patches and whole blocks, by the seed; nothing in evaluation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from backbones import build_backbone, normalise_pixels


def _images(count: int) -> Tensor:
    return normalise_pixels(torch.randint(0, 256, (count, 3, 112, 112), dtype=torch.uint8))


@pytest.mark.parametrize("settings", [{"drop_path": 0.0, "mask_ratio": 0.3}, {"drop_path": 0.5, "mask_ratio": 0.0}])
def test_a_vit_drops_by_the_seed_and_in_training_only(settings: dict[str, float]) -> None:
    backbone = build_backbone("vit_t", embedding_size=8, **settings)
    images = _images(4)

    def embedded(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return backbone.body(images)

    with torch.no_grad():
        assert torch.equal(embedded(1), embedded(1))
        assert not torch.equal(embedded(1), embedded(2))
        backbone.eval()
        assert torch.equal(embedded(1), embedded(2))


def test_masked_patches_are_the_token_and_the_others_never_see_them() -> None:
    backbone = build_backbone("vit_t", embedding_size=8, drop_path=0.0, mask_ratio=0.25)
    images = _images(2).requires_grad_()
    tokens_BLC = backbone.body(images)
    masked_BL = (tokens_BLC == backbone.mask_token).all(2)
    assert masked_BL.sum(1).tolist() == [36, 36]  # a quarter of 144, of each image
    assert not torch.equal(masked_BL[0], masked_BL[1])
    tokens_BLC.square().sum().backward()
    assert images.grad is not None
    seen_BL = images.grad[..., :108, :108].reshape(2, 3, 12, 9, 12, 9).abs().sum((1, 3, 5)).flatten(1) > 0
    assert torch.equal(seen_BL, ~masked_BL)


def test_without_masks_the_token_is_not_trained() -> None:
    """DistributedDataParallel would wait for its gradient."""
    with torch.device("meta"):
        assert not build_backbone("vit_t_dp005_mask0").mask_token.requires_grad
        assert build_backbone("vit_t").mask_token.requires_grad


def test_stochastic_depth_keeps_the_mean_and_grows_with_the_depth() -> None:
    backbone = build_backbone("vit_t", embedding_size=8, drop_path=0.5)
    assert [round(block.drop_path, 3) for block in backbone.blocks][::11] == [0.0, 0.5]
    dropped = backbone.blocks[-1]._dropped(torch.ones(4000, 2, 3))
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    assert (dropped == dropped[:, :1, :1]).all()  # images are dropped as a whole
    assert abs(dropped.mean().item() - 1) < 0.1
