"""The page of results: figures are those of the JSON, names of strangers are text, nothing is loaded from anywhere."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from backbones import build_backbone
from data.verification_bin import write_bin
from evaluation.__main__ import main
from evaluation.page import Summary, Table, render
from tests.ijb_cases import made_up, write
from tests.image_cases import jpeg

EVIL = "<b>x$^$<img src=x onerror=alert(1)>&\"'"
"""A name that a file can have."""
VOID = {"meta", "img"}


class Page(HTMLParser):
    """Elements, tables as lists of rows of text, texts of headings, definitions and list items; all must be closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.said: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in VOID:
            return
        self.open.append(tag)
        if tag == "table":
            self.tables[self.said["h2"][-1]] = []
        elif tag == "tr":
            list(self.tables.values())[-1].append([])
        elif tag in ("td", "th"):
            list(self.tables.values())[-1][-1].append("")
        else:
            self.said.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open:
            assert not data.strip()
        elif self.open[-1] in ("td", "th"):
            list(self.tables.values())[-1][-1][-1] += data
        elif self.open[-1] in self.said:
            self.said[self.open[-1]][-1] += data

    @property
    def facts(self) -> dict[str, str]:
        return dict(zip(self.said["dt"], self.said["dd"], strict=True))


def _read(path: Path) -> Page:
    """The page, after all that every page must keep to."""
    page = Page(path.read_text(encoding="utf-8"))
    assert {tag for tag, _ in page.elements}.isdisjoint({"script", "link", "iframe", "object", "b", "base", "form"})
    for tag, attributes in page.elements:
        assert set(attributes).isdisjoint({"href", "srcset", "style", "background"})
        assert not [name for name in attributes if name.startswith("on")]
        if tag == "img":
            source = attributes["src"] or ""
            assert source.startswith("data:image/png;base64,")
            assert base64.b64decode(source.split(",")[1]).startswith(b"\x89PNG")
            assert attributes["alt"]
    assert not re.search(r"https?:|url\(|@import", page.text)
    style = page.said["style"][0]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = next(a["content"] or "" for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert f"style-src 'sha256-{digest}'" in policy
    assert "prefers-color-scheme: dark" in style
    assert any(a.get("name") == "viewport" for _, a in page.elements)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", page.facts["date"])
    assert page.said["h1"] == page.said["title"]
    return page


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}"


@pytest.fixture(autouse=True)
def _left_as_it_was() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    if dist.is_initialized():
        dist.destroy_process_group()


def _call(*arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two trainings' outputs, one of an odd name, and a set."""
    images = [jpeg(number // 2 if number % 4 < 2 else number) for number in range(24)]
    write_bin(tmp_path / f"{EVIL}.bin", images, [number % 2 == 0 for number in range(12)])
    folders = [tmp_path / "a", tmp_path / EVIL]
    for number, run in enumerate(folders):
        run.mkdir()
        torch.manual_seed(number)
        torch.save(build_backbone("small", embedding_size=16).state_dict(), run / "backbone.pt")
        model = "model: {backbone: small, embedding_size: 16}"
        (run / "config.yaml").write_text(f"{model}\noptim: {{lr: 0.{number}}}\ndata: {{path: {number}</td>}}\n")
        accuracies = [{"step": step, "set": EVIL, "accuracy": 0.5 + step / 99} for step in (10, 20)]
        (run / "verification.jsonl").write_text("".join(json.dumps(line) + "\n" for line in accuracies))
    return folders


def test_verify_and_compare(tmp_path: Path, runs: list[Path]) -> None:
    for number, run in enumerate(runs):
        command = ("verify", "--run", run, tmp_path / f"{EVIL}.bin", "--out", run / "evaluation", "--device", "cpu")
        _call(*command, "--resamples", (0, 20)[number], "--seed", 7)
        page, found = _read(run / "evaluation" / "index.html"), _json(run / "evaluation" / "verification.json")
        of_set = found["sets"][EVIL]
        header, *rows = page.tables["Verification"]
        assert header == ["set", "figure", "%", "95% interval" if number else ""]
        assert [row[0] for row in rows] == [EVIL] * len(rows)
        figures = {"accuracy", "auc", "eer", "tar@far=1e-1"} & set(of_set)
        assert {row[1] for row in rows} == figures
        for _, name, value, interval in rows:
            assert value == _percent(of_set[name])
            low_high = of_set["intervals"].get(name)
            assert interval == (" … ".join(map(_percent, low_high)) if low_high else "")
        reasons = [f"{EVIL}: {entry['reason']}" for entry in of_set["rates"] if "reason" in entry]
        assert reasons
        assert set(reasons) <= set(page.said["li"])
        assert page.facts["backbone"] == "small, 16 components"
        assert page.facts["weights"] == str(run / "backbone.pt")
        assert page.facts[f"{EVIL}.bin"] == "6 pairs of one person, 6 of two"
        assert any("20 resamples, seed 7" in text for text in page.said["li"]) == bool(number)
        pictures = [attributes["alt"] for tag, attributes in page.elements if tag == "img"]
        assert pictures == ["roc.png", "det.png", f"scores_{EVIL}.png"]
        stored = (run / "evaluation" / "roc.png").read_bytes()
        assert base64.b64encode(stored).decode() in page.text
    _call("compare", *runs, "--out", tmp_path / "both")
    page, found = _read(tmp_path / "both" / "index.html"), _json(tmp_path / "both" / "compare.json")
    header, *rows = page.tables["Runs"]
    assert header == ["run", "steps", "images/s", "set", "last %", "best %", "at step"]
    for row, run in zip(rows, found["runs"], strict=True):
        of_set = run["sets"][EVIL]
        assert row == [
            *(run["run"], str(run["steps"]), "", EVIL),
            *(_percent(of_set["last"]["accuracy"]), _percent(of_set["best"]["accuracy"]), "20"),
        ]
    header, *rows = page.tables["Settings that differ"]
    assert header == ["", *map(str, runs)]
    assert {name: values for name, *values in rows} == {
        name: [str(value) for value in values] for name, values in found["settings"].items()
    }
    assert rows[0] == ["data.path", "0</td>", "1</td>"]
    assert [attributes["alt"] for tag, attributes in page.elements if tag == "img"] == [f"roc_{EVIL}.png"]


@pytest.mark.parametrize("joined", [False, True])
def test_ijb(tmp_path: Path, joined: bool) -> None:
    paths = write(made_up(20, noise=2.0), tmp_path)
    options = ["--pairs", paths["pairs"], "--gallery", paths["g1"], paths["g2"], "--probes", paths["probes"]]
    more = ["--join", "--unit"] if joined else ["--detector", paths["detector"]]
    _call("ijb", paths["x"], "--media", paths["media"], *options, *more, "--out", tmp_path / "out")
    page, found = _read(tmp_path / "out" / "index.html"), _json(tmp_path / "out" / "ijb.json")
    one = found["verification"]
    header, *rows = page.tables[f"1:1: {one['genuine']} pairs of one person, {one['impostors']} of two"]
    assert header == ["", "%", "% nearest point", "threshold"]
    for row, entry in zip(rows, one["rates"], strict=True):
        exponent = round(np.log10(entry["far"]))
        threshold = "" if "reason" in entry else f"{entry['threshold']:.4f}"
        assert row == [f"tar@far=1e{exponent}", _percent(entry["tar"]), _percent(entry["nearest_point"]), threshold]
    assert f"AUC {100 * one['auc']:.3f}%, EER {100 * one['eer']:.3f}%" in page.said["li"]
    _, *rows = page.tables["1:N, %"]
    galleries = found["identification"]["galleries"]
    assert [row[0] for row in rows] == (["joined"] if joined else [paths["g1"].stem, paths["g2"].stem])
    for row, gallery in zip(rows, galleries.values(), strict=True):
        figures = [*gallery["rank"].values(), *(entry["tpir"] for entry in gallery["rates"])]
        assert row[1:] == [str(gallery["mated"]), str(gallery["non_mated"]), *map(_percent, figures)]
    assert page.facts["embeddings"] == str(paths["x"])
    assert page.facts["templates"] == str(found["templates"])
    assert ("detector's scores" in page.facts) != joined
    how = " ".join(page.said["li"])
    assert ("scaled to length 1, not weighted" if joined else "of the length that it has, times the detector's") in how
    assert ("all galleries as one" in how) == joined
    assert [attributes["alt"] for tag, attributes in page.elements if tag == "img"] == ["roc.png", "det.png"]


def test_identification(tmp_path: Path) -> None:
    g = np.random.default_rng(0)
    label = np.arange(31) // 2
    np.save(tmp_path / f"{EVIL}.npy", g.standard_normal((16, 8))[label] + 0.4 * g.standard_normal((31, 8)))
    np.save(tmp_path / "label.npy", label)
    np.save(tmp_path / "others.npy", g.standard_normal((200, 8)))
    files = ("--labels", tmp_path / "label.npy", "--distractors", tmp_path / "others.npy")
    _call("identification", tmp_path / f"{EVIL}.npy", *files, "--out", tmp_path / "out")
    page, found = _read(tmp_path / "out" / "index.html"), _json(tmp_path / "out" / "identification.json")
    _, row = page.tables["31 probes among 200 distractors, %"]
    figures = [*found["rank"].values(), *(entry["tpir"] for entry in found["rates"])]
    assert row == [EVIL, str(found["mated"]), str(found["non_mated"]), *map(_percent, figures)]
    assert row[-2] == ""
    assert "1 probes are the only ones of their person: they count in FPIR alone" in page.said["li"]
    assert any("has not been checked" in text for text in page.said["li"])
    assert "img" not in {tag for tag, _ in page.elements}


def test_names_that_are_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not UTF-8, and with what steers a terminal: shown as escapes, on the terminal and in pictures too."""
    paths = write(made_up(), tmp_path)
    odd, pairs, gallery = (Path(os.fsdecode(os.fsencode(tmp_path) + b"/%d\x1b[2J\xff.npy" % n)) for n in range(3))
    for name, path in (("x", odd), ("pairs", pairs), ("g1", gallery)):
        paths[name].rename(path)
    searched = ("--gallery", gallery, "--probes", paths["probes"])
    _call("ijb", odd, "--media", paths["media"], "--pairs", pairs, *searched, "--out", tmp_path / "out")
    out = capsys.readouterr().out
    assert "2\\x1b[2J\\udcff" in out
    assert all(line.isprintable() for line in out.splitlines())
    page = _read(tmp_path / "out" / "index.html")
    assert page.facts["embeddings"].endswith("\\udcff.npy")
    assert _json(tmp_path / "out" / "ijb.json")["embeddings"] == str(odd)


def test_a_page_that_is_there_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = write(made_up(), tmp_path)
    (tmp_path / "index.html").write_text("another's")
    command = ("ijb", paths["x"], "--media", paths["media"], "--pairs", paths["pairs"], "--out", tmp_path)
    assert main([str(argument) for argument in command]) == 2
    assert "expected no index.html there" in capsys.readouterr().err
    assert {path.name for path in tmp_path.glob("*.html")} == {"index.html"}
    _call(*command, "--force")
    _read(tmp_path / "index.html")


def test_no_rows_and_no_pictures_are_a_page_too() -> None:
    page = Page(render(Summary("t", [], [Table("empty", ("a", "b"), [])], []), {}))
    assert page.tables == {"empty": [["a", "b"]]}


def test_numbers_stand_at_the_right() -> None:
    rows = [("set", "accuracy", "95.00", "94.10 … 96.00"), ("other", "eer", "", "")]
    table = Table("x", ("", "figure", "%", "interval"), rows)
    for given, expected in ((table, [None, None, "number", "number"]), (table._replace(figures=False), [None] * 4)):
        page = Page(render(Summary("t", [], [given], []), {}))
        assert [attributes.get("class") for tag, attributes in page.elements if tag == "td"] == 2 * expected
