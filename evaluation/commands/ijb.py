"""`python -m evaluation ijb`: IJB-B and IJB-C, 1:1 and 1:N, from embeddings."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

from data.commands.arguments import progress_on
from data.errors import DataError
from evaluation.commands.results import percent, rates, refuse_present, refuse_ranks, show, write_results
from evaluation.embedding_files import EmbeddingFile
from evaluation.identification import FPIRS, RANKS, Identification
from evaluation.ijb import OneToOne, joined, one_to_many, one_to_one
from evaluation.ijb_files import check_rows, read_images, read_pairs, read_persons, read_points
from evaluation.plots import det_figure, roc_figure
from evaluation.templates import Templates, pooled
from evaluation.verification import tar_name

_EXAMPLE = (
    "python -m evaluation ijb x.npy --media meta/ijbc_face_tid_mid.txt --pairs meta/ijbc_template_pair_label.txt "
    "--detector meta/ijbc_name_5pts_score.txt"
)
_FILE = "ijb.json"


def add(commands: Any) -> None:
    """Add the subcommand."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "ijb", help="IJB-B and IJB-C, 1:1 and 1:N, from embeddings", epilog=f"Example: {_EXAMPLE}"
    )
    parser.add_argument("embeddings", type=Path, metavar="X.npy", help="row i of image i of the --media file")
    parser.add_argument("--media", type=Path, required=True, metavar="FILE", help="…_face_tid_mid.txt")
    parser.add_argument("--pairs", type=Path, metavar="FILE", help="…_template_pair_label.txt: 1:1")
    parser.add_argument(
        "--gallery", type=Path, nargs="+", default=[], metavar="CSV", help="…_1N_gallery_G1.csv and G2: 1:N, each alone"
    )
    parser.add_argument("--probes", type=Path, metavar="CSV", help="…_1N_probe_mixed.csv, with --gallery")
    parser.add_argument(
        "--join", action="store_true", help="the galleries as one, as insightface's closed set has them"
    )
    parser.add_argument(
        "--detector", type=Path, metavar="FILE", help="…_name_5pts_score.txt: weight images by its score"
    )
    parser.add_argument("--halves", action="store_true", help="a row is image, then mirror image: take their sum")
    parser.add_argument("--unit", action="store_true", help="scale images to unit length before they are pooled")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=f"{_FILE}, roc.png, det.png")
    parser.add_argument("--force", action="store_true", help="replace results that are there")
    parser.set_defaults(run_alone=_run)


def _run(args: argparse.Namespace, console: Console) -> None:
    refuse_ranks()
    if args.pairs is None and not args.gallery:
        raise DataError(f"expected --pairs, or --gallery and --probes, for example: {_EXAMPLE}")
    if bool(args.gallery) != (args.probes is not None):
        raise DataError("expected both of --gallery and --probes, or none")
    refuse_present(args.out, [_FILE], force=args.force)
    templates = _templates(args, console)
    content: dict[str, Any] = {
        "embeddings": str(args.embeddings),
        "templates": len(templates.ids_T),
        "pooling": {"detector": str(args.detector or ""), "halves": args.halves, "unit_images": args.unit},
    }
    figures: dict[str, Figure] = {}
    if args.pairs is not None:
        verified = _one_to_one(templates, args)
        content["verification"] = _describe_pairs(verified)
        if args.out is not None:
            figures = {
                "roc.png": roc_figure({args.pairs.stem: verified.roc}, title="ROC"),
                "det.png": det_figure({args.pairs.stem: verified.roc}, title="DET"),
            }
    if args.gallery:
        content["identification"] = _one_to_many(templates, args)
    if args.out is not None:
        write_results(args.out, _FILE, content, figures=figures)


def _templates(args: argparse.Namespace, console: Console) -> Templates:
    images = read_images(args.media)
    embeddings = EmbeddingFile(args.embeddings, halves=args.halves)
    check_rows(args.embeddings, embeddings.rows, images)
    weight_N = read_points(args.detector, images).score_N if args.detector is not None else None
    with progress_on(console) as progress:
        task = progress.add_task("images", total=embeddings.rows)
        return pooled(
            embeddings,
            images.template_N,
            images.media_N,
            weight_N=weight_N,
            unit_images=args.unit,
            progress=lambda count: progress.advance(task, count),
        )


def _one_to_one(templates: Templates, args: argparse.Namespace) -> OneToOne:
    pairs = read_pairs(args.pairs, templates.ids_T, args.media)
    try:
        found = one_to_one(templates, pairs)
    except ValueError as error:
        raise DataError(f"{args.pairs}: {error}") from None
    rows = [
        (
            tar_name(entry.far),
            percent(entry.tar),
            percent(nearest),
            f"{entry.threshold:.4f}" if not entry.reason else "",
        )
        for entry, nearest in zip(found.tar_at_far, found.nearest, strict=True)
    ]
    title = f"1:1: {found.roc.genuine} pairs of one person, {found.roc.impostors} of two"
    notes = [f"AUC {percent(found.roc.auc, 3)}%, EER {percent(found.roc.eer, 3)}%"]
    notes += [entry.reason for entry in found.tar_at_far if entry.reason]
    show(title, ("", "%", "% nearest point", "threshold"), rows, notes)
    return found


def _describe_pairs(found: OneToOne) -> dict[str, Any]:
    entries = zip(rates(found.tar_at_far), found.nearest, strict=True)
    return {
        "genuine": found.roc.genuine,
        "impostors": found.roc.impostors,
        "auc": found.roc.auc,
        "eer": found.roc.eer,
        "rates": [{**entry, "nearest_point": nearest} for entry, nearest in entries],
    }


def _one_to_many(templates: Templates, args: argparse.Namespace) -> dict[str, Any]:
    galleries = [read_persons(path, templates.ids_T, args.media) for path in args.gallery]
    probes = read_persons(args.probes, templates.ids_T, args.media)
    if args.join:
        galleries = [joined(galleries)]
    found = {str(gallery.path): one_to_many(templates, gallery, probes) for gallery in galleries}
    described = {name: describe_searches(result) for name, result in found.items()}
    names = [Path(name).stem if not args.join else "joined" for name in found]
    show_searches("1:N", names, list(found.values()))
    return {"galleries": described, "mean": _mean(list(found.values()))}


def _mean(found: Sequence[Identification]) -> dict[str, Any]:
    """Over galleries, each with the same weight; no figure where one has none."""
    return {
        "rank": {k: float(np.mean([result.rank[k] for result in found])) for k in RANKS},
        "tpir": {f"{fpir:g}": float(np.mean([r.tpir[number].tar for r in found])) for number, fpir in enumerate(FPIRS)},
    }


def describe_searches(found: Identification) -> dict[str, Any]:
    """For JSON."""
    return {
        "mated": found.mated,
        "non_mated": found.non_mated,
        "rank": found.rank,
        "rates": rates(found.tpir, found="tpir", asked="fpir"),
    }


def show_searches(title: str, names: Sequence[str], results: Sequence[Identification]) -> None:
    """A row for each, and why figures are missing."""
    header = [*("", "searches", "of others"), *(f"rank {k}" for k in RANKS), *(f"TPIR@FPIR={fpir:g}" for fpir in FPIRS)]
    rows, notes = [], []
    for name, result in zip(names, results, strict=True):
        figures = [*(result.rank[k] for k in RANKS), *(entry.tar for entry in result.tpir)]
        rows.append([name, str(result.mated), str(result.non_mated), *map(percent, figures)])
        notes += [f"{name}: {entry.reason}" for entry in result.tpir if entry.reason]
    show(f"{title}, %", header, rows, notes)
