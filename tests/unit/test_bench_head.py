"""The head's benchmark on tiny sizes: every row is there, in both files, and its figures make sense."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed import HashStore

from benchmarks import head
from benchmarks.heads.arm_memory import extra_in_own_process
from benchmarks.heads.arms import DENSE, OURS, STYLE, Arm, Problem, arms_of
from benchmarks.heads.plot import power_law, save_step_plot, series
from benchmarks.heads.rivals import RIVALS, load_rivals, rival_margin_free_loss
from benchmarks.heads.rows import HEADER, Row, ceilings, cells
from benchmarks.measuring.roofline import gemm_peak, head_flops
from configs.schema import HeadConfig
from training.distributed import Ranks

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
ALONE = Ranks(rank=0, world_size=1, device=torch.device("cpu"), group=None, store=HashStore())
TINY = ("--batch", "8", "--dim", "32", "--repeats", "2", "--threads", "1", "--device", "cpu")


def _table(text: str) -> list[dict[str, str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert lines[0] == "| " + " | ".join(HEADER) + " |"
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    return [dict(zip(HEADER, row, strict=True)) for row in rows]


def _no_process(arm: Arm, classes: int, **_: object) -> int:
    if arm == Arm(STYLE, 0.1) and classes == 3000:
        raise RuntimeError("exit code 1")
    return 1000 * classes


def test_writes_every_row_to_both_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, plot = tmp_path / "new folder" / "head.md", tmp_path / "head.png"
    monkeypatch.setattr(head, "extra_in_own_process", _no_process)
    monkeypatch.setenv("COLUMNS", "120")
    # The limit leaves the others out at 3000 classes, unless they sample, and not at 60.
    options = ["--classes", "60", "3000", *TINY, "--memory-limit", "0.0025", "--out", str(out), "--plot", str(plot)]
    assert head.main(options) == 0
    printed = capsys.readouterr().out
    text = out.read_text(encoding="utf-8")
    for fact in ("date: ", "hardware: ", "load before: ", "versions: ", "commit: ", "command: `python -m benchmarks"):
        assert f"- {fact}" in text
    assert "- dense at 3,000 classes: left out: it needs" in text
    assert "- partial_fc_style, rate 0.1 at 3,000 classes: left out: exit code 1" in text
    assert "- Liger: left out: it needs a GPU" in text
    assert "- ceiling: " in text
    assert plot.read_bytes().startswith(b"\x89PNG")
    table, data = _table(text), json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
    names = ["partial_fc_style", "dense", "ours", "partial_fc_style, rate 0.1", "ours, rate 0.1"]
    assert [(row["classes"], row["head"]) for row in table] == [(c, name) for c in ("60", "3,000") for name in names]
    assert [(row["classes"], row["arm"], row["rate"]) for row in data["rows"]] == [
        (classes, name.partition(",")[0], 0.1 if "0.1" in name else 1) for classes in (60, 3000) for name in names
    ]
    for figures, row in zip(table, data["rows"], strict=True):
        assert figures["head"] in printed
        if row["skipped"]:
            assert (row["classes"], row["arm"]) in {(3000, STYLE), (3000, DENSE)}
            assert figures["step ms"] == "left out"
            continue
        assert len(row["step"]) == len(row["learn"]) == 2
        assert 0 < float(figures["fwd+bwd ms"]) <= float(figures["step ms"]) < math.inf
        assert 0 <= float(figures["GEMM share"]) < 1
        if row["classes"] == 60:
            assert 0 < float(figures["speed"]) < math.inf
            assert float(figures["MB ratio"]) == 1


def test_memory_of_a_head_in_its_own_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    options = {"batch": 64, "dim": 64, "device": "cpu", "threads": 1, "seed": 0, "config": HeadConfig()}
    extra = extra_in_own_process(Arm(STYLE), 20_000, **options)
    # Three arrays (B, C) of five megabytes at the least.
    assert extra is None or 15e6 < extra < 1e8
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(RuntimeError, match="at 20000 classes: exit code 1"):
        extra_in_own_process(Arm(OURS, 0.1), 20_000, **options)


def test_ratios_of_a_row() -> None:
    rows = [
        Row(100, Arm(STYLE), 100, (0.3, 0.3, 0.9), (0.4, 0.4, 1.0), 800, gemm=0.1),
        Row(100, Arm(OURS), 100, (0.1, 0.1, 0.1), (0.2, 0.2, 0.2), 200, gemm=0.1),
        Row(100, Arm(STYLE, 0.1), 10, (0.01, 0.02, 0.03), (0.1, 0.2, 0.3), 400, gemm=0.01),
        Row(100, Arm(OURS, 0.1), 10, (0.01, 0.02, 0.03), (0.02, 0.04, 0.06), 100, gemm=0.01),
        Row(900, Arm(STYLE), 900, skipped="too large"),
        Row(900, Arm(OURS), 900, (1.0,), (2.0,), 100, gemm=1.0),
    ]
    texts = [dict(zip(HEADER, cells(row, rows), strict=True)) for row in rows]
    assert [text["speed"] for text in texts] == ["1.00", "2.00", "1.00", "5.00", "-", "-"]
    assert [text["MB ratio"] for text in texts] == ["1.000", "0.250", "1.000", "0.250", "-", "-"]
    assert [text["GEMM share"] for text in texts] == ["0.25", "0.50", "0.05", "0.25", "-", "0.50"]
    # Speed is ceiling times share: 4 x 0.5 and 20 x 0.25.
    assert "4 at 100 classes; 20 at 100 classes, rate 0.1" in ceilings(rows).values()
    assert not any("ceiling" in name for name in ceilings(rows[4:]))


def test_other_heads_are_left_out_with_a_reason() -> None:
    args = head._parser().parse_args(["--memory-limit", "1"])
    for kind in (STYLE, DENSE, *RIVALS):
        assert not head.why_not(Arm(kind), 10_000, args, CPU)
        assert "limit is 1 GB" in head.why_not(Arm(kind), 360_232, args, CPU)
    assert not head.why_not(Arm(OURS), 360_232, args, CPU)
    losses, left_out = load_rivals(CPU)
    assert not losses
    assert set(left_out) == set(RIVALS)
    # On a GPU what is missing is told by the import's own words.
    reasons = load_rivals(torch.device("cuda"))[1]
    assert all("import " in reason for reason in reasons.values())


def test_every_rate_has_its_baseline_first() -> None:
    arms, _ = arms_of([0.1, 1.0, 0.5, 0.1], CPU)
    assert arms == [
        *(Arm(kind) for kind in (STYLE, DENSE, OURS)),
        *(Arm(kind, rate) for rate in (0.5, 0.1) for kind in (STYLE, OURS)),
    ]
    assert all(arm.baseline in arms for arm in arms)


@pytest.mark.parametrize("kind", [STYLE, DENSE, OURS])
def test_each_head_updates_the_same_centres(kind: str) -> None:
    problem = Problem(123, batch=7, dim=252, seed=1, config=HeadConfig(), ranks=ALONE)
    problem.check([Arm(STYLE), Arm(DENSE), Arm(OURS)])
    before = problem.head.weight.detach().clone()
    loss = problem.loss(Arm(kind), 0).item()
    learn, update = problem.step(Arm(kind), 0)
    assert learn > 0
    assert update > 0
    assert not torch.equal(problem.head.weight, before)
    assert torch.equal(problem.head.weight, problem.w_CD)
    assert problem.x_BD.grad is problem.w_CD.grad is problem.head.weight.grad is None
    assert problem.loss(Arm(kind), 0).item() < loss


def test_bf16_centres_of_ours_leave_the_others_theirs() -> None:
    problem = Problem(123, batch=7, dim=252, seed=1, config=HeadConfig(centre_dtype="bf16"), ranks=ALONE)
    problem.step(Arm(OURS), 0)
    assert "w_CD" not in vars(problem)  # no copy where nobody asks for one
    problem.check([Arm(STYLE), Arm(DENSE), Arm(OURS)])
    assert problem.w_CD.dtype == torch.float32
    assert problem.head.weight.dtype == torch.bfloat16
    before = problem.head.weight.detach().clone()
    problem.step(Arm(STYLE), 0)
    assert torch.equal(problem.head.weight, before)


def test_drawn_classes_are_counted() -> None:
    assert Arm(OURS).centres(507, 7) == Arm(STYLE).centres(507, 7) == 507
    assert Arm(STYLE, 0.1).centres(507, 7) == 50
    assert Arm(STYLE, 0.01).centres(507, 7) == 7
    assert Arm(OURS, 0.1).centres(507, 7) == round(50.7 + 6.3)


def test_rivals_train_a_plain_softmax_of_unit_rows() -> None:
    g = torch.Generator().manual_seed(0)
    x_BD, w_CD = torch.randn(7, 32, generator=g), torch.randn(123, 32, generator=g)
    labels_B = torch.arange(7)
    found = rival_margin_free_loss(
        lambda x, w, labels: torch.nn.functional.cross_entropy((x.double() @ w.double().T), labels),
        x_BD, w_CD, labels_B, 16.0,
    )  # fmt: skip
    unit = torch.nn.functional.normalize
    expected = torch.nn.functional.cross_entropy(16 * unit(x_BD) @ unit(w_CD).T, labels_B)
    assert found.item() == pytest.approx(expected.item(), rel=0.02)


def test_power_law_of_points() -> None:
    fitted = power_law([(size, 3e-6 * size**1.25) for size in (7, 123, 4099)])
    assert fitted == pytest.approx((3e-6, 1.25))
    assert power_law([(507, 1.0), (507, 2.0)]) is None


def test_plot_holds_a_series_for_each_head(tmp_path: Path) -> None:
    rows = [
        Row(classes, arm, arm.centres(classes, 1), (seconds,), (seconds,))
        for classes, seconds in ((1000, 1.0), (100, 0.1))
        for arm in (Arm(STYLE), Arm(OURS, 0.1), Arm(OURS, 0.5))
    ]
    rows.append(Row(9000, Arm(STYLE), 9000, skipped="too large"))
    found = series(rows)
    assert list(found) == [(STYLE, False), (OURS, True)]
    assert found[STYLE, False] == [(100, 0.1), (1000, 1.0)]
    assert [size for size, _ in found[OURS, True]] == [11, 50, 101, 500]
    save_step_plot(rows, tmp_path / "new" / "plot.png", title="a title")
    assert (tmp_path / "new" / "plot.png").stat().st_size > 10_000


def test_roofline_of_a_cpu() -> None:
    assert head_flops(128, 512, 1000) == 4 * 2 * 128 * 512 * 1000
    peak, told = gemm_peak(CPU, 8, 32)
    assert 1e6 < peak < 1e14
    assert "(8, 32) by (32, 2048)" in told


_PEAK = """
import torch
from benchmarks.measuring.memory import peak_extra

kept = []
def work():
    torch.ones(50_000_000, dtype=torch.uint8)
    kept.append(torch.ones(30_000_000, dtype=torch.uint8))

before = torch.ones(120_000_000, dtype=torch.uint8)
del before  # an earlier, higher peak
print(peak_extra(work, torch.device("cpu")))
"""


def test_peak_is_that_of_the_work_alone() -> None:
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", _PEAK], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    printed = done.stdout.strip()
    assert printed == "None" or 45_000_000 < int(printed) < 90_000_000


@pytest.mark.parametrize("wrong", [("--classes", "1"), ("--batch", "0"), ("--rates", "1", "2"), ("--warmup", "-1")])
def test_wrong_arguments_are_one_error(wrong: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        head.main(wrong)
    assert stop.value.code == 2
    assert "error: " in capsys.readouterr().err
