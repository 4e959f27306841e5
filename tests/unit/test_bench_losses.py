"""The trainings on the demo's faces, without training: commands, what counts as done, the figures, the tables."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import train_dist
from benchmarks import hard_negatives, losses
from benchmarks.demos import runs as demo_runs
from benchmarks.demos.report import HEADER, cells
from benchmarks.demos.runs import CONFIG, Run, command, read_results, result_of, runs_of, train
from configs.load import load_config
from data.order.sampler import BatchPlan
from training.demo import DemoError

ALL_ARMS = losses.ARMS | hard_negatives.ARMS
CLASSES, BATCH, SAMPLES = 123, 7, 507


class Records:
    """In place of packed ones: labels alone."""

    num_classes, num_samples = CLASSES, SAMPLES
    labels = np.arange(SAMPLES) * 7 % CLASSES

    @classmethod
    def open(cls, _: Path) -> Records:
        return cls()


@pytest.fixture
def nothing_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_runs, "pack", lambda *_: None)
    monkeypatch.setattr(demo_runs, "RecordSet", Records)


@pytest.mark.parametrize("arm", ALL_ARMS)
def test_the_command_is_one_that_the_real_one_takes(arm: str) -> None:
    (run,) = runs_of({arm: ALL_ARMS[arm]}, [7], epochs=4, batch=32)
    words = command(run, Path("somewhere"))
    assert Path(words[1]).samefile(train_dist.__file__)
    args = train_dist.parse(words[2:])
    config = load_config(args.config, args.set)
    assert (config.train.output, config.train.seed, config.train.epochs, config.train.batch_size) == (
        *("somewhere", 7, 4),
        32,
    )
    assert (config.train.cpu_threads, config.optim.warmup_epochs, config.eval.every_epochs) == (1, 0.5, 4)
    assert config.clustering.enabled == (arm in ("kappaface", "near-2", "near-8"))
    if config.clustering.enabled:  # nothing but margins or neighbours
        assert (config.clustering.contrastive_weight, config.clustering.alignment_weight) == (0, 0)


def test_arms_differ_from_arcface_in_what_they_are_named_for() -> None:
    def head(arm: str) -> Any:
        return load_config(CONFIG, runs_of({arm: ALL_ARMS[arm]}, [0], epochs=3, batch=128)[0].settings).head

    assert head("arcface") == load_config(CONFIG).head
    assert [head(arm).loss for arm in ("cosface", "combined", "magface", "adaface", "curricularface")] == [
        *("cosface", "combined", "magface", "adaface", "curricularface")
    ]
    assert head("sgd-rate-0.1-catch-up").missed_steps == "catch_up"
    assert head("sgd-rate-0.1").sample_rate == head("sgd-rate-0.1-catch-up").sample_rate == 0.1
    assert (head("subcentres-3").subcentres, head("bf16-centres").centre_dtype) == (3, "bf16")


def test_magface_weight_stands_to_the_least_one_as_the_papers_does() -> None:
    """Least: lambda (1 / l^2 - 1 / u^2) = s K, the pulls of regulariser and margin at the shortest length."""

    def least(scale: float, low: float, high: float, slope: float) -> float:
        return scale * slope / (low**-2 - high**-2)

    head = load_config(CONFIG, losses.ARMS["magface"]).head
    slope = (head.margin_high - head.margin_low) / (head.length_high - head.length_low)
    ours = head.length_weight / least(head.scale, head.length_low, head.length_high, slope)
    assert ours == pytest.approx(35 / least(64, 10, 110, 0.35 / 100), rel=0.01)


def _result(run: Run, accuracy: float = 0.9, **more: Any) -> dict[str, Any]:
    return {
        "arm": run.arm,
        "seed": run.seed,
        "settings": list(run.settings),
        "classes": 100.0,
        "loss by epoch": [12.0, 8.0, 6.0],
        "untrained": {"accuracy": 0.6, "tar@far=1e-2": 0.05},
        "trained": {"accuracy": accuracy, "tar@far=1e-2": accuracy - 0.1},
        **more,
    }


def test_what_exists_is_not_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nothing_packed: None
) -> None:
    runs = runs_of({"a": (), "b": ("head.margin=0.2",)}, [0, 1], epochs=3, batch=128)
    file = tmp_path / "results.jsonl"
    other_margin = Run("b", 1, (*runs[3].settings[:-1], "head.margin=0.4"))
    file.write_text("".join(json.dumps(_result(run)) + "\n" for run in (runs[2], other_margin)), encoding="utf-8")
    done: list[Run] = []
    monkeypatch.setattr(demo_runs, "_train_one", lambda run, _: done.append(run) or _result(run))
    results, failed = train(runs, folder=tmp_path, jobs=2)
    assert {(run.arm, run.seed) for run in done} == {("a", 0), ("b", 0), ("b", 1)}  # b, 1 had another margin
    assert [(r["arm"], r["seed"]) for r in results] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert not failed
    assert len(read_results(file)) == 5
    assert result_of(other_margin, read_results(file)) is not None
    done.clear()
    assert train(runs, folder=tmp_path, jobs=1) == (results, {})
    assert not done


def test_a_run_that_fails_leaves_no_result_and_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nothing_packed: None
) -> None:
    def diverge(words: list[str], *, stdout: Any, **_: Any) -> subprocess.CompletedProcess[str]:
        stdout.write("step 20\nerror: the loss is no longer finite\n")
        return subprocess.CompletedProcess(words, 2)

    monkeypatch.setattr(subprocess, "run", diverge)
    results, failed = train(runs_of({"a": ()}, [0], epochs=3, batch=128), folder=tmp_path, jobs=1)
    assert results == []
    assert failed["a_0"].endswith("error: the loss is no longer finite")
    assert failed["a_0"].startswith("ended with 2")
    assert read_results(tmp_path / "results.jsonl") == []


def _write_run(folder: Path, *, neighbours: torch.Tensor | None = None) -> None:
    metrics = [{"step": 0, "verification/x": 1.0}]
    metrics += [{"step": step, "loss/margin": loss} for step, loss in ((72, 12.0), (144, 8.0), (216, 6.0))]
    checks = [{"step": 0, "accuracy": 0.6, "tar@far=1e-2": 0.05}, {"step": 216, "accuracy": 0.9, "tar@far=1e-2": 0.8}]
    folder.mkdir(exist_ok=True)
    for name, lines in (("metrics.jsonl", metrics), ("verification.jsonl", checks)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    if neighbours is not None:
        newest = folder / "checkpoints" / "step_000000216"
        newest.mkdir(parents=True)
        (newest.parent / "latest").write_text(newest.name + "\n", encoding="utf-8")
        torch.save({"service": {"published": {"neighbour_Ck": neighbours.int()}}}, newest / "rank_0.pt")


def test_figures_are_those_of_the_runs_own_logs(tmp_path: Path, nothing_packed: None) -> None:
    _write_run(tmp_path)
    (run,) = runs_of({"arcface": ()}, [0], epochs=3, batch=BATCH)
    outcome = demo_runs.outcome_of(run, tmp_path)
    assert outcome["loss by epoch"] == [12.0, 8.0, 6.0]
    assert outcome["untrained"] == {"accuracy": 0.6, "tar@far=1e-2": 0.05}
    assert outcome["trained"] == {"accuracy": 0.9, "tar@far=1e-2": 0.8}
    assert outcome["classes"] == CLASSES  # sample_rate 1
    assert outcome["mean margin"] is None


def test_classes_a_step_count_neighbours_once_and_from_the_ramp_on(tmp_path: Path, nothing_packed: None) -> None:
    """Two neighbours a class, one of which is often in the batch or missing, against a plain loop over sets."""
    table = torch.stack([(torch.arange(CLASSES) + 7) % CLASSES, torch.arange(CLASSES) - 1], dim=1)
    _write_run(tmp_path, neighbours=table)
    (run,) = runs_of({"near-2": ALL_ARMS["near-2"]}, [5], epochs=3, batch=BATCH)
    plan = BatchPlan(SAMPLES, batch_size=BATCH, rank=0, world_size=1, seed=5)
    begin = 72 + round(0.2 * 36)  # one epoch, then a tenth of one until the first table
    named = []
    for step in range(3 * 72):
        classes = set(Records.labels[plan.samples(step // 72, step % 72 * BATCH)].tolist())
        if step >= begin:
            classes |= {int(c) for y in set(classes) for c in table[y] if c >= 0}
        named.append(len(classes))
    mean = sum(named) / len(named)
    assert demo_runs.classes_a_step(run, tmp_path) == pytest.approx(mean + 0.02 * (CLASSES - mean), rel=1e-12)


def test_rate_that_draws_as_many() -> None:
    batch, total = 31.5, 1000

    def taking_part(rate: float) -> float:
        return batch + rate * (total - batch)

    for rate in (0.02, 0.15, 1.0):
        assert hard_negatives.rate_for(taking_part(rate), taking_part(0.02), total) == pytest.approx(rate, abs=1e-4)


def test_table_has_means_over_seeds_and_each_seed() -> None:
    runs = runs_of({"a": (), "b": ()}, [0, 1], epochs=3, batch=128)
    results = [
        _result(run, accuracy, classes=100.0 + run.seed)
        for run, accuracy in zip(runs, (0.9, 0.8, 0.92, 0.8), strict=True)
    ]
    rows = cells(results)
    assert all(len(row) == len(HEADER) for row in rows)
    assert rows[0] == ("2", "a", "100", "12.00 -> 6.00", "60.0 -> 91.0", "90.0 92.0", "5.0 -> 81.0", "80.0 82.0")
    assert rows[1][4:6] == ("60.0 -> 80.0", "80.0 80.0")


def test_the_rate_follows_from_the_first_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nothing_packed: None, capsys: pytest.CaptureFixture[str]
) -> None:
    classes = {"random": 50.0, "near-8": 240.0, "all": 1000.0}
    trained: list[Run] = []

    def outcome(run: Run, _: Path) -> dict[str, Any]:
        trained.append(run)
        return _result(run, classes=classes.get(run.arm, 240.0))

    monkeypatch.setattr(demo_runs, "_train_one", outcome)
    out = tmp_path / "table.md"
    assert hard_negatives.main(["--folder", str(tmp_path), "--seeds", "3", "4", "--out", str(out)]) == 0
    as_many = [run for run in trained if run.arm == hard_negatives.AS_MANY]
    assert [run.seed for run in as_many] == [3, 4]
    assert {run.settings[-1] for run in as_many} == {"head.sample_rate=0.216"}
    assert len(trained) == 10
    data = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
    assert len(data["rows"]) == 10
    assert "TAR at a FAR of 1e-2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (("--only", "arcfaec"), "invalid choice: 'arcfaec'"),
        (("--epochs", "0"), "--epochs: expected 1 or more, got 0"),
        (("--jobs", "two"), "--jobs: invalid"),
    ],
)
def test_wrong_arguments_are_one_error(wrong: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        losses.main(wrong)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_records_that_cannot_be_packed_are_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any) -> None:
        raise DemoError("`data pack` failed, see above")

    monkeypatch.setattr(demo_runs, "pack", refuse)
    for module in (losses, hard_negatives):
        with pytest.raises(SystemExit) as stop:
            module.main(["--folder", str(tmp_path)])
        assert stop.value.code == 2
        assert "error: `data pack` failed" in capsys.readouterr().err
