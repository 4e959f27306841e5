"""Figures of docs/: `python -m scripts.docs.figures margins`, and `… method FOLDER` for the tutorial's folder.

`method` reads what the tutorial leaves in `runs/tutorial`: the checkpoint, the embeddings and the set. How each photo
came about is known there, as it was drawn.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure

from configs.load import load_config
from data.rec.records import RecordSet
from data.synthetic import SyntheticFaces
from partial_fc.adaptive import AdaFaceTarget
from partial_fc.margins import Target, arcface, arcface_straight_through, cosface
from scripts.docs.links import DOCS, ROOT
from training.checkpoint.tools import newest_at

_IMAGES = ROOT / DOCS / "images"
_WIDTH, _HEIGHT = 10.0, 4.0


def margins() -> None:
    """The target's cosine after each margin, and its slope in the cosine, over the angle."""
    angle_N = torch.linspace(0.05, math.pi - 0.05, 400, dtype=torch.float64)
    cosine_N = angle_N.cos()
    margin_N = torch.full_like(cosine_N, 0.5)
    drawn: dict[str, Target] = {
        "no margin": arcface(cosine_N, torch.zeros_like(margin_N)),
        "arcface, 0.5; adaface, poor image": arcface(cosine_N, margin_N),
        "cosface, 0.4": cosface(cosine_N, torch.full_like(margin_N, 0.4)),
        "adaface, good image": AdaFaceTarget(torch.full_like(cosine_N, 1.0))(cosine_N, margin_N),
        "insightface's arcface": arcface_straight_through(cosine_N, margin_N),
    }
    figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, target in drawn.items():
        style = "--" if name.startswith(("no", "insight")) else "-"
        left.plot(np.degrees(angle_N.numpy()), target.psi_N.numpy(), style, label=name)
        right.plot(np.degrees(angle_N.numpy()), target.by_cosine_N.numpy(), style)
    left.set(xlabel="angle to the own centre, degrees", ylabel="target's cosine as the loss sees it")
    right.set(xlabel="angle to the own centre, degrees", ylabel="its slope in the cosine", ylim=(0, 4))
    left.legend(fontsize=8)
    _save(figure, "margins.png")


def method(folder: Path) -> None:
    """Hard level and margins of persons against their difficulty; cosines of right and wrong samples."""
    set_folder = folder / "set"
    saved = newest_at(str(folder / "run"))
    published = {name: tensor.numpy() for name, tensor in saved.named("clusters.published.").items()}
    persons = [int(name.rpartition("_")[2]) for name in (set_folder / "identities.txt").read_text().split()]
    faces = SyntheticFaces(identities=max(persons) + 1, seed=7)
    difficulty = np.array([faces.difficulty(person) for person in persons])
    figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
    first, second, third = figure.subplots(1, 3)
    hard, margin = published["hard_R"], published["margin_R"]
    first.scatter(difficulty, hard, s=8)
    first.set(
        xlabel="difficulty, as it was drawn",
        ylabel="hard level h",
        title=f"rank correlation {_ranked(difficulty, hard):.2f}",
    )
    second.scatter(hard, margin, s=8)
    second.axhline(load_config(folder / "run" / "config.yaml").head.margin, linewidth=1, color="grey")
    second.set(xlabel="hard level h", ylabel="margin of the identity")
    own, wrong, suspect = _cosines(folder, set_folder, persons, published["code_I"])
    bins = np.linspace(min(own.min(), 0.0), 1, 40).tolist()
    third.hist(own[~wrong], bins, density=True, alpha=0.6, label="right label")
    third.hist(own[wrong], bins, density=True, alpha=0.6, label="wrong label")
    third.set(xlabel="cosine to the mean of the own label", ylabel="density", title=_found(wrong, suspect))
    third.legend(fontsize=8)
    _save(figure, "method.png")
    print(f"{len(persons)} persons, {len(own)} samples, {int(wrong.sum())} wrong; {_found(wrong, suspect)}")


def _cosines(folder: Path, set_folder: Path, persons: list[int], code_I: Any) -> tuple[Any, Any, Any]:
    """Of each sample: cosine to its label's mean, is its label wrong, was it suspect at the end."""
    x_ND = np.load(folder / "embeddings.npy", allow_pickle=False).astype(np.float64)
    labels_N = np.asarray(RecordSet.open(set_folder).labels)
    mean_CD = np.stack([x_ND[labels_N == label].mean(0) for label in range(len(persons))])
    mean_CD /= np.linalg.norm(mean_CD, axis=1, keepdims=True)
    own_N = (x_ND * mean_CD[labels_N]).sum(1)
    wrong_N = []
    for label, person in enumerate(persons):
        photos = sorted((folder / "photos" / f"person_{person:03}").iterdir())
        wrong_N += [(7 * person + int(photo.stem)) % 50 == 0 and photo.stem != "99" for photo in photos]
        if photos[-1].stem == "99":
            wrong_N[-1] = True
        assert len(photos) == int((labels_N == label).sum())
    return own_N, np.array(wrong_N), np.asarray(code_I) < 0


def _found(wrong: Any, suspect: Any) -> str:
    both = int((wrong & suspect).sum())
    return f"suspects: {both} of {int(wrong.sum())} wrong, {int(suspect.sum()) - both} right"


def _ranked(a: Any, b: Any) -> float:
    """Spearman's."""
    return float(np.corrcoef(np.argsort(np.argsort(a)), np.argsort(np.argsort(b)))[0, 1])


def _save(figure: Figure, name: str) -> None:
    figure.savefig(_IMAGES / name, dpi=110)
    print(f"{(_IMAGES / name).relative_to(ROOT)}: {(_IMAGES / name).stat().st_size} bytes")


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw what is asked for."""
    parser = argparse.ArgumentParser(prog="python -m scripts.docs.figures", description=__doc__)
    parser.add_argument("figure", choices=("margins", "method"))
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs/tutorial"))
    args = parser.parse_args(arguments)
    mpl.rcParams["svg.hashsalt"] = "clusterface"
    if args.figure == "margins":
        margins()
    else:
        method(args.folder)


if __name__ == "__main__":
    main()
