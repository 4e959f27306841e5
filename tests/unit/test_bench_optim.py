"""The optimizers' benchmark on tiny sizes: who runs where, that all of them move the same centres, and the ratios."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.distributed import HashStore

from benchmarks.optim import CONTENDERS, Contender, Racer, cells, main
from training.distributed import Ranks

ALONE = Ranks(rank=0, world_size=1, device=torch.device("cpu"), group=None, store=HashStore())
TINY = ("--batch", "7", "--dim", "16", "--repeats", "2", "--threads", "1", "--device", "cpu")


def test_writes_every_row_to_both_files(tmp_path: Path) -> None:
    out = tmp_path / "new" / "optim.md"
    assert main(["--classes", "123", "507", "--rates", "1", "0.1", *TINY, "--out", str(out)]) == 0
    data = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
    names = [contender.name for contender in CONTENDERS]
    dense = [name for name in names if name != "torch SparseAdam"]  # it takes no dense gradient
    assert [(row["classes"], row["rate"], row["optimizer"]) for row in data["rows"]] == [
        (classes, rate, name) for classes in (123, 507) for rate, who in ((1, dense), (0.1, names)) for name in who
    ]
    assert all(len(row["seconds"]) == 2 and min(row["seconds"]) > 0 for row in data["rows"])
    lines = [line for line in out.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    assert len(lines) == 2 + len(data["rows"])
    assert sum("CentreSGD, rate 0.1" in line for line in lines) == 2


@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda contender: contender.name)
def test_moves_the_shared_centres(contender: Contender) -> None:
    """Of sampled classes: the row-sparse ones leave other rows alone, weight decay of the dense ones pulls at all."""
    generator = torch.Generator().manual_seed(0)
    centres_CD = torch.randn(4099, 16, generator=generator)
    x_BD = torch.nn.functional.normalize(torch.randn(7, 16, generator=generator))
    labels_B = torch.arange(7)
    racer = Racer(contender, centres_CD, seed=0, ranks=ALONE)
    before = centres_CD.clone()
    assert racer.turn(x_BD, labels_B, 0.01, 0) > 0
    moved_C = (centres_CD != before).any(1)
    assert moved_C[labels_B].all()
    assert (moved_C.sum() < 100) == contender.sparse_gradient
    if not contender.sampled_only:
        racer.turn(x_BD, labels_B, 1.0, 1)


def test_ratios_are_of_the_family() -> None:
    times = {"torch SGD": [0.4, 0.4, 9.0], "CentreSGD": [0.1], "torch AdamW": [0.9], "CentreAdamW": [0.3, 0.3, 0.1]}
    texts = [cells(10_000, 0.1, name, times) for name in times]
    assert [text[-1] for text in texts] == ["1.00", "4.00", "1.00", "3.00"]
    assert texts[1][:3] == ("10,000", "CentreSGD, rate 0.1", "100")
    assert texts[0][3] == "400 … 9000"


@pytest.mark.parametrize("wrong", [("--classes", "1"), ("--batch", "0"), ("--rates", "0"), ("--warmup", "-1")])
def test_wrong_arguments_are_one_error(wrong: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(wrong)
    assert stop.value.code == 2
    assert "error: " in capsys.readouterr().err
