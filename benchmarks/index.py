"""How long does the index of a record file take to open, and how much memory, against numpy.loadtxt and plain Python?

The index is made here: keys 1, 2, … and 0 last, offsets as images of 4 to 14 kB have them. Each way of reading it runs
in a process of its own, so that its peak of memory is its own; the slow ones read the first lines only.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.measuring.report import digits, facts, publish
from data.commands.arguments import whole
from data.rec.index import read_index
from data.rec.recordio import Records

_TITLE = "Index of a record file: opening it"
_HEADER = ("way", "lines", "s", "µs a line", "MB", "time")
_PIECE = 1 << 20
_SLOW = 1 << 20
"""Lines that the slow ways read."""
OURS = "ours"


class _Size(Records):
    """A record file that is only asked for its size."""

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size = path, size


class Taken(NamedTuple):
    seconds: float
    megabytes: float
    """Highest resident set beyond that before it began."""
    lines: int


def write_index(path: Path, lines: int, seed: int) -> int:
    """Write it; the size of the record file that it would be of."""
    rng, end = np.random.default_rng(seed), 0
    with path.open("wb") as file:
        for start in range(0, lines, _PIECE):
            keys = np.arange(start + 1, min(lines, start + _PIECE) + 1)
            offsets = end + np.cumsum(4 * rng.integers(1000, 3500, len(keys)))
            offsets, end = np.concatenate(([end], offsets[:-1])), int(offsets[-1])
            if keys[-1] == lines:
                keys[-1] = 0
            pairs = zip(keys.tolist(), offsets.tolist(), strict=True)
            file.write(b"".join(b"%d\t%d\n" % pair for pair in pairs))
    return end


def ours(path: Path, size: int) -> int:
    """What opening a set does: read, and check that nothing comes twice, is out of order or outside of the file."""
    return len(read_index(path, _Size(path, size)).keys)


def loadtxt(path: Path, _: int) -> int:
    """NumPy's reader, without checks."""
    return len(np.loadtxt(path, np.int64, delimiter="\t", max_rows=_SLOW))


def dictionary(path: Path, _: int) -> int:
    """A dict of keys, as mxnet's indexed reader makes it."""
    table, wanted = {}, _SLOW
    with path.open(encoding="ascii") as file:
        for line in file:
            key, offset = line.strip().split("\t")
            table[int(key)] = int(offset)
            wanted -= 1
            if not wanted:
                break
    return len(table)


WAYS: dict[str, Callable[[Path, int], int]] = {OURS: ours, "numpy.loadtxt": loadtxt, "dict, line by line": dictionary}


def _measure(name: str, path: Path, size: int) -> Taken:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    lines = WAYS[name](path, size)
    seconds = time.perf_counter() - begin
    return Taken(seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, lines)


def measure(name: str, path: Path, size: int) -> Taken:
    """In a process of its own."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure, (name, path, size))


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when done."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.index", description=__doc__)
    parser.add_argument("--lines", type=whole(10), default=42_474_558, help="default 42,474,558, WebFace42M's images")
    parser.add_argument("--repeats", type=whole(1), default=5, help="default 5")
    parser.add_argument("--out", type=Path, metavar="FILE.md")
    args = parser.parse_args(arguments)
    about = facts(torch.device("cpu"), "benchmarks.index", arguments)
    taken: dict[str, list[Taken]] = {name: [] for name in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.idx"
        size = write_index(path, args.lines, seed=0)
        about["index"] = f"{args.lines} lines, {path.stat().st_size / 1e6:.0f} MB, in the page cache"
        for _ in range(args.repeats):
            for name, times in taken.items():
                times.append(measure(name, path, size))
    about["MB"] = "highest resident set of the process, beyond that before it began"
    about["time"] = "of a line, against ours"
    texts, rows = [], []
    per_line = {name: statistics.median(one.seconds / one.lines for one in times) for name, times in taken.items()}
    for name, times in taken.items():
        seconds, memory = (statistics.median(column) for column in list(zip(*times, strict=True))[:2])
        ratio = per_line[name] / per_line[OURS]
        texts.append(
            (name, f"{times[0].lines}", digits(seconds), digits(1e6 * per_line[name]), digits(memory), f"{ratio:.1f}")
        )
        rows.append({"way": name, "seconds": [one.seconds for one in times], "MB": [one.megabytes for one in times]})
    publish(_TITLE, _HEADER, texts, about=about, rows=rows, out=args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
