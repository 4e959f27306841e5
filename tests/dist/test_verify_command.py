"""`python -m evaluation verify`: any number of ranks writes what one does, and refuses alike."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from rich.console import Console

from backbones import build_backbone
from data.verification_bin import write_bin
from evaluation.commands.verify import add, verify_sets
from tests.image_cases import jpeg
from tests.ranks import WORLD_SIZES, RankPool


def _verified(group: dist.ProcessGroup, arguments: list[str]) -> str:
    """The error's kind and text, or nothing."""
    parser = argparse.ArgumentParser()
    add(parser.add_subparsers())
    args = parser.parse_args(["verify", *arguments])
    main = dist.get_rank(group) == 0
    try:
        verify_sets(args, device=torch.device("cpu"), group=group, is_main=main, console=Console(stderr=True))
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    torch.manual_seed(0)
    backbone = build_backbone("small", embedding_size=16)
    torch.save(backbone.state_dict(), folder / "backbone.pt")
    for parameter in backbone.parameters():
        parameter.data.fill_(torch.nan)
    torch.save(backbone.state_dict(), folder / "nan.pt")
    images = [jpeg(number // 2 if number % 4 < 2 else number) for number in range(26)]
    same = [number % 2 == 0 for number in range(13)]  # not divisible by ten
    write_bin(folder / "toy.bin", images, same)
    write_bin(folder / "bad.bin", [*images[:-1], b"none"], same)
    write_bin(folder / "few.bin", images[:18], same[:9])
    write_bin(folder / "alike.bin", images, [True] * 13)
    return folder


def _arguments(places: Path, name: str, *more: str, weights: str = "backbone.pt") -> list[str]:
    model = ["--backbone", "small", "--embedding-size", "16", "--weights", str(places / weights), "--device", "cpu"]
    return [str(places / f"{name}.bin"), *model, "--resamples", "20", *more]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_any_number_of_ranks_writes_what_one_does(
    ranks: RankPool, places: Path, tmp_path: Path, world_size: int
) -> None:
    out = tmp_path / "out"
    assert set(ranks.run(world_size, _verified, _arguments(places, "toy", "--out", str(out)))) == {""}
    names = {"verification.json", "index.html", "scores_toy.npy", "roc.png", "det.png", "scores_toy.png"}
    assert {path.name for path in out.iterdir()} == names
    found = json.loads((out / "verification.json").read_text())["sets"]["toy"]
    assert (found["pairs"], found["genuine"], found["impostors"]) == (13, 7, 6)
    assert found["rates"][1] == {
        "far": 0.01,
        "tar": None,
        "threshold": None,
        "reason": "FAR 0.01 needs at least 100 pairs of two persons, there are 6",
    }
    assert len(found["folds"]["accuracies"]) == 10
    low, high = found["intervals"]["accuracy"]
    assert low <= found["accuracy"] <= high
    scores = np.load(out / "scores_toy.npy")
    assert scores[0, 0] == pytest.approx(1, abs=1e-6), "twice the same picture"
    assert scores[:, 1].tolist() == [float(number % 2 == 0) for number in range(13)]
    assert np.isfinite(scores).all()


@pytest.mark.parametrize(
    ("name", "weights", "match"),
    [
        ("bad", "backbone.pt", "DataError: bad: image 25 of 26"),
        ("few", "backbone.pt", "few.bin: expected at least 10 pairs, of one person and of two, got 9 pairs"),
        ("alike", "backbone.pt", "alike.bin: expected at least 10 pairs, of one person and of two, got 13 pairs, 13"),
        ("none", "backbone.pt", "none.bin: cannot read it"),
        ("toy", "nan.pt", "EmbedError: toy: image 0: its embedding is not finite"),
        ("toy", "none.pt", "none.pt: cannot read it"),
    ],
)
def test_all_ranks_refuse_alike(
    ranks: RankPool, places: Path, tmp_path: Path, name: str, weights: str, match: str
) -> None:
    out = tmp_path / "out"
    answers = ranks.run(2, _verified, _arguments(places, name, "--out", str(out), weights=weights), timeout=60)
    assert len(set(answers)) == 1
    assert match in answers[0]
    assert not out.exists()


def test_arguments_that_cannot_be_met(ranks: RankPool, places: Path, tmp_path: Path) -> None:
    twice = [*_arguments(places, "toy"), "--out", str(tmp_path)]
    assert "different names" in ranks.run(1, _verified, [str(places / "toy.bin"), *twice])[0]
    assert "expected 0, for no intervals, or at least 2" in ranks.run(1, _verified, [*twice, "--resamples", "1"])[0]
    (tmp_path / "verification.json").write_text("{}")
    assert "expected no verification.json there" in ranks.run(1, _verified, twice)[0]
    assert ranks.run(1, _verified, [*twice, "--force", "--resamples", "0"]) == [""]
    assert json.loads((tmp_path / "verification.json").read_text())["intervals"] is None
    assert "expected --run FOLDER, or --weights and --backbone" in ranks.run(1, _verified, [str(places / "toy.bin")])[0]
