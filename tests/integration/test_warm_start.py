"""A run begins with arcface_torch's backbone and class centres, on another number of ranks than saved them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from backbones import build_backbone
from sharding import all_shards
from tests.integration.conftest import IDENTITIES, Run
from training.__main__ import main
from training.checkpoint import Saved, place_of

Said = pytest.CaptureFixture[str]
STILL = "optim.lr=1e-12"
"""Steps that move nothing by more than a rounding."""


def _start(settings: list[str], *arguments: object, command: tuple[str, ...] = ("insightface", "start")) -> int:
    """In this process; an error leaves the group to the end of its process."""
    threads = torch.get_num_threads()
    try:
        return main([*command, *settings, *(str(argument) for argument in arguments)])
    finally:
        torch.set_num_threads(threads)
        if dist.is_initialized():
            dist.destroy_process_group()


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """Checkpoints of three ranks."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    state = build_backbone("small", embedding_size=16).state_dict()
    centres_CD = torch.randn(IDENTITIES, 16)
    for rank, shard in enumerate(all_shards(3, IDENTITIES)):
        held = {"state_dict_backbone": state, "state_dict_softmax_fc": {"weight": centres_CD[shard.start : shard.stop]}}
        torch.save(held, folder / f"checkpoint_gpu_{rank}.pt")
    return folder


@pytest.mark.parametrize("clusters", ["true", "false"])
def test_two_ranks_go_on_from_three(
    theirs: Path, command: Callable[..., list[str]], train: Run, tmp_path: Path, capsys: Said, clusters: str
) -> None:
    settings = [STILL, f"clustering.enabled={clusters}"]
    tail = command(2, *settings)
    weights = ("--backbone", theirs / "checkpoint_gpu_0.pt")
    assert _start(tail[tail.index("--set") :], *weights, "--heads", theirs, "--ranks", 2) == 0, capsys.readouterr().err
    assert "step_000000000: small and 24 class centres" in capsys.readouterr().out

    done = train(2, *settings, "train.stop_after_steps=1")
    assert done.returncode == 0, done.stderr
    saved = Saved(place_of(str(tmp_path / "run" / "checkpoints")), "step_000000001")
    state = torch.load(theirs / "checkpoint_gpu_0.pt", weights_only=True)["state_dict_backbone"]
    for name, _ in build_backbone("small", embedding_size=16).named_parameters():
        torch.testing.assert_close(saved.read(f"backbone.{name}"), state[name], rtol=0, atol=1e-6)
    parts = [torch.load(theirs / f"checkpoint_gpu_{rank}.pt", weights_only=True) for rank in range(3)]
    centres_CD = torch.cat([part["state_dict_softmax_fc"]["weight"] for part in parts])
    torch.testing.assert_close(saved.read("head.weight"), centres_CD, rtol=0, atol=1e-6)

    assert _start(tail[tail.index("--set") :], *weights, "--ranks", 2) == 2
    assert "expected no checkpoint, found step_000000001" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.embedding_size=32", "the weights are of small with 16 components, got small with 32"),
        ("model.backbone=vit_t", "the weights are of small with 16 components, got vit_t with 16"),
        ("train.resume=false", "train.resume: expected true"),
        ("head.subcentres=2", "head.subcentres: expected 1"),
        ("train.global_batch=25", "train.global_batch: expected a number that 3 ranks can share out"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    theirs: Path, command: Callable[..., list[str]], capsys: Said, setting: str, message: str
) -> None:
    settings = command(1, setting)
    arguments = ("--backbone", theirs / "checkpoint_gpu_0.pt", "--heads", theirs, "--ranks", 3)
    assert _start(settings[settings.index("--set") :], *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_centres_of_other_classes_are_refused(
    theirs: Path, command: Callable[..., list[str]], tmp_path: Path, capsys: Said
) -> None:
    settings = command(1)
    heads = [theirs / f"checkpoint_gpu_{rank}.pt" for rank in range(2)]  # of three: eight classes each
    assert _start(settings[settings.index("--set") :], "--backbone", heads[0], "--heads", *heads) == 2
    assert "its records have 24 classes, the centres are 16" in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("checkpoints/step_*"))


def test_their_centres_for_some_of_their_classes(
    theirs: Path, command: Callable[..., list[str]], tmp_path: Path, capsys: Said
) -> None:
    settings = command(1)
    (tmp_path / "map").write_text("0 23\n1 8\n23 0\n")
    arguments = ("--from", theirs / "checkpoint_gpu_1.pt", "--centres", theirs, "--map", tmp_path / "map")
    tail = (*arguments, "--others", "random")
    assert _start(settings[settings.index("--set") :], *tail, command=("start",)) == 0, capsys.readouterr().err
    parts = [torch.load(theirs / f"checkpoint_gpu_{rank}.pt", weights_only=True) for rank in range(3)]
    centres_CD = torch.cat([part["state_dict_softmax_fc"]["weight"] for part in parts])
    saved = Saved(place_of(str(tmp_path / "run" / "checkpoints")), "step_000000000")
    assert torch.equal(saved.read("head.weight")[[0, 1, 23]], centres_CD[[23, 8, 0]])
    assert "21 of 24 old class centres are not used" in capsys.readouterr().out
