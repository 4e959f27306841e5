"""The command lines of evaluation, from files to tables, JSON and pictures, with what can be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from backbones import build_backbone
from data.verification_bin import write_bin
from evaluation.__main__ import main
from tests.ijb_cases import made_up, write
from tests.image_cases import jpeg


@pytest.fixture(autouse=True)
def _left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("COLUMNS", "200")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    if dist.is_initialized():
        dist.destroy_process_group()


def _call(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_run_is_verified_and_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = [jpeg(number // 2 if number % 4 < 2 else number) for number in range(24)]
    write_bin(tmp_path / "toy.bin", images, [number % 2 == 0 for number in range(12)])
    runs = [tmp_path / "a", tmp_path / "b"]
    for number, run in enumerate(runs):
        run.mkdir()
        torch.manual_seed(number)
        torch.save(build_backbone("small", embedding_size=16).state_dict(), run / "backbone.pt")
        (run / "config.yaml").write_text(f"model: {{backbone: small, embedding_size: 16}}\noptim: {{lr: 0.{number}}}\n")
        lines = [
            {"step": step, "set": "toy", "accuracy": 0.5 + value} for step, value in ((0, 0), (10, 0.4), (20, 0.3))
        ]
        (run / "verification.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        speeds = [{"step": step, "throughput/images_per_second": 100.0 * step} for step in (1, 2, 21)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in speeds) + '{"step": 9')
    for run in runs:
        command = ("verify", "--run", run, tmp_path / "toy.bin", "--out", run / "evaluation", "--device", "cpu")
        assert _call(*command, "--resamples", 10) == 0
        assert "accuracy" in capsys.readouterr().out
    assert _call("compare", *runs, "--out", tmp_path / "both") == 0
    out = capsys.readouterr().out
    assert "optim.lr" in out
    assert "model.backbone" not in out
    found = _json(tmp_path / "both" / "compare.json")
    assert found["settings"] == {"optim.lr": [0.0, 0.1]}
    assert found["runs"][0]["steps"] == 21
    assert found["runs"][0]["images_per_second"] == 200
    toy = found["runs"][1]["sets"]["toy"]
    assert (toy["last"]["step"], toy["best"]["step"]) == (20, 10)
    assert (tmp_path / "both" / "roc_toy.png").read_bytes().startswith(b"\x89PNG")
    assert _call("compare", *runs, "--out", tmp_path / "both") == 2
    assert "expected no compare.json there" in capsys.readouterr().err


def test_ijb_from_files_to_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = write(made_up(20, noise=2.0), tmp_path)
    command = ["ijb", paths["x"], "--media", paths["media"], "--detector", paths["detector"]]
    one = [*command, "--pairs", paths["pairs"]]
    many = ["--gallery", paths["g1"], paths["g2"], "--probes", paths["probes"]]
    assert _call(*one, *many, "--out", tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert "tar@far=1e-2" in out
    assert "FAR 1e-06 needs at least 1000000 pairs" in out
    assert "TPIR@FPIR=0.1" in out
    found = _json(tmp_path / "out" / "ijb.json")
    assert found["templates"] == 80
    assert [entry["far"] for entry in found["verification"]["rates"]] == [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1]
    assert 0 < found["verification"]["rates"][5]["tar"] <= 1
    galleries = found["identification"]["galleries"]
    assert list(galleries) == [str(paths["g1"]), str(paths["g2"])]
    means = [gallery["rank"]["1"] for gallery in galleries.values()]
    assert found["identification"]["mean"]["rank"]["1"] == pytest.approx(np.mean(means))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"ijb.json", "index.html", "roc.png", "det.png"}
    assert _call(*command, *many, "--join") == 0
    assert "there are none" in capsys.readouterr().out
    for arguments, match in (
        (command, "expected --pairs, or --gallery and --probes"),
        ([*one, "--probes", paths["probes"]], "expected both of --gallery and --probes"),
        ([*one, "--out", tmp_path / "out"], "expected no ijb.json there"),
        ([*one[:1], tmp_path / "none.npy", *one[2:]], "none.npy: cannot read it"),
    ):
        assert _call(*arguments) == 2
        assert match in capsys.readouterr().err


def test_pairs_of_one_kind_have_no_rates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = write(made_up(), tmp_path)
    first = next(line for line in paths["pairs"].read_text().splitlines() if line.endswith(" 0"))
    paths["pairs"].write_text(first + "\n")
    assert _call("ijb", paths["x"], "--media", paths["media"], "--pairs", paths["pairs"]) == 2
    assert "pairs.txt: expected pairs of one person and of two, got 0 and 1" in capsys.readouterr().err


def test_identification_from_files_to_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    g = np.random.default_rng(0)
    label = np.arange(31) // 2
    np.save(
        tmp_path / "x.npy", (g.standard_normal((16, 8))[label] + 0.4 * g.standard_normal((31, 8))).astype("float16")
    )
    np.save(tmp_path / "label.npy", label)
    np.save(tmp_path / "others.npy", g.standard_normal((200, 8)).astype("float32"))
    np.save(tmp_path / "other_labels.npy", np.arange(200) + 100)
    np.save(tmp_path / "narrow.npy", g.standard_normal((5, 7)))
    command = ["identification", tmp_path / "x.npy", "--labels", tmp_path / "label.npy", "--distractors"]
    both = [*command, tmp_path / "others.npy", "--distractor-labels", tmp_path / "other_labels.npy"]
    assert _call(*both, "--out", tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert "rank 10" in out
    assert "1 probes are the only ones of their person" in out
    found = _json(tmp_path / "out" / "identification.json")
    assert (found["mated"], found["non_mated"], found["probes_without_mate"]) == (30, 31, 1)
    assert 0 < found["rank"]["1"] <= found["rank"]["10"] <= 1
    assert found["rates"][0]["reason"] == "FPIR 0.01 needs at least 100 searches of persons not there, there are 31"
    np.save(tmp_path / "other_labels.npy", np.arange(200) + 15)
    assert _call(*both) == 2
    assert "other_labels.npy: row 0: label 15 is a probe's" in capsys.readouterr().err
    assert _call(*command, tmp_path / "narrow.npy") == 2
    assert "expected embeddings of 8 components" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert _call(*both) == 2
    assert "expected one process, without torchrun" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("metrics.jsonl", b'{"step": 1}\n{"step": "x"}\n', "metrics.jsonl: line 2: expected a JSON object with step"),
        ("metrics.jsonl", b'{"step": 1}\n[1\n', "metrics.jsonl: line 2: expected a JSON object"),
        ("metrics.jsonl", b"[" * 100_000 + b"\n", "metrics.jsonl: line 1: expected a JSON object"),
        ("metrics.jsonl", b"\xff\n", "metrics.jsonl: expected JSON lines in UTF-8"),
        ("verification.jsonl", b'{"step": 1, "set": "a"}\n', "line 1: expected a JSON object with step, set, accuracy"),
        ("scores_a.npy", b"1 2 3", "scores_a.npy: expected scores and truths"),
        ("scores_a.npy", np.ones((4, 3)), "scores_a.npy: expected a score and a truth of 0 or 1"),
        ("scores_a.npy", np.ones((4, 2)), "scores_a.npy: expected pairs of one person and of two, got 4 and 0"),
        ("config.yaml", b"a: [", "config.yaml"),
    ],
)
def test_runs_that_cannot_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: Any, match: str
) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 3}\n')
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        np.save(tmp_path / name, content)
    assert _call("compare", tmp_path) == 2
    assert match in capsys.readouterr().err


def test_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _call("compare", tmp_path) == 2
    assert "expected a training's output, with metrics.jsonl or verification.jsonl in it" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_text('{"step": 3}\n')
    assert _call("compare", tmp_path, tmp_path) == 2
    assert "expected different runs" in capsys.readouterr().err
    assert _call("compare", tmp_path) == 0
