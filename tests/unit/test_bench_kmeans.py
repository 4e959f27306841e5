"""The benchmark of k-means on tiny sizes: every row is there, in both files, and its figures make sense."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks import kmeans
from benchmarks.clusters.kmeans_arms import FAISS, OURS, face_like, objective, unstructured
from benchmarks.clusters.kmeans_plot import save_scaling_plot

TINY = ("--dim", "32", "--threads", "1", "--device", "cpu", "--iterations", "2")


def test_writes_every_row_to_both_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("faiss")
    out, plot = tmp_path / "new folder" / "kmeans.md", tmp_path / "kmeans.png"
    sizes = ["--points", "600", "900", "--clusters", "20", "--repeats", "2"]
    assert kmeans.main([*sizes, *TINY, "--out", str(out), "--plot", str(plot)]) == 0
    printed, text = capsys.readouterr().out, out.read_text(encoding="utf-8")
    for fact in ("date: ", "hardware: ", "commit: ", "command: `python -m benchmarks.kmeans", "faiss: "):
        assert f"- {fact}" in text
    assert plot.read_bytes().startswith(b"\x89PNG")
    rows = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))["rows"]
    ways = [OURS, "ours, nothing left out", "torch", "ours, without codes", FAISS, "faiss super"]
    assert [(row["data"], row["points"], row["way"]) for row in rows] == [
        (data, points, way) for data in ("faces", "random") for points in (600, 900) for way in ways
    ]
    for row in rows:
        assert row["way"] in printed
        assert len(row["wall"]) == len(row["cpu"]) == 2
        assert 0 < min(row["wall"]) < math.inf
        assert 0 < row["objective"] < 1
        same = [
            other["objective"] for other in rows if (other["data"], other["points"]) == (row["data"], row["points"])
        ]
        assert max(same) - min(same) < 1e-3, "the same iterations from the same centres"
        assert (row["compared"] is None) == (not row["way"].startswith(OURS))


def test_main_only_runs_two(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("faiss")
    assert kmeans.main(["--points", "300", "--clusters", "9", *TINY, "--main-only", "--data", "faces"]) == 0
    printed = capsys.readouterr().out
    assert "ours" in printed
    assert "nothing left out" not in printed


@pytest.mark.parametrize("wrong", [["--points", "5", "--clusters", "6"], ["--iterations", "0"], ["--dim", "0"]])
def test_wrong_sizes_are_refused(wrong: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        kmeans.main(wrong)
    assert ended.value.code == 2


def test_ratios_are_those_to_faiss() -> None:
    common = {"data": "faces", "points": 10, "clusters": 2, "gemm": 1.0, "compared": None}
    baseline = kmeans.Row(way=FAISS, wall=(4.0, 2.0, 3.0), cpu=(6.0, 6.0, 6.0), objective=0.5, **common)  # type: ignore[arg-type]
    ours = kmeans.Row(way=OURS, wall=(2.0,), cpu=(2.0,), objective=0.505, **common)  # type: ignore[arg-type]
    texts = dict(zip(kmeans.HEADER, kmeans.cells(ours, [baseline, ours]), strict=True))
    assert (texts["speed"], texts["CPU speed"], texts["loss"], texts["GEMM share"]) == (
        "1.50",
        "3.00",
        "-1.0e-02",
        "0.50",
    )
    alone = dict(zip(kmeans.HEADER, kmeans.cells(ours, [ours]), strict=True))
    assert (alone["speed"], alone["loss"]) == ("-", "-")


def test_data_are_unit_rows_as_they_say() -> None:
    generator = torch.Generator().manual_seed(0)
    for make in (face_like, unstructured):
        x_ND = make(500, 10, 64, generator)
        torch.testing.assert_close(x_ND.norm(dim=1), torch.ones(500))
    x_ND = face_like(4000, 1, 512, generator)
    own_N = x_ND @ torch.nn.functional.normalize(x_ND.mean(0), dim=0)
    assert own_N.mean() == pytest.approx(0.65, abs=0.01)
    assert objective(x_ND[:3], x_ND[[0, 1, 2]] * 5) == pytest.approx(1, abs=1e-6)


def test_one_size_has_no_slope(tmp_path: Path) -> None:
    common = {"data": "faces", "points": 10, "clusters": 2, "gemm": 1.0, "compared": None, "objective": 0.5}
    row = kmeans.Row(way=OURS, wall=(4.0,), cpu=(6.0,), **common)  # type: ignore[arg-type]
    save_scaling_plot([row], tmp_path / "new" / "plot.png", title="one")
    assert (tmp_path / "new" / "plot.png").stat().st_size > 1000
