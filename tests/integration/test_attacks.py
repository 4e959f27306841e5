"""What strangers can send: weights, recipes, arrays, names and addresses made to harm; test_attacks_data.py has sets,
images and archives. Each is refused in one line with the documented exit code, no code runs, nothing is written
outside, and time and memory stay bounded.

tests/unit/test_hostile_*.py damage every byte of the formats; test_lst.py, test_pack_tables.py and test_report_page.py
hold paths out of a list, paths in parquet cells and names in the page.
"""

from __future__ import annotations

import io
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import train_dist
from backbones import build_backbone
from clustering.__main__ import main as clustering
from clustering.service.start import read_start
from configs.schema import ConfigError
from data.__main__ import main as data
from evaluation.__main__ import main as evaluation
from tests.attack_cases import Evil, Say, ended
from tests.integration.conftest import IDENTITIES, ROOT, Run
from tests.unit.test_report_page import EVIL, Reader

SMALL = "data: {}\nmodel: {backbone: small, embedding_size: 16}\n"


# ---- weights -------------------------------------------------------------------------------------------------------


def _inflating(path: Path) -> None:
    """Weights of some kilobytes that claim 64 MiB."""
    whole = io.BytesIO()
    torch.save({"a": torch.zeros(1 << 24)}, whole)
    with zipfile.ZipFile(whole) as stored, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as small:
        for name in stored.namelist():
            small.writestr(name, stored.read(name))


WEIGHTS: dict[str, Callable[[Path, Path], object]] = {
    "a state that calls": lambda path, canary: torch.save({"stem.weight": Evil(canary)}, path),
    "a bare pickle": lambda path, canary: path.write_bytes(pickle.dumps(Evil(canary))),
    "beside good tensors": lambda path, canary: torch.save(
        {**build_backbone("small", embedding_size=16).state_dict(), "more": Evil(canary)}, path
    ),
    "a whole module": lambda path, canary: torch.save(torch.nn.Linear(2, 2), path),
    "a bomb": lambda path, canary: _inflating(path),
    "no list of weights": lambda path, canary: torch.save([torch.zeros(1)], path),
    "an empty stack": lambda path, canary: path.write_bytes(b"\x80\x02."),
    "cut within a number": lambda path, canary: path.write_bytes(b"\x80\x02K"),
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_of_a_stranger(kind: str, packed: Path, tmp_path: Path, canary: Path, said: Say) -> None:
    run, out = tmp_path / "run", tmp_path / "x.npy"
    run.mkdir()
    (run / "config.yaml").write_text(SMALL)
    WEIGHTS[kind](run / "backbone.pt", canary)
    embed = ("embed", "--records", packed, "--out", out, "--device", "cpu")
    assert ended(evaluation, *embed, "--run", run) == 2
    told = said()
    assert "backbone.pt: " in told
    assert "weights_only" not in told, "torch's advice to load it all the same"
    alone = ("--weights", run / "backbone.pt", "--backbone", "small", "--embedding-size", 16)
    assert ended(evaluation, *embed, *alone) == 2
    assert "backbone.pt: " in said()
    assert not out.exists()
    if "calls" in kind:
        assert not canary.exists()
        torch.load(run / "backbone.pt", weights_only=False)
        canary.rmdir()  # the attack is a real one


def test_a_bomb_of_weights_is_not_inflated(packed: Path, tmp_path: Path, said: Say) -> None:
    _inflating(tmp_path / "backbone.pt")
    assert (tmp_path / "backbone.pt").stat().st_size < 1 << 20
    arguments = ("--weights", tmp_path / "backbone.pt", "--backbone", "small", "--out", tmp_path / "x.npy")
    assert ended(evaluation, "embed", *arguments, "--records", packed) == 2
    assert "it claims 671" in said()


# ---- recipes -------------------------------------------------------------------------------------------------------


def _laughs(levels: str, last: str) -> str:
    """Ten to the power of the levels of texts in a few lines."""
    text, before = "data: {}\nmodel:\n  backbone: &a [ha, ha, ha, ha, ha, ha, ha, ha, ha, ha]\n", "a"
    lists = []
    for name in levels:
        lists.append(f"&{name} [{', '.join([f'*{before}'] * 10)}]")
        before = name
    return text + last.format(", ".join(lists))


RECIPES = {
    "a call": "data: !!python/object/apply:os.mkdir [{canary}]\n",
    "a call in a value": "model: {{backbone: !!python/object/apply:os.mkdir [{canary}]}}\n",
    "a new object": "model: !!python/object/new:os.mkdir [{canary}]\n",
    "a module": "model: !!python/module:os\n",
    "laughs for a list": _laughs("bcdefghijkl", "eval:\n  sets: [{}]\n"),
    "laughs for a choice": _laughs("bcdefghijkl", "optim:\n  name: [{}]\n"),
    "laughs for a name": _laughs("bcdefghijkl", "train:\n  output: [{}]\n"),
    "laughs for the model": "x: &a [a, a, a]\n" + "".join(
        f"y{c}: &{c} [{', '.join([f'*{b}'] * 9)}]\n" for b, c in zip("abcdefgh", "bcdefghi", strict=True)
    ) + "model: {backbone: *i}\n",
    "merged merges": "model: &a0 {backbone: small}\n" + "".join(
        f"x{n}: &a{n}\n  <<: [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
    ),
    "depth": "model: " + "[" * 3_000,
    "size": "model: {backbone: " + "x" * (1 << 20) + "}\n",
    "base sixty": "model: {embedding_size: " + ":".join(["59"] * 10_000) + "}\n",
    "a key of many signs": "model:\n  " + "k" * 1000 + ": 1\n",
    "a key that steers": 'model: {"a\\e[2J\\nerror: b": 1}\n',
}  # fmt: skip


@pytest.mark.parametrize("kind", [kind for kind in RECIPES if kind.startswith(("a call", "a new", "a module"))])
def test_recipes_that_call(kind: str, packed: Path, tmp_path: Path, canary: Path, said: Say) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(
        RECIPES[kind].replace("{canary}", str(canary)).replace("{{", "{").replace("}}", "}")
    )
    assert ended(train_dist.main, "--config", run / "config.yaml") == 2
    assert "not valid YAML: could not determine a constructor for the tag" in said()
    assert ended(evaluation, "embed", "--run", run, "--records", packed, "--out", tmp_path / "x.npy") == 2
    assert "not valid YAML: could not determine a constructor for the tag" in said()


_BOUNDED = """
import resource, sys
from pathlib import Path
from configs.load import load_config, read_section, read_yaml
from configs.schema import ConfigError, ModelConfig
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
def model(path):
    read_section(ModelConfig, "model", read_yaml(path)["model"])
for path in map(Path, sys.argv[1:]):
    for read in (load_config, model):
        try:
            read(path)
        except ConfigError as error:
            assert str(error).isprintable() and len(str(error)) < 2000, error
            print("refused")
        else:
            print("read")
"""


def test_recipes_that_grow(tmp_path: Path) -> None:
    """A gigabyte and a minute for all of them; each would take hours or all memory."""
    kinds = [kind for kind in RECIPES if not kind.startswith(("a call", "a new", "a module"))]
    paths = [tmp_path / f"{number}.yaml" for number in range(len(kinds))]
    for path, kind in zip(paths, kinds, strict=True):
        path.write_text(RECIPES[kind])
    command = [sys.executable, "-c", _BOUNDED, *map(str, paths)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    outcomes = done.stdout.split()
    assert len(outcomes) == 2 * len(kinds)
    # Of a run's file only the section `model` is looked at: that of the merged merges is a good one.
    assert [kinds[at // 2] for at, outcome in enumerate(outcomes) if outcome == "read"] == ["merged merges"]


# ---- arrays --------------------------------------------------------------------------------------------------------


def _npy(head: str) -> bytes:
    text = head.encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(24)


ARRAYS: dict[str, Callable[[Path, Path], object]] = {
    "objects": lambda path, canary: np.save(path, np.array([Evil(canary)] * 3, object), allow_pickle=True),
    "objects in rows": lambda path, canary: np.save(path, np.array([[Evil(canary)]] * 3, object), allow_pickle=True),
    "a bare pickle": lambda path, canary: path.write_bytes(pickle.dumps(Evil(canary))),
    "a deep head": lambda path, canary: path.write_bytes(_npy("-" * 9000 + "1")),
    "a huge shape": lambda path, canary: path.write_bytes(
        _npy("{'descr': '<i8', 'fortran_order': False, 'shape': (99999999999999999999999999,)}")
    ),
    "a shape of no numbers": lambda path, canary: path.write_bytes(
        _npy("{'descr': '<i8', 'fortran_order': False, 'shape': (True,)}")
    ),
    "a head that calls": lambda path, canary: path.write_bytes(
        _npy(f"{{'descr': __import__('os').mkdir({str(canary)!r}), 'fortran_order': False, 'shape': (3,)}}")
    ),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_of_a_stranger(kind: str, packed: Path, tmp_path: Path, canary: Path, said: Say) -> None:
    bad, good = tmp_path / "bad.npy", tmp_path / "good.npy"
    ARRAYS[kind](bad, canary)
    np.save(good, np.eye(3, dtype=np.float32))
    out = ("--out", tmp_path / "out")
    for command in (
        ("report", bad, "--records", packed, *out),
        ("report", good, "--labels", bad, *out),
        ("kmeans", bad, "--k", 2, "--out", tmp_path / "centres.npy"),
    ):
        assert ended(clustering, *command) == 2, command
        assert "bad.npy: " in said()
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match=r"bad\.npy: ") as refused:
        read_start(str(bad), num_samples=3, num_clusters=3)
    assert "\n" not in str(refused.value)


# ---- names in the report -------------------------------------------------------------------------------------------


def test_names_in_a_report_are_text(packed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "<img src=x onerror=alert(1)>\"'&"
    shutil.copytree(packed, folder)
    (folder / "identities.txt").write_text(f"{EVIL}\n" * IDENTITIES)
    rows = np.random.default_rng(0).normal(size=(IDENTITIES * 8, 16)).astype(np.float32)
    embeddings = tmp_path / "<script>alert(2)"
    embeddings.mkdir()
    np.save(embeddings / "x.npy", rows)
    out = tmp_path / "<script>alert(3)"
    assert ended(clustering, "report", embeddings, "--records", folder, "--out", out) == 0
    page = (out / "index.html").read_text(encoding="utf-8")
    read = Reader(page)
    assert "script" not in {tag for tag, _ in read.elements}
    assert not [name for _, attributes in read.elements for name in attributes if name.startswith("on")]
    assert all((a["src"] or "").startswith("data:image/jpeg") for tag, a in read.elements if tag == "img")
    assert page.count("&lt;script&gt;alert(1)") >= 20
    assert "&lt;script&gt;alert(2)" in page
    assert "&lt;script&gt;alert(3)" in page


# ---- secrets -------------------------------------------------------------------------------------------------------


def test_credentials_reach_no_file_and_no_message(
    train_here: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for address in ("s3://AKIA:hunter2@bucket/set", "https://host/set?token=hunter2"):
        done = train_here(f"data.path={address}")
        assert done.returncode == 2
        assert "data.path: expected an address without credentials" in done.stderr
        assert data(["inspect", address]) == 2
        printed = capsys.readouterr()
        assert "the address: expected an address without credentials" in printed.err
        assert "hunter2" not in done.stdout + done.stderr + printed.out + printed.err
    assert not (tmp_path / "run").exists()
