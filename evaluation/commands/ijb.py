"""`python -m evaluation ijb`: IJB-B and IJB-C, 1:1 and 1:N, from embeddings."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

from data.commands.arguments import progress_on
from data.errors import DataError
from evaluation.commands.results import PAGE, percent, rates, refuse_present, refuse_ranks, show, write_results
from evaluation.embed.files import EmbeddingFile
from evaluation.identification import FPIRS, RANKS, Identification
from evaluation.ijb.files import check_rows, read_images, read_pairs, read_persons, read_points
from evaluation.ijb.ijb import OneToOne, joined, one_to_many, one_to_one
from evaluation.ijb.templates import Templates, pooled
from evaluation.page import Summary, Table
from evaluation.plots import det_figure, label, roc_figure
from evaluation.verification import tar_name

_EXAMPLE = (
    "python -m evaluation ijb x.npy --media meta/ijbc_face_tid_mid.txt --pairs meta/ijbc_template_pair_label.txt "
    "--detector meta/ijbc_name_5pts_score.txt"
)
_FILE = "ijb.json"
_PAIRS = (
    "1:1: cosines of all pairs in float64. TAR@FAR is the best TAR of all thresholds whose FAR is at most the rate. "
    "Nothing is interpolated.",
    "Nearest point: the TAR at the ROC's point whose FAR is nearest to the rate, be it above, as insightface reports.",
)
SEARCHES = (
    "Rank k: the share of searches for a person who is there in which fewer than k other entries score as high as the "
    "right one, or higher. A tie is not found.",
    "TPIR@FPIR: the share of them in which the right entry is first and reaches the threshold, at the best threshold "
    "that at most the rate's share of the searches for others reach.",
)
"""How `searches_table` counts."""


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
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=f"{_FILE}, {PAGE}, roc.png, det.png")
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
    tables: list[Table] = []
    figures: dict[str, Figure] = {}
    if args.pairs is not None:
        verified = _one_to_one(templates, args)
        tables.append(_pairs_table(verified))
        show(tables[-1])
        content["verification"] = _describe_pairs(verified)
        if args.out is not None:
            curve = {label(args.pairs.stem): verified.roc}
            figures = {"roc.png": roc_figure(curve, title="ROC"), "det.png": det_figure(curve, title="DET")}
    if args.gallery:
        found = _one_to_many(templates, args)
        names = ["joined"] if args.join else [Path(name).stem for name in found]
        tables.append(searches_table("1:N", names, found.values()))
        show(tables[-1])
        content["identification"] = {
            "galleries": {name: describe_searches(result) for name, result in found.items()},
            "mean": _mean(list(found.values())),
        }
    if args.out is not None:
        summary = Summary(f"IJB: {args.embeddings.name}", _facts(args, len(templates.ids_T)), tables, _method(args))
        write_results(args.out, _FILE, content, summary, figures=figures)


def _facts(args: argparse.Namespace, templates: int) -> list[tuple[str, str]]:
    given = {
        "embeddings": args.embeddings,
        "images": args.media,
        "detector's scores": args.detector,
        "pairs": args.pairs,
        "galleries": " + ".join(map(str, args.gallery)) or None,
        "probes": args.probes,
    }
    return [*((name, str(value)) for name, value in given.items() if value is not None), ("templates", str(templates))]


def _method(args: argparse.Namespace) -> list[str]:
    """The choices of this command line, in words."""
    image = "the sum of the embeddings of image and mirror image" if args.halves else "the row of the file"
    length = "scaled to length 1" if args.unit else "of the length that it has"
    weight = "times the detector's score" if args.detector is not None else "not weighted"
    how = [
        f"An image is {image}, {length}, {weight}. A template is the sum over its media of the mean over a medium's "
        "images, scaled to length 1; in float64.",
    ]
    if args.pairs is not None:
        how += _PAIRS
    if args.gallery:
        searched = "all galleries as one are searched" if args.join else "each gallery is searched by itself"
        how += [f"1:N: {searched}, by all probes.", *SEARCHES]
    return how


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
        return one_to_one(templates, pairs)
    except ValueError as error:
        raise DataError(f"{args.pairs}: {error}") from None


def _pairs_table(found: OneToOne) -> Table:
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
    return Table(title, ("", "%", "% nearest point", "threshold"), rows, notes)


def _describe_pairs(found: OneToOne) -> dict[str, Any]:
    entries = zip(rates(found.tar_at_far), found.nearest, strict=True)
    return {
        "genuine": found.roc.genuine,
        "impostors": found.roc.impostors,
        "auc": found.roc.auc,
        "eer": found.roc.eer,
        "rates": [{**entry, "nearest_point": nearest} for entry, nearest in entries],
    }


def _one_to_many(templates: Templates, args: argparse.Namespace) -> dict[str, Identification]:
    """By the gallery's path."""
    galleries = [read_persons(path, templates.ids_T, args.media) for path in args.gallery]
    probes = read_persons(args.probes, templates.ids_T, args.media)
    if args.join:
        galleries = [joined(galleries)]
    return {str(gallery.path): one_to_many(templates, gallery, probes) for gallery in galleries}


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


def searches_table(title: str, names: Sequence[str], results: Iterable[Identification]) -> Table:
    """A row for each, and why figures are missing."""
    header = [*("", "searches", "of others"), *(f"rank {k}" for k in RANKS), *(f"TPIR@FPIR={fpir:g}" for fpir in FPIRS)]
    rows, notes = [], []
    for name, result in zip(names, results, strict=True):
        figures = [*(result.rank[k] for k in RANKS), *(entry.tar for entry in result.tpir)]
        rows.append([name, str(result.mated), str(result.non_mated), *map(percent, figures)])
        notes += [f"{name}: {entry.reason}" for entry in result.tpir if entry.reason]
    return Table(f"{title}, %", header, rows, notes)
