"""Weights of arcface_torch's files: recognised, unwrapped, joined by rank, refused in one line where they are odd."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from backbones import build_backbone
from evaluation.embed.records import load_backbone
from sharding import all_shards
from training.__main__ import main
from training.checkpoint import CheckpointError
from training.warm.peer_weights import backbone_weights, heads_at

Said = pytest.CaptureFixture[str]
KINDS: dict[str, Callable[[Tensor], Any]] = {
    "softmax_fc_gpu_{}.pt": lambda w: {"weight": w, "weight_activated": torch.zeros(0, 0)},
    "checkpoint_gpu_{}.pt": lambda w: {
        "epoch": 3,
        "state_dict_softmax_fc": {"weight": w},
        "state_optimizer": {"a": [1]},
    },
    "rank_{}_softmax_weight.pt": lambda w: w,
    "rank:{}_softmax_weight.pt": lambda w: w,
}


def _write(folder: Path, kind: str, centres_CD: Tensor, ranks: int) -> None:
    folder.mkdir(exist_ok=True)
    for rank, shard in enumerate(all_shards(ranks, len(centres_CD))):
        torch.save(KINDS[kind](centres_CD[shard.start : shard.stop].clone()), folder / kind.format(rank))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("classes", "ranks"), [(7, 1), (7, 3), (25, 12)])
def test_centres_of_all_ranks_are_joined_by_class(tmp_path: Path, kind: str, classes: int, ranks: int) -> None:
    centres_CD = torch.randn(classes, 5)
    _write(tmp_path / "run", kind, centres_CD, ranks)
    (tmp_path / "run" / "model.pt").write_bytes(b"not looked at")
    (tmp_path / "run" / "rank_0_softmax_weight_mom.pt").write_bytes(b"nor this")
    out = tmp_path / "centres.npy"
    assert main(["insightface", "centres", str(tmp_path / "run"), "--out", str(out)]) == 0
    found = np.load(out)
    assert found.dtype == np.float32
    assert np.array_equal(found, centres_CD.numpy())
    files = sorted((tmp_path / "run").glob(kind.format("*")), reverse=True)  # the rank counts, not the order
    assert torch.equal(torch.cat([rows for _, rows in heads_at(files).rows()]), centres_CD)


@pytest.fixture
def heads(tmp_path: Path) -> Path:
    _write(tmp_path / "run", "softmax_fc_gpu_{}.pt", torch.randn(11, 4), 3)
    return tmp_path / "run"


def _swap(run: Path) -> None:
    one, other = run / "softmax_fc_gpu_0.pt", run / "softmax_fc_gpu_2.pt"
    one.rename(run / "x")
    other.rename(one)
    (run / "x").rename(other)


def _put(state: Any) -> Callable[[Path], object]:
    """In place of rank 1's file."""
    return lambda run: torch.save(state, run / "softmax_fc_gpu_1.pt")


HARM: dict[str, tuple[Callable[[Path], object], str]] = {
    "one is missing": (lambda run: (run / "softmax_fc_gpu_1.pt").unlink(), "rank 1 is missing"),
    "the last is missing": (lambda run: (run / "softmax_fc_gpu_2.pt").unlink(), ""),
    "in another order": (_swap, "as 11 classes cut over 3 ranks have"),
    "two kinds": (lambda run: torch.save({}, run / "checkpoint_gpu_0.pt"), "expected files of one kind"),
    "other components": (_put({"weight": torch.zeros(4, 5)}), "4 x 4 numbers"),
    "too many rows": (_put({"weight": torch.zeros(9, 4)}), "classes cut over"),
    "no weight": (_put({"w": torch.zeros(4, 4)}), "expected class centres"),
    "no matrix": (_put({"weight": torch.zeros(4)}), "found a tensor of shape (4,)"),
    "whole numbers": (_put(torch.ones(4, 4).int()), "expected class centres"),
    "a cut file": (lambda run: os.truncate(run / "softmax_fc_gpu_1.pt", 300), "damaged"),
    "not finite": (_put({"weight": torch.full((4, 4), torch.nan)}), "not finite"),
    "code": (_put({"weight": torch.nn.Linear(2, 2)}), "which is refused"),
    "nothing": (lambda run: [path.unlink() for path in run.iterdir()], "found none"),
}  # fmt: skip


@pytest.mark.parametrize("harm", HARM)
def test_files_that_do_not_fit_together_are_refused(harm: str, heads: Path, tmp_path: Path, capsys: Said) -> None:
    act, message = HARM[harm]
    act(heads)
    out = tmp_path / "centres.npy"
    code = main(["insightface", "centres", str(heads), "--out", str(out)])
    if not message:  # 4 + 4 rows are a head of two ranks, too: what tells is the number of classes (see `start`)
        assert code == 0
        assert heads_at([heads]).num_classes == 8
        return
    assert code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not out.exists()


def test_names_that_are_no_ranks_and_names_given_twice(heads: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected a rank's file"):
        heads_at([heads / "model.pt"])
    again = tmp_path / "again"
    again.mkdir()
    (again / "softmax_fc_gpu_0.pt").write_bytes((heads / "softmax_fc_gpu_0.pt").read_bytes())
    with pytest.raises(CheckpointError, match="expected one file for rank 0"):
        heads_at([heads, again])
    with pytest.raises(CheckpointError, match=r"cannot read it|damaged"):
        heads_at([tmp_path / "softmax_fc_gpu_0.pt"])


# ---- backbones -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "dim"), [("mobilefacenet", 128), ("vit_t", 64), ("small", 16)])
def test_a_file_tells_which_backbone_it_is_of(name: str, dim: int, tmp_path: Path, capsys: Said) -> None:
    state = build_backbone(name, embedding_size=dim).state_dict()
    torch.save(dict(sorted(state.items())), tmp_path / "model.pt")  # in any order
    assert main(["insightface", "check", str(tmp_path / "model.pt")]) == 0
    said = capsys.readouterr().out
    assert f"model.pt: weights of {name}" in said
    assert f"{dim} components" in said
    wrapped = {"epoch": 1, "state_dict_backbone": {f"module.{key}": value for key, value in state.items()}}
    torch.save(wrapped, tmp_path / "checkpoint_gpu_0.pt")
    assert main(["insightface", "check", str(tmp_path / "checkpoint_gpu_0.pt")]) == 0
    assert "--out FILE writes them alone" in capsys.readouterr().out
    out = tmp_path / "backbone.pt"
    assert main(["insightface", "check", str(tmp_path / "checkpoint_gpu_0.pt"), "--out", str(out)]) == 0
    loaded = load_backbone(name, embedding_size=dim, weights=out).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"conv1.weight": torch.zeros(3)}, "those of no backbone here"),
        ({"weight": torch.zeros(())}, "those of no backbone here"),
        ({}, "expected the weights of a backbone"),
        ([torch.zeros(2)], "found list"),
        (torch.zeros(2), "found a tensor of shape"),
        ({"state_dict_backbone": 3}, "found int"),
        ({1: torch.zeros(2)}, "those of no backbone here"),
    ],
)
def test_other_states_are_refused(state: Any, message: str, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(CheckpointError) as error:
        backbone_weights(tmp_path / "x.pt")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
