"""`python -m data verify`: everything that is wrong with a set, and a copy without it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from data.checking.checksums import NAME
from data.checking.findings import KINDS, MOST, Verified
from data.checking.verify import Progress, verify
from data.commands.arguments import CORES, progress_on, shown, whole
from data.errors import DataError
from data.making.rewrite import names_of, names_text, refuse_set, refuse_source, write_set
from data.rec.header import unpack
from data.rec.recordio import RecordReader

_SHOWN = 20


def add(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "verify",
        help="look at every record of a set: structure, header, label, image, index",
        description="Looks at every record of all record files of a set: structure, header, label, image, and whether "
        f"indexes and property fit them; and compares the files with {NAME} where that lies beside them. "
        "Exit code 0: nothing is wrong; 1: something is; 2: it could not be looked at.",
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=whole(1), default=CORES, help=f"that decode, default {CORES} here")
    parser.add_argument("--json", action="store_true", help="everything found, to standard output, for machines")
    parser.add_argument(
        "--show", type=whole(0), default=_SHOWN, metavar="N", help=f"findings to print, default {_SHOWN}"
    )
    parser.add_argument(
        "--fix", type=Path, metavar="OUT", help="write a set of the images that are well to that folder"
    )
    parser.add_argument("--force", action="store_true", help="with --fix: replace a set that is there")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, console: Console) -> int:
    """0: nothing is wrong, 1: something is."""
    if args.fix is not None:
        refuse_source(args.fix, args.folder)
        refuse_set(args.fix, force=args.force)
    with _bars(console) as progress:
        found = verify(args.folder, threads=args.threads, progress=progress)
    if args.json:
        print(json.dumps(found.as_json(), indent=1))
    else:
        _tell(found, args.show)
    if args.fix is not None:
        count, labels = _fix(found, args.fix, force=args.force, console=console)
        text = f"{args.fix}: {count} images of {labels} identities; findings.json says what was left out"
        console.print(text, highlight=False, soft_wrap=True)
    return int(len(found.findings) > 0)


@contextmanager
def _bars(console: Console) -> Iterator[Progress]:
    with progress_on(console, counted=False) as bars:
        tasks: dict[str, Any] = {}

        def progress(what: str, done: int, total: int) -> None:
            task = tasks.setdefault(what, None)
            if task is None:
                task = tasks[what] = bars.add_task(what, total=total)
            bars.update(task, completed=done)

        yield progress


def _tell(found: Verified, most: int) -> None:
    files = len(found.record_files)
    print(
        f"{found.folder}: {found.images} images of {found.labels} identities, {found.identity_headers} identity "
        f"headers, {found.bytes / 1e6:.1f} MB{f' in {files} record files' if files > 1 else ''}"
        f"{_without_index(found.without_index)}"
    )
    if not found.findings:
        print("nothing is wrong with it")
        return
    table = Table("found", "times")
    for kind, count in found.findings.counts.items():
        table.add_row(KINDS[kind], str(count))
    Console().print(table)
    for finding in found.findings.listed()[:most]:
        print(finding.line())
    if len(found.findings) > most:
        print(f"… and {len(found.findings) - most} more: --json lists them, up to {MOST} of a kind")


def _without_index(names: Sequence[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"; without an index, so opening it is a scan: {names[0]}{more}"


def _fix(found: Verified, out: Path, *, force: bool, console: Console) -> tuple[int, int]:
    """Images and identities of the set that was written."""
    folder = Path(found.folder)
    label_N, file_N, offset_N = found.good
    if not len(label_N) or found.size is None:
        raise DataError(f"{folder}: expected some images that are well, found none: nothing was written")
    if found.properties is None:
        raise DataError(f"{folder / 'property'}: --fix needs it, as it says how labels are to be read: write one first")
    classes = found.properties.num_classes

    with ExitStack() as stack:
        readers = []
        for name in found.record_files:
            readers.append(RecordReader(folder / name))
            stack.callback(readers[-1].close)

        def images() -> Iterator[tuple[int, bytes]]:
            for number in np.argsort(label_N, kind="stable").tolist():
                payload = readers[file_N[number]].read_at(int(offset_N[number]))
                yield int(label_N[number]), bytes(unpack(payload)[1])

        texts = {"findings.json": json.dumps(found.as_json(), indent=1) + "\n"}
        texts |= names_text(names_of(folder, classes))
        count = write_set(
            out,
            shown(images(), "writing", len(label_N), console),
            num_classes=classes,
            image_size=found.size,
            texts=texts,
            force=force,
        )
    return count, len(np.unique(label_N))
