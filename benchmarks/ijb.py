"""How long does IJB-C take from embeddings, and how much memory, against pooling and scoring in plain loops?

The set is made here, of IJB-C's size: 469 375 images of 23 124 templates, 15 658 489 pairs of which 19 557 are of one
person. As in IJB-C, the first of a pair is one of 3 531 gallery templates and the second one of the other 19 593; with
--any, both are any templates, which makes the product of all larger. The faces are noise about a person's direction, so
the rates mean nothing.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.measuring.report import digits, facts, publish
from data.commands.arguments import whole
from evaluation.embed.files import EmbeddingFile
from evaluation.ijb.files import read_images
from evaluation.ijb.pair_scores import scores_plainly
from evaluation.ijb.templates import pooled_plainly

_HEADER = ("what", "way", "s", "CPU s", "MB")
_IMAGES, _TEMPLATES, _GALLERY, _PAIRS, _GENUINE = 469_375, 23_124, 3_531, 15_658_489, 19_557
_PIECE = 1 << 18
_SHARE = 20
"""The plain loops do this part of the templates and pairs."""
Ints = npt.NDArray[np.int64]


def make(folder: Path, *, scale: float, dim: int, dtype: str, anywhere: bool) -> tuple[int, int, int]:
    """Write the files of a set of that part of IJB-C's size; numbers of images, templates and pairs."""
    rng = np.random.default_rng(0)
    images, templates, gallery = (max(20, int(scale * count)) for count in (_IMAGES, _TEMPLATES, _GALLERY))
    pairs, genuine = (max(20, int(scale * count)) for count in (_PAIRS, _GENUINE))
    person_T = np.append(np.arange(gallery), rng.integers(0, gallery, templates - gallery))
    template_N = np.sort(np.append(np.arange(templates), rng.integers(0, templates, images - templates)))
    media_N = rng.integers(0, max(2, images // 4), images)
    centres = rng.standard_normal((gallery, dim), np.float32)
    out = np.lib.format.open_memmap(folder / "x.npy", "w+", dtype, (images, dim))
    for start in range(0, images, _PIECE // 16):
        part = template_N[start : start + _PIECE // 16]
        out[start : start + len(part)] = centres[person_T[part]] + 2 * rng.standard_normal((len(part), dim), np.float32)
    out.flush()
    del out
    with (folder / "media.txt").open("w", encoding="ascii") as file, (folder / "points.txt").open("w") as points:
        for n, (template, medium) in enumerate(zip(template_N.tolist(), media_N.tolist(), strict=True)):
            file.write(f"{n}.jpg {template + 1} {medium}\n")
            points.write(f"{n}.jpg 38.29 51.69 73.53 51.50 56.02 71.73 41.54 92.36 70.72 92.20 0.{n % 900 + 100}\n")
    second_G = rng.integers(gallery, templates, genuine)
    first = np.append(person_T[second_G], rng.integers(0, templates if anywhere else gallery, pairs - genuine))
    second = np.append(second_G, rng.integers(0 if anywhere else gallery, templates, pairs - genuine))
    order = np.lexsort((second, first))
    first, second = first[order], second[order]
    same = (person_T[first] == person_T[second]).astype(np.int64)
    with (folder / "pairs.txt").open("w", encoding="ascii") as file:
        for start in range(0, pairs, _PIECE):
            columns = (column[start : start + _PIECE].tolist() for column in (first + 1, second + 1, same))
            file.write("".join(f"{a} {b} {label}\n" for a, b, label in zip(*columns, strict=True)))
    return images, templates, pairs


def command_line(folder: Path) -> tuple[float, float, float, dict[str, Any]]:
    """Seconds, CPU seconds and highest resident MB of the whole command, imports and pictures included; its result."""
    names = [str(folder / name) for name in ("x.npy", "media.txt", "pairs.txt", "points.txt", "out")]
    options = ["--media", names[1], "--pairs", names[2], "--detector", names[3], "--out", names[4], "--force"]
    before, start = _cpu_seconds(), time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "evaluation", "ijb", names[0], *options], check=True, stdout=subprocess.DEVNULL
    )
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return seconds, _cpu_seconds() - before, peak, json.loads((folder / "out" / "ijb.json").read_text(encoding="utf-8"))


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def plainly(folder: Path, pairs: int) -> tuple[float, float]:
    """CPU seconds that plain loops would need for pooling and for scoring all, from a part of either."""
    images = read_images(folder / "media.txt")
    few = images.template_N <= max(2, int(images.template_N.max()) // _SHARE)
    count = int(few.sum())
    x_ND = EmbeddingFile(folder / "x.npy").block(0, count)
    start = time.process_time()
    templates = pooled_plainly(x_ND, images.template_N[:count], images.media_N[:count])
    pooling = (time.process_time() - start) * len(images.names) / count
    some = max(1, pairs // _SHARE)
    rows = np.random.default_rng(0).integers(0, len(templates.ids_T), (2, some))
    start = time.process_time()
    scores_plainly(templates.unit_TD, *rows)
    return pooling, (time.process_time() - start) * pairs / some


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ijb", description=__doc__)
    parser.add_argument("--scale", type=float, default=1.0, help="part of IJB-C's size, default 1")
    parser.add_argument("--dim", type=whole(2), default=512)
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float32")
    parser.add_argument("--any", action="store_true", help="pairs of any two templates")
    parser.add_argument("--repeats", type=whole(1), default=2)
    parser.add_argument("--folder", type=Path, help="keep the set there, and take it from there the next time")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(arguments)
    given = sys.argv[1:] if arguments is None else list(arguments)
    about = facts(torch.device("cpu"), "benchmarks.ijb", given)
    with tempfile.TemporaryDirectory() as name:
        folder = args.folder or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        counts = folder / "counts.json"
        if not counts.exists():
            made = make(folder, scale=args.scale, dim=args.dim, dtype=args.dtype, anywhere=args.any)
            counts.write_text(json.dumps(made), encoding="utf-8")
        images, templates, pairs = json.loads(counts.read_text(encoding="utf-8"))
        size = f"{images} images of {args.dim} components, {args.dtype}, {templates} templates, {pairs} pairs"
        texts, rows = [], []
        for number in range(args.repeats):
            seconds, cpu, peak, found = command_line(folder)
            way = "python -m evaluation ijb"
            texts.append((f"run {number + 1}", way, digits(seconds), digits(cpu), digits(peak)))
            rows.append({"way": way, "s": seconds, "CPU s": cpu, "MB": peak, "verification": found["verification"]})
        pooling, scoring = plainly(folder, pairs)
        for what, seconds in (("pooling", pooling), ("scoring", scoring)):
            texts.append((what, "plain loops, reckoned", "", digits(seconds), ""))
            rows.append({"way": f"plain {what}", "CPU s": seconds})
    about["set"] = size
    about["s, CPU s, MB"] = (
        "of the whole process, from start to written results, and of all its threads; MB: highest resident set, mapped "
        "files included"
    )
    about["plain loops"] = f"a {_SHARE}th part of templates and pairs, multiplied; nothing is read or sorted"
    publish("IJB-C from embeddings", _HEADER, texts, about=about, rows=rows, out=args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
