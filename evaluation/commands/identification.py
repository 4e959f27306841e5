"""`python -m evaluation identification`: probes of known persons among distractors, in the manner of MegaFace."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from data.commands.arguments import progress_on
from data.errors import DataError
from evaluation.commands.ijb import SEARCHES, describe_searches, searches_table
from evaluation.commands.results import PAGE, refuse_present, refuse_ranks, show, write_results
from evaluation.distractors import among_distractors
from evaluation.embed.files import EmbeddingFile, read_labels
from evaluation.page import Summary

_EXAMPLE = "python -m evaluation identification facescrub.npy --labels facescrub_labels.npy --distractors megaface.npy"
_FILE = "identification.json"


def add(commands: Any) -> None:
    """Add the subcommand."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "identification",
        help="rank-k and TPIR@FPIR of probes among distractors, in the manner of MegaFace",
        epilog=f"Example: {_EXAMPLE}",
    )
    parser.add_argument("probes", type=Path, metavar="PROBES.npy")
    parser.add_argument("--labels", type=Path, required=True, metavar="FILE.npy", help="the person of each probe")
    parser.add_argument("--distractors", type=Path, required=True, metavar="FILE.npy")
    parser.add_argument(
        "--distractor-labels", type=Path, metavar="FILE.npy", help="to see that no probe's person is among them"
    )
    parser.add_argument("--halves", action="store_true", help="a row is image, then mirror image: take their sum")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=f"{_FILE}, {PAGE}")
    parser.add_argument("--force", action="store_true", help="replace results that are there")
    parser.set_defaults(run_alone=_run)


def _run(args: argparse.Namespace, console: Console) -> None:
    refuse_ranks()
    refuse_present(args.out, [_FILE], force=args.force)
    probes, distractors = (EmbeddingFile(path, halves=args.halves) for path in (args.probes, args.distractors))
    if probes.dim != distractors.dim:
        raise DataError(
            f"{args.distractors}: expected embeddings of {probes.dim} components as in {args.probes}, found "
            f"{distractors.dim}: embed both with one model"
        )
    label_Q = read_labels(args.labels, probes.rows)
    if args.distractor_labels is not None:
        others = read_labels(args.distractor_labels, distractors.rows)
        both = np.flatnonzero(np.isin(others, label_Q))
        if len(both):
            raise DataError(
                f"{args.distractor_labels}: row {both[0]}: label {others[both[0]]} is a probe's: expected other persons"
            )
    with progress_on(console) as progress:
        task = progress.add_task("distractors", total=distractors.rows)
        found, alone = among_distractors(
            probes, label_Q, distractors, progress=lambda count: progress.advance(task, count)
        )
    title = f"{probes.rows} probes among {distractors.rows} distractors"
    table = searches_table(title, [args.probes.stem], [found])
    if alone:
        note = f"{alone} probes are the only ones of their person: they count in FPIR alone"
        table = table._replace(notes=[*table.notes, note])
    show(table)
    if args.out is not None:
        content = {
            "probes": str(args.probes),
            "distractors": {"file": str(args.distractors), "rows": distractors.rows},
            "probes_without_mate": alone,
            **describe_searches(found),
        }
        facts = [("probes", args.probes), ("labels", args.labels), ("distractors", args.distractors)]
        title = f"Identification: {args.probes.stem} among {args.distractors.stem}"
        summary = Summary(title, [(name, str(path)) for name, path in facts], [table], _method(args))
        write_results(args.out, _FILE, content, summary)


def _method(args: argparse.Namespace) -> list[str]:
    """The choices of this command line, in words."""
    image = "the sum of the embeddings of image and mirror image" if args.halves else "the row of the file"
    known = "that none of the probes' persons is among the distractors has been checked"
    if args.distractor_labels is None:
        known = "whether one of the probes' persons is among the distractors has not been checked"
    return [
        f"An image is {image}, scaled to length 1. Score: cosine.",
        "Of each person, every image is the probe for every other one, which joins the distractors alone.",
        *SEARCHES,
        f"Searches for others are those of all probes among the distractors alone; {known}.",
    ]
