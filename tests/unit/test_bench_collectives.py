"""Collectives of the two patterns: what they gather and reduce, how many they are, what they send.

Legend: B rows of one rank, W ranks, N = W x B rows of all ranks, D embedding size.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks.collectives import OURS, OURS_BF16, PATTERNS, THEIRS, Batch, check_head, count, main
from benchmarks.measuring.tally import Tally
from tests.ranks import RankPool, ranks_of

ROOT = Path(__file__).parents[2]
B, D = 7, 123


def _one_step_each(group: dist.ProcessGroup) -> dict[str, Any]:
    batch = Batch(B, D, ranks_of(group))
    found: dict[str, Any] = {}
    for name, step in PATTERNS.items():
        with Tally(dist.get_world_size(group)) as tally:
            step(batch)
        assert batch.x_BD.grad is not None
        found[name] = dict(tally.calls), tally.sent, batch.x_BD.grad.clone()
        batch.x_BD.grad = None
        assert count(step, batch).calls == tally.calls
        assert batch.x_BD.grad is None
    heads = {OURS: check_head(batch, "fp32"), OURS_BF16: check_head(batch, "bf16")}
    return {"steps": found, "heads": {name: dict(tally.calls) for name, tally in heads.items()}, "batch": batch.grad_ND}


@pytest.mark.parametrize("W", [2, 4])
def test_patterns_reduce_the_same_gradient(ranks: RankPool, W: int) -> None:
    answers = ranks.run(W, _one_step_each)
    grad_ND = torch.stack([answer["batch"] for answer in answers]).sum(0)
    N = W * B
    for rank, answer in enumerate(answers):
        for name, (calls, sent, grad_BD) in answer["steps"].items():
            near = 0.05 if name == OURS_BF16 else 1e-5
            assert torch.allclose(grad_BD, grad_ND[rank * B : (rank + 1) * B], rtol=near, atol=near)
            if name == THEIRS:
                assert calls == {"all-gather": 2, "all-reduce": 3, "reduce": W}
                assert sum(calls.values()) == 5 + W
                expected = N * (8 + 4 * D) + 3 * 2 * 4 * N + 4 * N * D
                assert sent == pytest.approx(expected * (W - 1) / W)
            else:
                assert sum(calls.values()) == 3
                assert calls == answer["heads"][name]
        sent = {name: step[1] for name, step in answer["steps"].items()}
        assert sent[OURS_BF16] < 0.6 * sent[OURS]


def _sent_by_each_kind(group: dist.ProcessGroup) -> list[tuple[str, float]]:
    W = dist.get_world_size(group)
    part, whole = torch.ones(3), torch.ones(3 * W)
    work = [
        lambda: dist.all_reduce(part, group=group),
        lambda: dist.all_gather(list(torch.empty_like(whole).chunk(W)), part, group=group),
        lambda: dist.broadcast(part, group_src=0, group=group),
        lambda: dist.all_to_all_single(torch.empty_like(whole), whole, group=group),
    ]
    found = []
    for step in work:
        with Tally(W) as tally:
            step()
        ((name, calls),) = tally.calls.items()
        assert calls == 1
        found.append((name, tally.sent))
    return found


def test_bytes_of_each_collective(ranks: RankPool) -> None:
    # Three floats a rank; a rank keeps a quarter of what is exchanged.
    expected = [("all-reduce", 2 * 12 * 0.75), ("all-gather", 36.0), ("broadcast", 9.0), ("all-to-all", 36.0)]
    assert ranks.run(4, _sent_by_each_kind) == [expected] * 4


@pytest.mark.slow  # three processes that import torch
def test_started_ranks_write_both_files(tmp_path: Path) -> None:
    out = tmp_path / "new" / "collectives.md"
    command = [sys.executable, "-m", "benchmarks.collectives", "--device", "cpu", "--batch", "4", "--dim", "16"]
    environment = {key: value for key, value in os.environ.items() if key not in {"RANK", "WORLD_SIZE", "LOCAL_RANK"}}
    done = subprocess.run(
        [*command, "--repeats", "3", "--out", str(out)],
        cwd=ROOT, env=environment, text=True, capture_output=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    data = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
    assert [row["pattern"] for row in data["rows"]] == list(PATTERNS)
    assert all(len(row["step"]) == 3 and min(row["step"]) > 0 for row in data["rows"])
    text = out.read_text(encoding="utf-8")
    assert "- partial_fc_style: 2 all-gather, 3 all-reduce, 2 reduce\n" in text
    assert text.count("\n| 2 | ") == len(PATTERNS)


@pytest.mark.parametrize(
    "wrong", [("--ranks", "1"), ("--batch", "0"), ("--repeats", "0"), ("--device", "cuda", "--ranks", "99")]
)
def test_wrong_arguments_are_one_error(wrong: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(wrong)
    assert stop.value.code == 2
    assert "error: " in capsys.readouterr().err
