"""How much of planted label noise does the report find, and how much of what it finds is planted?

Synthetic faces get 10% flipped labels, 5% split identities, 2% duplicate identities and 2% copies. The demo's network
is trained on that set as it is, by the demo's recipe; the report then sees embeddings and labels alone. Each seed is
another set of persons, plan and training; what was made before is not made again.

Legend: N stored images, L labels, T findings, in the order of the report.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from benchmarks.clusters.label_noise_data import Plan, Planted, pack_planted
from benchmarks.measuring.report import facts, publish
from clustering.report.data import labelled
from clustering.report.find import find_all
from clustering.report.findings import Findings
from clustering.service.parts import PartFiles
from configs.schema import TrainConfig
from training.distributed import open_ranks

_MODULE = "benchmarks.label_noise"
_ROOT = Path(__file__).parents[1]
_TITLE = "Planted faults and what the report finds"
_HELD_OUT, _PAIRS = 100, 1000
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
_DASHES = ("-", "--", ":", "-.")
_RECALLS = (0.5, 0.8, 0.9, 0.95)


class BenchError(RuntimeError):
    """A step failed; it has said why itself."""


@dataclass(frozen=True, slots=True)
class Result:
    """One kind of finding against the truth."""

    kind: str
    seed: int
    planted: int
    """How many there were to find."""
    true_T: npt.NDArray[np.bool_]
    """Which findings are planted, each of them once."""

    @property
    def precision_T(self) -> npt.NDArray[np.float64]:
        """Of the first 1, 2, … findings."""
        return np.cumsum(self.true_T) / np.arange(1, len(self.true_T) + 1)

    @property
    def recall_T(self) -> npt.NDArray[np.float64]:
        return np.cumsum(self.true_T) / max(1, self.planted)

    def precision_at(self, recall: float) -> float | None:
        """Of the shortest beginning with that recall; None if it is not reached."""
        reached = np.flatnonzero(self.recall_T >= recall - 1e-12)
        return float(self.precision_T[reached[0]]) if len(reached) else None


def compare(findings: Findings, planted: Planted, seed: int) -> list[Result]:
    """The findings of each kind against what was planted.

    A wrong label, a copy: a sample; a duplicate identity: a pair of labels; a split identity: a label. A copy counts
    when both samples show the same image, whichever of them is named.
    """
    wrong_N = planted.label_N != planted.home_N
    picture_N = planted.person_N * (1 + int(planted.image_N.max())) + planted.image_N
    split = list(dict.fromkeys(row.label for row in findings.splits))
    flags: dict[str, tuple[int, list[bool]]] = {
        "wrong labels": (int(wrong_N.sum()), [bool(wrong_N[row.sample]) for row in findings.noise]),
        "duplicate identities": (
            int((planted.twin_L >= 0).sum()) // 2,
            [bool(planted.twin_L[row.label] == row.other_label) for row in findings.duplicates],
        ),
        "split identities": (int(planted.split_L.sum()), [bool(planted.split_L[label]) for label in split]),
        "copies": (
            int((planted.copy_N > 0).sum()),
            [bool(picture_N[row.sample] == picture_N[row.copy_of]) for row in findings.copies],
        ),
    }
    return [Result(kind, seed, total, np.array(true, dtype=bool)) for kind, (total, true) in flags.items()]


def names_right(findings: Findings, planted: Planted) -> float:
    """Share of the wrong labels found and named for which the right label, or that person's other one, was named."""
    right = [
        row.looks_like in (planted.home_N[row.sample], planted.twin_L[planted.home_N[row.sample]])
        for row in findings.noise
        if row.looks_like >= 0 and planted.label_N[row.sample] != planted.home_N[row.sample]
    ]
    return float(np.mean(right)) if right else float("nan")


def commands(folder: Path, seed: int) -> dict[str, list[str]]:
    """What is run, by the file that says it was done."""
    settings = {
        "data.path": folder / "data",
        "train.output": folder / "run",
        "train.device": "cpu",
        "train.cpu_threads": 1,
        "train.batch_size": 128,  # on one rank the demo's global batch
        "train.seed": seed,
    }
    train = ["train_dist.py", "--config", "configs/demo.yaml"]
    for name, value in settings.items():
        train += ["--set", f"{name}={value}"]
    embed = ["-m", "evaluation", "embed", "--run", str(folder / "run"), "--records", str(folder / "data")]
    return {
        "run/backbone.pt": train,
        "embeddings.npy": [*embed, "--out", str(folder / "embeddings.npy"), "--device", "cpu"],
    }


def find(folder: Path, seed: int, plan: Plan) -> tuple[Findings, Planted]:
    """Pack, train, embed, as far as it was not done before, and report. Raises BenchError, DataError."""
    planted = pack_planted(folder / "data", plan, seed, held_out=_HELD_OUT, pairs=_PAIRS)
    for done, command in commands(folder.resolve(), seed).items():
        if not (folder / done).is_file():
            print(f"seed {seed}: python {shlex.join(command)}", flush=True)
            quiet = {**os.environ, "OMP_NUM_THREADS": "1"}
            if subprocess.run([sys.executable, *command], check=False, cwd=_ROOT, env=quiet).returncode:
                raise BenchError(f"`python {shlex.join(command)}` failed, see above")
    with open_ranks(TrainConfig(device="cpu", precision="fp32", cpu_threads=1)) as ranks:
        data = labelled(PartFiles(folder / "embeddings.npy"), planted.label_N, plan.labels)
        return find_all(data, ranks.group), planted


def save_curves(results: Sequence[Result], path: Path) -> None:
    """Precision over recall as the report is read from its beginning; a dot where it ends."""
    figure = Figure(figsize=(6.4, 4.6), layout="constrained")
    axes = figure.add_subplot()
    kinds = list(dict.fromkeys(result.kind for result in results))
    seeds = list(dict.fromkeys(result.seed for result in results))
    for result in results:
        if not len(result.true_T):
            continue
        colour = _COLOURS[kinds.index(result.kind) % len(_COLOURS)]
        dash = _DASHES[seeds.index(result.seed) % len(_DASHES)]
        name = f"{result.kind}, seed {result.seed}"
        axes.plot(result.recall_T, result.precision_T, color=colour, linestyle=dash, label=name)
        axes.plot(result.recall_T[-1], result.precision_T[-1], "o", color=colour)
    axes.axhline(0.9, color="#999999", linewidth=0.8)
    axes.axvline(0.9, color="#999999", linewidth=0.8)
    axes.set(xlim=(0, 1.02), ylim=(0.5, 1.02), xlabel="recall: share of the planted that is found")
    axes.set(ylabel="precision: share of the found that is planted", title=_TITLE)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(visible=True, color="#e5e5e5", linewidth=0.6)
    axes.legend(frameon=False, fontsize=8, loc="lower left")
    FigureCanvasAgg(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, format="png")


def cells(result: Result) -> list[str]:
    """A row of the table."""

    def percent(value: float | None) -> str:
        return "—" if value is None else f"{100 * value:.1f}"

    last = len(result.true_T) > 0
    return [
        str(result.seed),
        result.kind,
        str(result.planted),
        str(len(result.true_T)),
        percent(float(result.precision_T[-1]) if last else None),
        percent(float(result.recall_T[-1]) if last else 0.0),
        *(percent(result.precision_at(recall)) for recall in _RECALLS),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when done, 1 when a step failed, 2 when an argument is not as expected."""
    arguments = sys.argv[1:] if arguments is None else arguments
    question = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog=f"python -m {_MODULE}", description=question)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="default 0")
    parser.add_argument("--labels", type=int, default=1000, help="default 1000")
    parser.add_argument("--folder", type=Path, default=Path("runs/label_noise"), help="default runs/label_noise")
    parser.add_argument("--out", type=Path, metavar="FILE", help="result as Markdown, JSON and PNG")
    args = parser.parse_args(arguments)
    if min(args.seeds) < 0 or args.labels < 10:
        parser.error("expected --seeds of at least 0 and --labels of at least 10")
    torch.set_num_threads(1)
    about = facts(torch.device("cpu"), _MODULE, arguments)
    results: list[Result] = []
    plan = Plan(labels=args.labels)
    try:
        for seed in args.seeds:
            findings, planted = find(args.folder / f"seed{seed}", seed, plan)
            results += compare(findings, planted, seed)
            about[f"seed {seed}"] = _said(findings, planted)
    except BenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    at_recall = [f"P at R {100 * recall:.0f}" for recall in _RECALLS]
    header = ["seed", "finding", "planted", "found", "precision %", "recall %", *at_recall]
    rows: list[Mapping[str, object]] = [
        {
            "kind": result.kind,
            "seed": result.seed,
            "planted": result.planted,
            "found": len(result.true_T),
            "places of the wrong ones": np.flatnonzero(~result.true_T).tolist(),
        }
        for result in results
    ]
    texts = [cells(result) for result in results]
    publish(_TITLE, header, texts, about=about, rows=rows, out=args.out, only_in_file=at_recall)
    if args.out is not None:
        save_curves(results, args.out.with_suffix(".png"))
    return 0


def _said(findings: Findings, planted: Planted) -> str:
    cut = findings.cut
    return (
        f"{len(planted.label_N)} images of {planted.persons} persons; usual cosine {cut.within:.3f} within a label, "
        f"cut {cut.cosine:.3f}; wrong labels above {findings.noise_from:.3f}, duplicates from "
        f"{findings.duplicate:.3f}, splits below {findings.split:.3f}; of the wrong labels that were found and named, "
        f"{100 * names_right(findings, planted):.1f}% with the right name"
    )


if __name__ == "__main__":
    sys.exit(main())
