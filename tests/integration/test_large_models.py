"""Settings for large models through the command line: the same weights, names that load anywhere, one-line errors."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from backbones import build_backbone
from tests.integration.conftest import Run


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "backbone.pt", weights_only=True)


@pytest.mark.parametrize("ranks", [1, 2])
def test_computing_again_ends_with_the_same_weights(train: Run, tmp_path: Path, ranks: int) -> None:
    for name, share in (("plain", 0), ("again", 1)):
        done = train(ranks, f"model.recompute={share}", "train.epochs=2", name=name)
        assert done.returncode == 0, done.stderr
    plain, again = _weights(tmp_path / "plain"), _weights(tmp_path / "again")
    assert list(plain) == list(again)
    assert all(torch.equal(value, again[key]) for key, value in plain.items())


def test_a_run_goes_on_with_more_blocks_computed_again(train: Run, tmp_path: Path) -> None:
    """As one does whose memory was too small."""
    plain = train(1, "train.epochs=1", name="plain")
    assert plain.returncode == 0, plain.stderr
    for share, stop in ((0, 3), (1, 0)):
        done = train(1, f"model.recompute={share}", "train.epochs=1", f"train.stop_after_steps={stop}")
        assert done.returncode == 0, done.stderr
    assert "resumed at step 3" in done.stderr
    found, expected = _weights(tmp_path / "run"), _weights(tmp_path / "plain")
    assert all(torch.equal(value, found[key]) for key, value in expected.items())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch's own compiler needs a C++ compiler")
def test_a_compiled_run_goes_on_and_leaves_plain_weights(
    train: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))  # a killed run may have left half a file
    for stop in (3, 0):
        done = train(1, "model.compile=true", "train.epochs=1", f"train.stop_after_steps={stop}")
        assert done.returncode == 0, done.stderr
    assert "resumed at step 3" in done.stderr
    found = _weights(tmp_path / "run")
    assert list(found) == list(build_backbone("small", embedding_size=16).state_dict())
    assert all(torch.isfinite(value).all() for value in found.values())
    steps = {int(value) for key, value in found.items() if key.endswith("num_batches_tracked")}
    assert steps == {8}


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("model.recompute=2", "model.recompute: expected 0 to 1, a share of the blocks, got 2"),
        ("model.recompute=all", "model.recompute"),
        ("model.compile=inductor", "model.compile"),
        ("model.graph=true", "model.graph: expected a GPU, whose graphs they are, got cpu: set it to false"),
        ("model.backbone=timm/", "model.backbone: "),
        ("model.backbone=timm/hf-hub:someone/model", "model.backbone: "),
    ],
)
def test_a_wrong_setting_is_one_line(train: Run, setting: str, said: str) -> None:
    done = train(1, setting)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
