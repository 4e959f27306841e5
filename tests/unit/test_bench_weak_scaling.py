"""The benchmark of weak scaling on tiny sizes: what each rank measures, and the ratios of its table."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from benchmarks.weak_scaling import SAME_N, _measure, _text, main
from tests.ranks import RankPool, ranks_of

SIZES = argparse.Namespace(classes=31, dim=16, repeats=3, warmup=1)


def _measured(group: dist.ProcessGroup) -> dict[str, Any]:
    return _measure(ranks_of(group), 8 // dist.get_world_size(group), SIZES)


@pytest.mark.parametrize("world_size", [1, 2])
def test_every_rank_knows_the_times_of_all(ranks: RankPool, world_size: int) -> None:
    first, *others = ranks.run(world_size, _measured)
    assert all(other == first for other in others)
    assert (first["ranks"], first["rows"]) == (world_size, 8 // world_size)
    assert len(first["step"]) == len(first["cpu"]) == SIZES.repeats
    assert min(first["cpu"]) > 0
    N, D = 8, SIZES.dim
    assert first["sent_bytes"] == (N * (8 * D + 56) / 2 if world_size == 2 else 0)


def test_ratios_are_by_what_a_rank_has_to_do() -> None:
    one = {"ranks": 1, "batch": SAME_N, "rows": 64, "cpu": [0.1], "step": [0.2], "sent_bytes": 0}
    four = {"ranks": 4, "batch": SAME_N, "rows": 64, "cpu": [0.3], "step": [0.9], "sent_bytes": 5000}
    assert _text(four, one, 10)[:7] == ("4", SAME_N, "256", "40", "300", "3.00", "0.75")


@pytest.mark.parametrize("wrong", [("--ranks", "2", "1"), ("--batch", "6"), ("--repeats", "0")])
def test_refuses_sizes_that_do_not_come_out(wrong: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([*wrong, "--out", str(Path("nowhere"))])
    assert end.value.code == 2
    assert "expected" in capsys.readouterr().err
