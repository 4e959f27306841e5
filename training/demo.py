"""`make demo`: pack synthetic faces into records, train on two ranks with clusters, and show what came of it."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from clustering.service.class_report import ClassReport
from data.contact_sheet import Pixels, write_png
from data.rec.records import RecordSet
from data.synthetic import SyntheticFaces
from training.showing.gallery import class_sheet

_ROOT = Path(__file__).parents[1]
_RANKS = 2


class Size(NamedTuple):
    """How much is packed and trained."""

    identities: int = 1000
    images: int = 20
    """Of an identity, at most: the long tail leaves two thirds of it on average."""
    held_out: int = 200
    pairs: int = 3000
    settings: tuple[str, ...] = ()
    """Passed on to `train_dist.py --set`."""


SMALL = Size(24, 8, 12, 400, ("train.epochs=8", "train.batch_size=12", "train.log_steps=4", "optim.warmup_epochs=0"))


class DemoError(RuntimeError):
    """A step of the demo failed; it has said why itself."""


def run(folder: Path, size: Size, console: Console) -> None:
    """Pack, train and tell, all below `folder`. Raises DemoError when a step fails."""
    data, trained = folder / "data", folder / "run"
    started = time.perf_counter()
    console.rule(f"1/3  drawing and packing {size.identities} identities into {data}")
    pack(data, size)
    console.rule(f"2/3  training on {_RANKS} ranks: torchrun train_dist.py --config configs/demo.yaml")
    _train(data, trained, size)
    console.rule("3/3  what came of it")
    classes = json.loads((trained / "classes.json").read_text(encoding="utf-8"))
    records = RecordSet.open(data)
    rows = [ClassReport(**row) for row in classes]
    write_png(trained / "classes.png", class_sheet(records, rows, 8))
    few = (class_sheet(records, rows[:3], 5), class_sheet(records, rows[-3:], 5))
    _picture(trained / "roc_verification.png", *few).save(trained / "demo.jpg", quality=88)
    console.print(_table(trained, classes, time.perf_counter() - started))
    board = shlex.join([str(Path(sys.executable).with_name("tensorboard")), "--logdir", str(trained / "tensorboard")])
    for name, value in (
        ("TensorBoard log", str(trained / "tensorboard")),
        ("look at it with", board),
        ("ROC", str(trained / "roc_verification.png")),
        ("contact sheet", f"{trained / 'classes.png'} (easiest classes first, hardest last)"),
    ):
        console.print(f"{name:<16} {value}", highlight=False, soft_wrap=True)


def _call(*command: str) -> None:
    sys.stdout.flush()  # ours before theirs, when the output is a file
    quiet = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}  # torchrun's own warning of it
    if subprocess.run([sys.executable, "-m", *command], check=False, env=quiet).returncode:
        raise DemoError(f"`{shlex.join(command)}` failed, see above")


def pack(folder: Path, size: Size) -> None:
    """Pack, unless the same command has done so before, and draws the same today."""
    command = [
        *("data", "pack", "synthetic", "--out", str(folder), "--force", "--seed", "0"),
        *("--identities", str(size.identities), "--images-per-identity", str(size.images)),
        *("--label-noise", "0.02", "--long-tail", "0.3", "--difficulty-spread", "0.7"),
        *("--verification-identities", str(size.held_out), "--pairs", str(size.pairs)),
    ]
    some = SyntheticFaces(identities=8, seed=0)
    drawn = hashlib.sha256(b"".join(some.jpeg(identity, 0) for identity in range(8))).hexdigest()
    receipt, text = folder / "packed_by.txt", f"{shlex.join(command)}\n{drawn}\n"
    if receipt.is_file():
        if receipt.read_text(encoding="utf-8") == text:
            print("already there, packed by the same command")
            return
        receipt.unlink()
    _call(*command)
    receipt.write_text(text, encoding="utf-8")


def _train(data: Path, trained: Path, size: Size) -> None:
    if trained.exists() and not (trained / "config.yaml").is_file():
        raise DemoError(
            f"{trained}: expected nothing there, or an earlier run of the demo; name another folder by --out"
        )
    shutil.rmtree(trained, ignore_errors=True)
    settings = (f"data.path={data}", f"train.output={trained}", *size.settings)
    _call(
        *("torch.distributed.run", "--standalone", f"--nproc_per_node={_RANKS}"),
        *(str(_ROOT / "train_dist.py"), "--config", str(_ROOT / "configs" / "demo.yaml")),
        *(part for setting in settings for part in ("--set", setting)),
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _picture(roc: Path, easiest: Pixels, hardest: Pixels) -> Image.Image:
    """The ROC above, the easiest classes at its left below, the hardest at its right."""
    left, right = Image.fromarray(easiest), Image.fromarray(hardest)
    with Image.open(roc) as file:
        width = left.width + right.width
        curves = file.convert("RGB").resize((width, round(file.height * width / file.width)), Image.Resampling.LANCZOS)
    picture = Image.new("RGB", (width, curves.height + max(left.height, right.height)), "white")
    for part, place in (
        (curves, (0, 0)),
        (left, (0, curves.height)),
        (right, (left.width, curves.height)),
    ):
        picture.paste(part, place)
    return picture


def _table(trained: Path, classes: list[dict[str, Any]], seconds: float) -> Table:
    checks, log = _lines(trained / "verification.jsonl"), _lines(trained / "metrics.jsonl")
    steps = [line for line in log if "throughput/images_per_second" in line]
    before, after = checks[0], checks[-1]
    easiest, hardest = classes[0], classes[-1]
    speed = float(np.median([line["throughput/images_per_second"] for line in steps]))
    table = Table(title=f"joint loss on {_RANKS} ranks, {seconds / 60:.1f} minutes in all")
    table.add_column("on identities never trained on")
    table.add_column("untrained", justify="right")
    table.add_column("trained", justify="right")
    table.add_row("verification accuracy", *(f"{100 * check['accuracy']:.1f}%" for check in (before, after)))
    table.add_row("TAR@FAR=1e-2", *(f"{100 * check['tar@far=1e-2']:.1f}%" for check in (before, after)))
    table.add_section()
    table.add_row("of the training identities", "easiest", "hardest", style="bold")
    table.add_row("class", str(easiest["label"]), str(hardest["label"]))
    table.add_row("hard level h", f"{easiest['hard_level']:.3f}", f"{hardest['hard_level']:.3f}")
    table.add_row("margin m", f"{easiest['margin']:.3f}", f"{hardest['margin']:.3f}")
    table.add_section()
    table.add_row("images per second in training", "", f"{speed:.0f}")
    table.add_row("cluster refreshes", "", f"{steps[-1]['clusters/version']:.0f}")
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when all went well, 1 when a step failed."""
    parser = argparse.ArgumentParser(prog="python -m training.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="default runs/demo")
    parser.add_argument("--small", action="store_true", help="a few seconds of it, to see that everything works")
    args = parser.parse_args(arguments)
    try:
        run(args.out, SMALL if args.small else Size(), Console())
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
