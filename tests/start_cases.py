"""What `python -m training start` must refuse, each in one line; the means that it must write, in float64."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backbones import build_backbone, normalise_pixels
from data.loading.decode import decode_image
from data.rec.records import RecordSet
from training.checkpoint import Saved

D, OLD = 16, 18
"""Components; classes of the set that the run was trained on."""
Case = tuple[Callable[[Path, Path, Path], tuple[Any, ...]], tuple[str, ...], str]
"""Arguments, from the run, the folder of sets and one to write to; settings; words of the line."""


def _write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def _centres(folder: Path, dim: int) -> Path:
    np.save(folder / "centres.npy", np.ones((OLD, dim), np.float32))
    return folder / "centres.npy"


REFUSED: dict[str, Case] = {
    "classes without a rule": (
        lambda run, sets, _: ("--from", run, "--by-name"),
        (),
        "6 of 24 classes have no counterpart (6 'person 18', 7 'person 19', 8 'person 20', 9 'person 21', "
        "10 'person 22', …): say what they begin with",
    ),
    "no word of classes": (lambda run, sets, _: ("--from", run), (), "24 of 24 classes have no counterpart"),
    "other number": (lambda run, sets, _: ("--from", run, "--same"), (), "have 24 classes, the centres are 18"),
    "other components": (
        lambda run, sets, _: ("--from", run, "--by-name", "--others", "random"),
        ("model.embedding_size=32",),
        "the weights are of small with 16 components, got small with 32",
    ),
    "other backbone": (
        lambda run, sets, _: ("--from", run, "--by-name", "--others", "random"),
        ("model.backbone=vit_t",),
        "the weights are of small with 16 components, got vit_t with 16",
    ),
    "centres of other components": (
        lambda run, sets, tmp: ("--from", run, "--others", "mean", "--centres", _centres(tmp, 12)),
        (),
        "model.embedding_size: expected 12, as the class centres have, got 16",
    ),
    "sub-centres": (
        lambda run, sets, _: ("--from", run, "--by-name", "--others", "random"),
        ("head.subcentres=3",),
        "head.subcentres: expected 1, a centre for each class, got 3",
    ),
    "sub-centres and means": (
        lambda run, sets, _: ("--from", run / "backbone.pt", "--others", "mean"),
        ("head.subcentres=3",),
        "head.subcentres: expected 1, a centre for each class, got 3",
    ),
    "no resume": (
        lambda run, sets, _: ("--from", run, "--others", "random"),
        ("train.resume=false",),
        "train.resume: expected true",
    ),
    "out of range": (
        lambda run, sets, tmp: ("--from", run, "--map", _write(tmp / "map", "0 1\n24 2\n")),
        (),
        "line 2: expected a class of the new set, from 0 to 23, and an old one, from 0 to 17, found '24 2'",
    ),
    "a class twice": (
        lambda run, sets, tmp: ("--from", run, "--map", _write(tmp / "map", "0 1\n0 2\n")),
        (),
        "line 2: class 0 stands there twice",
    ),
    "a table of another set": (
        lambda run, sets, _: ("--from", run, "--map", sets / "b" / "labels.csv", "--others", "random"),
        (),
        "all, and the centres were trained on ",
    ),
    "a backbone has no classes": (
        lambda run, sets, _: ("--from", run / "backbone.pt", "--by-name"),
        (),
        "--by-name: expected class centres, found a backbone alone",
    ),
    "names of a file of centres": (
        lambda run, sets, tmp: ("--from", run, "--centres", _centres(tmp, D), "--by-name"),
        (),
        "--old-set: expected the set that the centres were trained on",
    ),
    "another old set": (
        lambda run, sets, _: ("--from", run, "--by-name", "--old-set", sets / "b"),
        (),
        "its records are not those that the run was trained on",
    ),
    "names that are too few": (
        lambda run, sets, tmp: ("--from", run, "--by-name", "--old-set", _write(tmp / "identities.txt", "a\nb\n")),
        (),
        "expected a name for each of 18 classes, found 2",
    ),
    "names twice": (
        lambda run, sets, tmp: ("--from", run, "--by-name", "--old-set", _write(tmp / "identities.txt", "<b>\n" * 18)),
        (),
        "identities.txt: classes 0 and 1 are both named '<b>'",
    ),
    "no old set": (
        lambda run, sets, tmp: ("--from", run, "--by-name", "--old-set", tmp / "moved"),
        (),
        "say where it is now by --old-set",
    ),
    "an old set for nothing": (
        lambda run, sets, _: ("--from", run, "--others", "mean", "--old-set", sets / "a"),
        (),
        "--old-set: expected --by-name or --map beside it",
    ),
    "images for nothing": (
        lambda run, sets, _: ("--from", run, "--others", "random", "--images", 3),
        (),
        "--images: expected --others mean beside it",
    ),
    "no run": (lambda run, sets, tmp: ("--from", tmp / "none", "--same"), (), "found no checkpoint"),
    "no weights": (
        lambda run, sets, tmp: ("--from", _write(tmp / "x.pt", "text"), "--others", "mean"),
        (),
        "damaged, or not a file of weights",
    ),
    "no weights either": (
        lambda run, sets, tmp: ("--from", _write(tmp / "x.safetensors", "text"), "--others", "mean"),
        (),
        "damaged, or not a file of safetensors",
    ),
}


def exact_means(saved: Saved, folder: Path, classes: list[int], most: int) -> Tensor:
    """Mean directions in float64, by a network in float64, image by image."""
    backbone = build_backbone("small", embedding_size=D)
    backbone.load_state_dict(saved.named("backbone."))
    backbone = backbone.double().eval()
    records = RecordSet.open(folder)
    means = []
    for label in classes:
        there = np.flatnonzero(records.labels == label)
        units = []
        for place in range(0, len(there), len(there) // most):
            pixels = torch.from_numpy(decode_image(records.image(int(there[place]))[1], (112, 112)))
            image = normalise_pixels(pixels.permute(2, 0, 1)[None]).double()
            with torch.no_grad():
                x_D = (backbone(image) + backbone(image.flip(-1)))[0]
            units.append(x_D / x_D.norm())
        mean_D = torch.stack(units).mean(0)
        means.append(mean_D / mean_D.norm())
    return torch.stack(means)


def first_loss(run: Path) -> float:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return float(next(line["loss/total"] for line in lines if line["step"] == 1))
