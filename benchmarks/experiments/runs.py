"""Runs of the experiment: one line of JSON each; what has a line is not run again.

Legend: N samples.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from benchmarks.experiments.cells import CELLS, Split, make_split, true_accept_rates
from benchmarks.experiments.fitting import Recipe, fit
from benchmarks.experiments.nets import Net, SmallMLP, TinyCNN
from benchmarks.experiments.pools import FEATURES, Pool, fingerprint, open_pool, shifted
from benchmarks.experiments.tiers import TIERS
from clustering.service.service import ClusterService

FARS = (1e-3, 1e-4)
_NOISE = 0.4  # of a feature's unit deviation, anew in every batch: what augmentation is to images
_EMBEDDING = 64

Result = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Run:
    """One training."""

    tier: str
    """features or images."""
    kind: str
    cell: str
    arm: str
    margin: float
    seed: int

    @property
    def key(self) -> tuple[Any, ...]:
        return (self.tier, self.kind, self.cell, self.arm, self.margin, self.seed)


class LinesError(ValueError):
    """A file of lines holds something else."""


def read_results(file: Path) -> list[Result]:
    """Earlier runs that still count: the last line of each, with the settings that the run has now, and of a cell those
    of its newest pool, as only they can be compared. A last line that was cut off by a crash is left out.

    Raises LinesError that names the first line that is none of a run.
    """
    if not file.is_file():
        return []
    texts = file.read_text(encoding="utf-8").split("\n")[:-1]
    lines = [_parsed(text, f"{file}, line {number}") for number, text in enumerate(texts, 1)]
    lines = [line for line in lines if _is_current(line)]
    pools = {key_of(line)[:3]: line["pool"] for line in lines}
    last = {key_of(line): line for line in lines if line["pool"] == pools[key_of(line)[:3]]}
    return list(last.values())


def _parsed(text: str, where: str) -> Result:
    try:
        result = json.loads(text)
    except ValueError:
        result = None
    names = {*Run.__dataclass_fields__, "validation", "test", "loss", "pool", "settings"}
    if not isinstance(result, dict) or not names <= result.keys():
        raise LinesError(f"{where}: expected the JSON of a run, got {text[:60]!r}: take it out, or name another file")
    return result


def _is_current(result: Result) -> bool:
    tier = TIERS.get(result["tier"])
    if tier is None or result["arm"] not in tier.arms or result["cell"] not in CELLS:
        return False
    return bool(settings_of(Run(*key_of(result))) == result["settings"])


def key_of(result: Result) -> tuple[Any, ...]:
    return tuple(result[name] for name in ("tier", "kind", "cell", "arm", "margin", "seed"))


def settings_of(run: Run) -> dict[str, Any]:
    """Everything that decides what the run is, as it stands in its line: other settings, another run."""
    settings: dict[str, Any] = json.loads(json.dumps({**asdict(_recipe(run)), "cell": asdict(CELLS[run.cell])}))
    return settings


def _recipe(run: Run) -> Recipe:
    return TIERS[run.tier].recipe(run.arm, run.margin)


def missing(runs: Sequence[Run], results: Sequence[Result], pools: Mapping[str, str]) -> list[Run]:
    """Runs that `results` lack, or have from another pool. pools: kind to fingerprint."""
    known = {key_of(result): result["pool"] for result in results}
    return [run for run in runs if known.get(run.key) != pools[run.kind]]


def execute(runs: Sequence[Run], *, folder: Path, file: Path, jobs: int) -> None:
    """Do what is missing, a line to `file` as each ends. Ends early at the first run that fails, with its error."""
    # Pools are drawn once, before the processes.
    pools = {kind: fingerprint(open_pool(kind, folder)) for kind in sorted({run.kind for run in runs})}
    todo = missing(runs, read_results(file), pools)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("runs"), TimeElapsedColumn(), TextColumn("left"))
    with Progress(*columns, TimeRemainingColumn()) as progress:
        task = progress.add_task("", total=len(runs), completed=len(runs) - len(todo))
        for result in _outcomes(todo, folder, jobs):
            _append(file, result)
            progress.advance(task)


def _append(file: Path, result: Result) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    if text and not text.endswith("\n"):  # a crash has cut the last line: it goes
        file.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(result) + "\n")


def _outcomes(todo: Sequence[Run], folder: Path, jobs: int) -> Iterator[Result]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        waiting = [pool.submit(outcome, run, folder) for run in todo]
        try:
            for done in as_completed(waiting):
                yield done.result()
        finally:
            pool.shutdown(cancel_futures=True)


@lru_cache(maxsize=2)
def _pool(kind: str, folder: Path) -> Pool:
    return open_pool(kind, folder)


@lru_cache(maxsize=4)
def _split(kind: str, cell: str, seed: int, images: bool, folder: Path) -> Split:
    return make_split(_pool(kind, folder), CELLS[cell], seed=seed, images=images)


def outcome(run: Run, folder: Path) -> Result:
    """Train, judge, and tell."""
    began = time.perf_counter()
    images = run.tier == "images"
    split = _split(run.kind, run.cell, run.seed, images, folder)
    net: Net
    net = TinyCNN(embedding_size=_EMBEDDING) if images else SmallMLP(features=FEATURES, embedding_size=_EMBEDDING)
    fitted = fit(
        net,
        split.x,
        split.labels,
        num_classes=split.num_classes,
        recipe=_recipe(run),
        augment=shifted if images else _noised,
        seed=run.seed,
    )
    with torch.no_grad():
        validation, test = (
            true_accept_rates(F.normalize(torch.cat([net(part) for part in x.split(1024)])), FARS)
            for x in (split.validation, split.test)
        )
    return {
        **asdict(run),
        "validation": [round(rate, 3) for rate in validation],
        "test": [round(rate, 3) for rate in test],
        "loss": [round(fitted.loss_by_epoch[epoch], 3) for epoch in (0, -1)],
        **_gate(fitted.service, split),
        "samples": len(split.labels),
        "seconds": round(time.perf_counter() - began, 1),
        "pool": fingerprint(_pool(run.kind, folder)),
        "versions": f"torch {torch.__version__}, numpy {np.__version__}",
        "processor": os.uname().machine,
        "settings": settings_of(run),
    }


def _gate(service: ClusterService | None, split: Split) -> Result:
    """How good the suspects of the last version were."""
    if service is None or (suspect_I := service.suspects()) is None:
        return {}
    suspects = suspect_I.numpy()
    right = int((suspects & split.wrong).sum())
    return {
        "suspects": int(suspects.sum()),
        "precision": round(right / max(1, int(suspects.sum())), 3),
        "recall": round(right / max(1, int(split.wrong.sum())), 3),
    }


def _noised(x: Tensor, generator: torch.Generator) -> Tensor:
    return x + _NOISE * torch.randn(x.shape, generator=generator)
