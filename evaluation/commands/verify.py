"""`python -m evaluation verify`: a backbone on verification sets, on all ranks."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from rich.console import Console

from backbones import Backbone
from data.commands.arguments import progress_on, whole
from data.errors import DataError
from evaluation.bootstrap import LEVEL, RESAMPLES, Interval, bootstrap
from evaluation.commands.model import add_model, chosen_model
from evaluation.commands.results import PAGE, names_of, percent, rates, refuse_present, show, write_results
from evaluation.embed.records import EmbedError, load_backbone
from evaluation.export.run import open_onnx
from evaluation.page import Summary, Table
from evaluation.pairs import PairEmbeddings, embed_pairs, read_pairs
from evaluation.plots import det_figure, label, roc_figure, score_figure
from evaluation.runs import FOLDER, SCORES
from evaluation.verification import Verification, verify

_EXAMPLE = "python -m evaluation verify --run runs/mine sets/lfw.bin sets/cfp_fp.bin --out runs/mine/evaluation"
_FILE = "verification.json"
_PROTOCOL = (
    "Embedding: that of the image plus that of its mirror image, scaled to length 1, in float64. Score: cosine.",
    "Accuracy: ten folds in the order of the file; each by the threshold that is best on the other nine, of squared "
    "distances below 0, 0.01 … 3.99; the mean over the folds.",
    "TAR@FAR: the best TAR of all thresholds whose FAR is at most the rate. Nothing is interpolated.",
    "AUC and EER: ties count half; the EER lies where straight lines between the ROC's points cross FAR = 1 - TAR.",
)
_METHOD = (
    f"{LEVEL:.0%} percentile intervals of a bootstrap by pair: each pair is replaced by one drawn, with replacement, "
    "from those of its fold and kind; folds and thresholds are computed anew"
)


def add(commands: Any) -> argparse.ArgumentParser:
    """Add the subcommand."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "verify",
        help="ten-fold accuracy, TAR@FAR, EER and AUC on verification sets (lfw.bin …), with intervals",
        description="Under torchrun each rank embeds its part: torchrun --nproc_per_node=8 -m -- evaluation verify … "
        "(without the -- torchrun takes --run for its own).",
        epilog=f"Example: {_EXAMPLE}",
    )
    parser.add_argument("sets", type=Path, nargs="+", metavar="SET.bin")
    add_model(parser)
    parser.add_argument("--onnx", type=Path, metavar="FILE", help="an exported backbone in their place, on the CPU")
    about = f"{_FILE}, {PAGE}, pictures, scores; in a run's {FOLDER}/ for compare"
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=about)
    parser.add_argument("--resamples", type=whole(0), default=RESAMPLES, help=f"default {RESAMPLES}; 0: no intervals")
    parser.add_argument("--seed", type=whole(0), default=0, help="of the intervals, default 0")
    parser.add_argument("--force", action="store_true", help="replace results that are there")
    return parser


def verify_sets(
    args: argparse.Namespace,
    *,
    device: torch.device,
    group: dist.ProcessGroup,
    is_main: bool,
    console: Console,
) -> None:
    """Evaluate on all ranks; the main one prints and writes. Collectives: one all-gather a set.

    Raises DataError, EmbedError and ConfigError, on all ranks alike, before anything is embedded where a set cannot
    be evaluated.
    """
    names = names_of(args.sets)
    if args.resamples == 1:
        raise DataError("--resamples: expected 0, for no intervals, or at least 2, got 1")
    files = [_FILE, *(SCORES.format(name) for name in names)]
    refuse_present(args.out, files, force=args.force)
    sets = {path.stem: read_pairs(path) for path in args.sets}
    kind, weights, backbone = _backbone(args)
    backbone.to(device)
    results: dict[str, Verification] = {}
    with progress_on(console) as progress:
        task = progress.add_task("sets", total=len(sets), visible=is_main)
        for name, pairs in sets.items():
            try:
                embedded = embed_pairs(backbone, pairs.images, pairs.same, batch_size=args.batch_size, group=group)
            except DataError as error:  # the same on all ranks
                raise DataError(f"{name}: {error}") from None
            _refuse_not_finite(name, embedded)
            if is_main:
                results[name] = verify(*embedded)
            progress.advance(task)
    if not is_main:
        return
    intervals = {name: _intervals(result, args) for name, result in results.items()}
    table = _table(results, intervals)
    show(table)
    if args.out is not None:
        about = {"backbone": kind, "embedding_size": backbone.embedding_size, "weights": str(weights)}
        method = {"resamples": args.resamples, "seed": args.seed, "method": _METHOD} if args.resamples else None
        described = {name: _describe(result, intervals[name]) for name, result in results.items()}
        content = {"model": about, "intervals": method, "sets": described}
        scores = {
            SCORES.format(name): np.column_stack([result.scores_P, result.same_P]) for name, result in results.items()
        }
        facts = [
            ("backbone", f"{kind}, {backbone.embedding_size} components"),
            ("weights", str(weights)),
            *((path.name, _pairs_in_words(results[path.stem])) for path in args.sets),
        ]
        summary = Summary(f"Verification: {', '.join(names)}", facts, [table], _method(args))
        write_results(args.out, _FILE, content, summary, figures=_figures(results), arrays=scores)


def _backbone(args: argparse.Namespace) -> tuple[str, Path, Backbone]:
    """Its name, its file, and itself."""
    if args.onnx is None:
        model, weights = chosen_model(args, example=_EXAMPLE)
        backbone = load_backbone(model.backbone, embedding_size=model.embedding_size, weights=weights)
        return model.backbone, weights, backbone
    if args.run is not None or args.weights is not None or args.backbone is not None:
        raise DataError("expected --onnx alone, or --run, or --weights and --backbone: one backbone is verified")
    return "ONNX", args.onnx, open_onnx(args.onnx)


def _method(args: argparse.Namespace) -> list[str]:
    """The choices of this command line, in words."""
    if not args.resamples:
        return [*_PROTOCOL]
    return [
        *_PROTOCOL,
        f"Intervals: {_METHOD}. {args.resamples} resamples, seed {args.seed}. Pairs that share a person are drawn as "
        "if they did not: for new persons the truth is wider.",
    ]


def _refuse_not_finite(name: str, embedded: PairEmbeddings) -> None:
    for which, x_PD in enumerate((embedded.first_PD, embedded.second_PD)):
        bad = np.flatnonzero(~np.isfinite(x_PD).all(axis=1))
        if len(bad):
            raise EmbedError(
                f"{name}: image {2 * bad[0] + which}: its embedding is not finite: are these "
                "weights of a training that has diverged?"
            )


def _intervals(result: Verification, args: argparse.Namespace) -> dict[str, Interval]:
    if not args.resamples:
        return {}
    return bootstrap(2 * (1 - result.scores_P), result.same_P, resamples=args.resamples, seed=args.seed)


def _table(results: dict[str, Verification], intervals: dict[str, dict[str, Interval]]) -> Table:
    rows, notes = [], []
    for name, result in results.items():
        for key, value in result.values().items():
            if key == "accuracy_std":
                continue
            found = intervals[name].get(key)
            spread = f"{percent(found.low)} … {percent(found.high)}" if found else ""
            rows.append((name, key, percent(value), spread))
        notes += [f"{name}: {entry.reason}" for entry in result.tar_at_far if entry.reason]
    header = ("set", "figure", "%", f"{LEVEL:.0%} interval" if any(intervals.values()) else "")
    return Table("Verification", header, rows, notes)


def _pairs_in_words(result: Verification) -> str:
    return f"{result.roc.genuine} pairs of one person, {result.roc.impostors} of two"


def _describe(result: Verification, intervals: dict[str, Interval]) -> dict[str, Any]:
    return {
        "pairs": len(result.same_P),
        "genuine": result.roc.genuine,
        "impostors": result.roc.impostors,
        **result.values(),
        "intervals": {name: list(interval) for name, interval in intervals.items()},
        "rates": rates(result.tar_at_far),
        "folds": {
            "accuracies": result.ten_fold.accuracies_F.tolist(),
            "squared_distances": result.ten_fold.thresholds_F.tolist(),
        },
    }


def _figures(results: dict[str, Verification]) -> dict[str, Figure]:
    curves = {label(name): result.roc for name, result in results.items()}
    figures = {"roc.png": roc_figure(curves, title="ROC"), "det.png": det_figure(curves, title="DET")}
    for name, result in results.items():
        figures[f"scores_{name}.png"] = score_figure(result, title=f"{label(name)}: {len(result.same_P)} pairs")
    return figures
