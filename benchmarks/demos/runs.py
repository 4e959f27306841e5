"""Trainings on the demo's synthetic faces that differ in a few settings: each is run once and remembered.

A run is `train_dist.py` on configs/demo.yaml in a process of its own, with one thread and the demo's global batch.
What came of it becomes one line of JSON; a run whose line exists is not done again. A run that fails leaves no line.

Legend: B rows of the batch, C classes, k neighbours of a class.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from clustering.service.schedule import RefreshSchedule
from configs.load import load_config
from data.order.sampler import BatchPlan
from data.rec.records import RecordSet
from training.demo import Size, pack

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "demo.yaml"
DATA = Path("runs/demo/data")
_NEVER = 1_000_000

Result = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Run:
    """One training."""

    arm: str
    seed: int
    settings: tuple[str, ...]
    """Passed on to `train_dist.py --set`; all but the folders."""

    @property
    def folder(self) -> str:
        return f"{self.arm}_{self.seed}"


def runs_of(arms: dict[str, tuple[str, ...]], seeds: Sequence[int], *, epochs: int, batch: int) -> list[Run]:
    """Every arm with every seed, seed by seed. The arm's own settings come last and win.

    The warm-up keeps the recipe's share of the epochs. Metrics are logged once an epoch, as its means.
    """
    common = (
        *("clustering.enabled=false", "train.device=cpu", "train.cpu_threads=1", f"train.batch_size={batch}"),
        *(f"train.epochs={epochs}", f"eval.every_epochs={epochs}", f"optim.warmup_epochs={epochs / 8:g}"),
        *(f"train.log_steps={_NEVER}", f"train.histogram_steps={_NEVER}", "train.keep_checkpoints=1"),
    )
    return [Run(arm, seed, (*common, f"train.seed={seed}", *own)) for seed in seeds for arm, own in arms.items()]


def command(run: Run, output: Path) -> list[str]:
    settings = (f"data.path={DATA}", f"train.output={output}", *run.settings)
    return [
        *(sys.executable, str(ROOT / "train_dist.py"), "--config", str(CONFIG)),
        *(part for setting in settings for part in ("--set", setting)),
    ]


def read_results(file: Path) -> list[Result]:
    return _lines(file) if file.is_file() else []


def result_of(run: Run, results: Sequence[Result]) -> Result | None:
    """The result of exactly these settings, if there is one."""
    asked = (run.arm, run.seed, list(run.settings))
    return next((r for r in results if (r["arm"], r["seed"], r["settings"]) == asked), None)


def train(runs: Sequence[Run], *, folder: Path, jobs: int) -> tuple[list[Result], dict[str, str]]:
    """Results of these runs, those that existed among them, and what those said that failed, by folder.

    Works below `folder`: a folder and a log for each run, and results.jsonl, to which a line is appended as a run ends.
    """
    file = folder / "results.jsonl"
    known = read_results(file)
    todo = [run for run in runs if result_of(run, known) is None]
    failed = {}
    if todo:
        pack(DATA, Size())
    for run, outcome in _in_parallel(todo, folder, jobs):
        if isinstance(outcome, str):
            failed[run.folder] = outcome
            continue
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(outcome) + "\n")
        known.append(outcome)
    return [result for run in runs if (result := result_of(run, known)) is not None], failed


def _in_parallel(runs: Sequence[Run], folder: Path, jobs: int) -> Iterator[tuple[Run, Result | str]]:
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("runs"), TimeElapsedColumn(), TextColumn("left"))
    with ThreadPoolExecutor(jobs) as pool, Progress(*columns, TimeRemainingColumn()) as progress:
        task = progress.add_task("", total=len(runs))
        waiting = {pool.submit(_train_one, run, folder): run for run in runs}
        for done in as_completed(waiting):
            run, outcome = waiting[done], done.result()
            yield run, outcome
            said = outcome if isinstance(outcome, str) else f"accuracy {100 * outcome['trained']['accuracy']:.1f}%"
            progress.console.print(f"{run.folder}: {said}", highlight=False, markup=False)
            progress.advance(task)


def _train_one(run: Run, folder: Path) -> Result | str:
    """What came of it; if it failed, its last words."""
    output, log = folder / run.folder, folder / f"{run.folder}.log"
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    with log.open("w", encoding="utf-8") as said:
        ended = subprocess.run(
            command(run, output), stdout=said, stderr=said, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
    if ended.returncode:
        lines = log.read_text(encoding="utf-8").strip().splitlines()
        return f"ended with {ended.returncode}, see {log}: {lines[-1] if lines else 'it said nothing'}"
    return outcome_of(run, output)


def outcome_of(run: Run, output: Path) -> Result:
    """The figures of a run that ended, from its own logs."""
    epochs = [line for line in _lines(output / "metrics.jsonl") if "loss/margin" in line]
    checks = _lines(output / "verification.jsonl")
    untrained, trained = (
        {key: check[key] for key in ("accuracy", "tar@far=1e-2")} for check in (checks[0], checks[-1])
    )
    return {
        "arm": run.arm,
        "seed": run.seed,
        "settings": list(run.settings),
        "classes": round(classes_a_step(run, output), 1),
        "loss by epoch": [round(line["loss/margin"], 4) for line in epochs],
        "mean margin": epochs[-1].get("clusters/margin_mean"),
        "untrained": untrained,
        "trained": trained,
    }


def classes_a_step(run: Run, output: Path) -> float:
    """Classes that take part in a step, on average over the run: those of the batch, their neighbours, those drawn.

    Batches are the run's own; of the drawn ones the expected number; neighbours are those of the last checkpoint.
    """
    config = load_config(CONFIG, run.settings)
    records = RecordSet.open(DATA)
    plan = BatchPlan(
        records.num_samples, batch_size=config.train.batch_size, rank=0, world_size=1, seed=config.train.seed
    )
    neighbour_Ck = _neighbours(output) if config.clustering.enabled and config.clustering.hard_negatives else None
    steps = plan.steps_per_epoch
    schedule = RefreshSchedule.of(config.clustering, total_steps=steps * config.train.epochs, steps_per_epoch=steps)
    named = []
    for step in range(schedule.total_steps):
        labels_B = records.labels[plan.samples(step // steps, step % steps * plan.global_batch)]
        if neighbour_Ck is not None and schedule.ramp(step) > 0:
            labels_B = np.concatenate([labels_B, neighbour_Ck[labels_B].ravel()])
        named.append(len(np.unique(labels_B[labels_B >= 0])))
    mean = float(np.mean(named))
    return mean + config.head.sample_rate * (records.num_classes - mean)


def _neighbours(output: Path) -> npt.NDArray[np.int64]:
    newest = (output / "checkpoints" / "latest").read_text(encoding="utf-8").strip()
    state = torch.load(output / "checkpoints" / newest / "rank_0.pt", map_location="cpu", weights_only=True)
    table_Ck: npt.NDArray[np.int64] = state["service"]["published"]["neighbour_Ck"].long().numpy()
    return table_Ck


def _lines(path: Path) -> list[Result]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
