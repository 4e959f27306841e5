"""`python -m clustering report`: what looks wrong with a labelled set, as CSV files and one page to look at."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from clustering.commands.names import identities
from clustering.commands.page import View, render
from clustering.commands.thumbnails import Thumbnails
from clustering.job.together import InputError
from clustering.report.data import Ints, Labelled, labelled
from clustering.report.find import find_all
from clustering.report.findings import Findings
from clustering.report.findings_csv import FILES, table_text
from clustering.service.parts import PartFiles, map_array
from configs.schema import ConfigError, TrainConfig
from data.errors import DataError
from data.files import appearing
from data.rec.places import where
from data.rec.records import RecordSet
from training.distributed import open_ranks

_PAGE = "index.html"
_SHOWN = 12
_EPILOG = """
Written are OUT/index.html, a page to look at, and noise.csv, duplicates.csv, splits.csv, copies.csv and classes.csv
with all findings. `python -m clustering clean` acts on them. Embeddings come from `python -m evaluation embed`.

    python -m clustering report embeddings.npy --records sets/mine --out report
"""


def add(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "report",
        help="suspected label noise, duplicate and split identities, copies",
        description="Finds what looks wrong with a labelled set by its embeddings; changes nothing.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    about = "a .npy (N, D), or a folder of them: row i is sample i"
    parser.add_argument("embeddings", type=Path, metavar="EMBEDDINGS", help=about)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--records", type=where, metavar="FOLDER", help="the record set: labels, pictures, names")
    source.add_argument("--labels", type=Path, metavar="FILE", help="labels alone, a .npy of whole numbers (N,)")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--force", action="store_true", help="replace a report that is there")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """0 when done, 2 when arguments or files are not as expected, 130 when interrupted; one line says what."""
    try:
        with open_ranks(TrainConfig(device="cpu", precision="fp32")) as ranks:
            if ranks.world_size > 1:
                raise InputError("report: expected one process, got several: start it without torchrun")
            _report(args, lambda data, told: find_all(data, ranks.group, progress=told))
    except (InputError, DataError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


def _report(args: argparse.Namespace, find: Callable[[Labelled, Callable[[str], None]], Findings]) -> None:
    out: Path = args.out
    names = [*FILES, _PAGE]
    there = [name for name in names if (out / name).exists()]
    if there and not args.force:
        raise InputError(f"{out}: expected no report there, found {there[0]}: name another folder, or use --force")
    console = Console(stderr=True)
    records = None if args.records is None else RecordSet.open(args.records)
    labels, num_labels = _labels(args.labels) if records is None else (records.labels, records.num_classes)
    data = labelled(PartFiles(args.embeddings), labels, num_labels)
    with console.status("reading", spinner="line") as status:
        findings = find(data, status.update)
    if records is not None:
        findings = _compare_bytes(findings, records)
    view = _view(args, data, findings, records)
    tables: tuple[Iterable[Any], ...] = (
        findings.noise,
        findings.duplicates,
        findings.splits,
        findings.copies,
        findings.labels,
    )
    with appearing([out / name for name in names]) as partial:
        for path, kind, rows in zip(partial, FILES.values(), tables, strict=False):
            path.write_text(table_text(kind, rows), encoding="utf-8")
        partial[-1].write_text(render(findings, view), encoding="utf-8")
    _say(out, findings, view)


def _labels(path: Path) -> tuple[Ints, int]:
    labels = np.asarray(map_array(path, kinds="iu", shape=(None,), what="labels, whole numbers (N,)"))
    most = 2 * len(labels) + 1000  # far larger numbers are something else, and a row is kept for each
    if not len(labels) or int(labels.min()) < 0 or int(labels.max()) >= most:
        found = f"{labels.min()} … {labels.max()}" if len(labels) else "none"
        raise InputError(f"{path}: expected labels from 0 to the number of labels less 1, got {found}")
    return labels.astype(np.int64), int(labels.max()) + 1


def _compare_bytes(findings: Findings, records: RecordSet) -> Findings:
    copies = []
    for row in findings.copies:
        same = bytes(records.image(row.sample)[1]) == bytes(records.image(row.copy_of)[1])
        copies.append(row._replace(same_bytes=same))
    return findings.with_copies(copies)


def _view(args: argparse.Namespace, data: Labelled, findings: Findings, records: RecordSet | None) -> View:
    cut = findings.cut
    facts = [
        ("embeddings", f"{args.embeddings}: {len(data.x_PD):,} of {data.x_PD.shape[1]} components"),
        ("labels", f"{args.records or args.labels}: {np.count_nonzero(np.diff(data.start_C)):,} with samples"),
        (
            "usual cosines",
            f"{cut.within:.3f} within a label, {cut.across:.3f} across; samples begin to belong together at "
            f"{cut.cosine:.3f}",
        ),
        (
            "taken as findings",
            f"wrong labels above a score of {findings.noise_from:.3f}, duplicates from {findings.duplicate:.3f}, "
            f"splits from {1 - findings.split:.3f}",
        ),
    ]
    warnings = []
    if not cut.separates:
        warnings.append(
            f"The embeddings hardly tell labels apart: a usual pair of a label has a cosine of {cut.within:.3f}, and "
            f"one pair in a hundred across labels exceeds {cut.stranger:.3f}. Nothing below means much. Is row i of "
            "sample i? Has the network been trained?"
        )
    if len(data.without):
        few = ", ".join(map(str, data.without[:10].tolist()))
        warnings.append(
            f"{len(data.without):,} samples have no embedding (rows of zeros) and take no part, the first: {few}"
        )
    clean = ""
    if records is not None:
        flags = "--relabel --drop-noise --merge-duplicates --split --drop-copies"
        folder = shlex.quote(str(args.records))
        clean = f"python -m clustering clean {shlex.quote(str(args.out))} --records {folder} --out CLEANED {flags}"
    names = [] if records is None else identities(records)
    return View(
        title=f"Report on {args.records or args.labels}",
        facts=facts,
        warnings=warnings,
        samples_of=_Ordinary(data, findings),
        name_of=lambda label: names[label] if names else "",
        thumbnail=None if records is None else Thumbnails(records),
        clean=clean,
    )


class _Ordinary:
    """Samples of a label that no finding speaks of, the first few; of all its samples where none is left."""

    def __init__(self, data: Labelled, findings: Findings) -> None:
        self._data = data
        self._spoken_of = {row.sample for row in findings.noise} | {row.sample for row in findings.copies}
        self._spoken_of.update(sample for row in findings.splits for sample in row.samples)
        self._known: dict[int, Sequence[int]] = {}

    def __call__(self, label: int) -> Sequence[int]:
        if label not in self._known:
            samples = self._data.sample_P[self._data.rows(label)].tolist()
            left = [sample for sample in samples if sample not in self._spoken_of]
            self._known[label] = (left or samples)[:_SHOWN]
        return self._known[label]


def _say(out: Path, findings: Findings, view: View) -> None:
    for text in view.warnings:
        print(f"warning: {text}", file=sys.stderr)
    found = (
        f"{len(findings.noise)} suspected wrong labels, {len(findings.duplicates)} duplicate identities, "
        f"{len(findings.splits)} split identities, {len(findings.copies)} copies"
    )
    print(f"{out / _PAGE}: {found}")
