"""`make demo`: pack synthetic faces into records, train on two ranks with clusters, and show what came of it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from data.contact_sheet import contact_sheet, write_png
from data.decode import decode_image
from data.records import RecordSet

_FOLDER = Path("runs/demo")
_IDENTITIES, _IMAGES, _HELD_OUT, _PAIRS = 1000, 20, 200, 3000
_RANKS = 2


def _call(*command: str) -> None:
    finished = subprocess.run([sys.executable, "-m", *command], check=False)
    if finished.returncode:
        raise SystemExit(f"error: `{' '.join(command)}` ended with exit code {finished.returncode}; see above")


def _pack(folder: Path) -> None:
    if (folder / "train.idx").is_file() and (folder / "verification.bin").is_file():
        return  # the same command wrote it: records are a pure function of their arguments
    _call(
        *("data", "pack", "synthetic", "--out", str(folder), "--force"),
        *("--identities", str(_IDENTITIES), "--images-per-identity", str(_IMAGES), "--seed", "0"),
        *("--label-noise", "0.02", "--long-tail", "0.3"),
        *("--verification-identities", str(_HELD_OUT), "--pairs", str(_PAIRS)),
    )


def _train(run: Path) -> None:
    shutil.rmtree(run, ignore_errors=True)
    _call(
        *("torch.distributed.run", "--standalone", f"--nproc_per_node={_RANKS}"),
        *("train_dist.py", "--config", "configs/demo.yaml"),
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _sheet(records: RecordSet, classes: list[dict[str, Any]], path: Path) -> None:
    """Eight images of each of the easiest and hardest classes, from the records themselves."""
    rows, captions = [], []
    for row in classes:
        samples = np.flatnonzero(records.labels == row["label"])[:8]
        rows.append([decode_image(records.image(int(sample))[1], records.image_size) for sample in samples])
        captions.append(f"class {row['label']}: h {row['hard_level']:.2f}, m {row['margin']:.3f}")
    write_png(path, contact_sheet(rows, captions=captions))


def _table(run: Path, classes: list[dict[str, Any]], seconds: float) -> Table:
    checks, log = _lines(run / "verification.jsonl"), _lines(run / "metrics.jsonl")
    untrained, trained = checks[0], checks[-1]
    easiest, hardest = classes[0], classes[-1]
    speed = float(np.median([line["throughput/images_per_second"] for line in log]))
    table = Table(title=f"{_IDENTITIES} identities, {_RANKS} ranks, joint loss, {seconds / 60:.1f} minutes")
    for name in ("on held-out identities", "untrained", "trained"):
        table.add_column(name, justify="left" if name.startswith("on") else "right")
    table.add_row("verification accuracy", *(f"{100 * check['accuracy']:.1f}%" for check in (untrained, trained)))
    table.add_row("TAR at FAR = 1e-2", *(f"{100 * check['tar@far=1e-2']:.1f}%" for check in (untrained, trained)))
    table.add_section()
    table.add_row("of the training identities", "easiest", "hardest", style="bold")
    table.add_row("class", str(easiest["label"]), str(hardest["label"]))
    table.add_row("hard level h", f"{easiest['hard_level']:.3f}", f"{hardest['hard_level']:.3f}")
    table.add_row("margin m", f"{easiest['margin']:.3f}", f"{hardest['margin']:.3f}")
    table.add_section()
    table.add_row("images per second", "", f"{speed:.0f}")
    table.add_row("cluster refreshes", "", f"{log[-1]['clusters/version']:.0f}")
    return table


def main() -> None:
    console = Console()
    started = time.perf_counter()
    data, run = _FOLDER / "data", _FOLDER / "run"
    _pack(data)
    _train(run)
    classes = json.loads((run / "classes.json").read_text(encoding="utf-8"))
    _sheet(RecordSet.open(data), classes, run / "classes.png")
    console.print(_table(run, classes, time.perf_counter() - started))
    console.print(f"curves          {Path(sys.executable).parent / 'tensorboard'} --logdir {run / 'tensorboard'}")
    console.print(f"ROC             {run / 'roc_verification.png'}")
    console.print(f"contact sheet   {run / 'classes.png'}  (easiest classes first, hardest last)")


if __name__ == "__main__":
    main()
