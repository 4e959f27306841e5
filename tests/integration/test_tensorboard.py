"""What TensorBoard shows of a run, read from the events and seen in a browser."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from google.protobuf import text_format
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.projector import projector_config_pb2

from tests.integration.conftest import IDENTITIES, Run, environment

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync", "--no-first-run",
         "--disable-component-update"]  # fmt: skip
SETS = "eval.sets=[verification.bin]"
PARTS = ("data_wait", "backbone", "head", "cluster")


def _events(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    return events


def _layout(events: EventAccumulator) -> layout_pb2.Layout:
    made = layout_pb2.Layout()
    made.ParseFromString(events.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0])
    return made


def _metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _images(events: EventAccumulator, tag: str) -> list[tuple[int, Any]]:
    return [
        (event.step, cv2.imdecode(np.frombuffer(event.encoded_image_string, np.uint8), cv2.IMREAD_COLOR))
        for event in events.Images(tag)
    ]


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [(1, ("clustering.enabled=false", "train.epochs=1")), (2, (SETS,))],
)
def test_every_chart_of_the_first_page_has_its_scalars(
    train: Run, tmp_path: Path, ranks: int, settings: tuple[str, ...]
) -> None:
    done = train(ranks, *settings)
    assert done.returncode == 0, done.stderr
    events = _events(tmp_path / "run")
    tags = events.Tags()["scalars"]
    page = _layout(events)
    groups = [category.title for category in page.category]
    assert groups[:4] == ["losses", "throughput", "where a step's time goes", "memory"]
    assert ("margins and hard level" in groups) == ("clustering.enabled=false" not in settings)
    assert ("verification" in groups) == (SETS in settings)
    patterns = [tag for category in page.category for chart in category.chart for tag in chart.multiline.tag]
    for pattern in patterns:
        assert any(re.match(pattern, tag) for tag in tags), pattern
    logged = ("loss/", "throughput/", "time/", "memory/", "ranks/", "optim/", "guard/")
    left = {tag for tag in tags if tag.startswith(logged) and not any(re.match(p, tag) for p in patterns)}
    plain = (
        {"loss/contrastive", "loss/alignment", "time/cluster_ms"} if "clustering.enabled=false" in settings else set()
    )
    assert left == {"throughput/images_per_second_per_rank"} | plain, "whatever else is logged stands on it"


def test_values_hold_together(train_here: Run, tmp_path: Path) -> None:
    assert train_here("train.epochs=2").returncode == 0
    lines = [line for line in _metrics(tmp_path / "run") if "time/step_ms" in line]
    assert len(lines) == 4
    for line in lines:
        parts = [line[f"time/{name}_ms"] for name in PARTS]
        assert all(part >= 0 for part in parts)
        assert line["time/backbone_ms"] > 0
        assert line["time/head_ms"] > 0
        assert sum(parts) <= line["time/step_ms"]
        assert 0.05 < line["memory/resident_gb"] < 20
        flops = line["throughput/tflops"] * 1e12 / line["throughput/images_per_second_per_rank"]
        assert 3 * 2 * 15e6 < flops < 3 * 2 * 18e6, "the small network has 16 MMAC, the head of 24 classes next to none"
        assert "throughput/mfu" not in line
        assert "optim/loss_scale" not in line


def test_half_precision_tells_its_loss_scale(train_here: Run, tmp_path: Path) -> None:
    assert train_here("train.precision=fp16", "train.epochs=1", "clustering.enabled=false").returncode == 0
    scales = [line["optim/loss_scale"] for line in _metrics(tmp_path / "run")]
    assert len(scales) == 2
    assert set(scales) <= {2.0**power for power in range(17)}, "it begins at 2^16 and is halved by what overflows"


def test_each_version_of_the_clusters_has_its_contact_sheets(train_here: Run, packed: Path, tmp_path: Path) -> None:
    """Also when images do not decode: those of class 0 are overwritten."""
    data = tmp_path / "data"
    shutil.copytree(packed, data)
    records = (data / "train.rec").read_bytes()
    spoiled = bytearray(records)
    start = records.index(b"\xff\xd8\xff")
    spoiled[start : start + 64] = bytes(64)
    (data / "train.rec").write_bytes(spoiled)
    assert train_here("tensorboard.sheet_classes=30", "data.max_bad_images=50", data=data).returncode == 0
    log = _metrics(tmp_path / "run")
    events = _events(tmp_path / "run")
    versions = [line["clusters/version"] for line in log if "clusters/version" in line]
    for tag in ("clusters/hardest", "clusters/easiest"):
        pictures = _images(events, tag)
        assert len(pictures) == versions[-1] >= 2
        for _, picture in pictures:
            assert picture.shape == (4 + IDENTITIES * (16 + 112 + 4), 4 + 8 * (112 + 4), 3)
        assert ((pictures[-1][1] == 128).all(2)).sum() >= 112 * 112


def test_switched_off_there_are_no_pictures(train_here: Run, tmp_path: Path) -> None:
    done = train_here("tensorboard.sheet_classes=0", "tensorboard.projector_images=0", "train.epochs=2", SETS)
    assert done.returncode == 0
    assert _metrics(tmp_path / "run")[-2]["clusters/version"] >= 1
    assert not {"clusters/hardest", "clusters/easiest"} & set(_events(tmp_path / "run").Tags()["images"])
    assert not list((tmp_path / "run" / "tensorboard").glob("*.pbtxt"))


def test_the_projector_has_the_last_embeddings(train: Run, tmp_path: Path) -> None:
    done = train(2, SETS, "train.epochs=1", "tensorboard.projector_images=13")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "run" / "tensorboard"
    config = projector_config_pb2.ProjectorConfig()
    text_format.Parse((folder / "projector_config.pbtxt").read_text(), config)
    (info,) = config.embeddings
    x_ND = np.loadtxt(folder / info.tensor_path, delimiter="\t")
    assert x_ND.shape == (13, 16)
    assert np.allclose(np.linalg.norm(x_ND, axis=1), 1, atol=1e-3)
    persons = [int(name) for name in (folder / info.metadata_path).read_text().split()]
    assert persons == sorted(persons)
    alike = x_ND @ x_ND.T
    same = np.equal.outer(persons, persons) & ~np.eye(13, dtype=bool)
    assert alike[same].mean() > alike[~same & ~np.eye(13, dtype=bool)].mean()
    assert done.stdout == ""


def test_a_profile_may_be_asked_for_on_resume_and_leaves_the_end_as_it_was(train_here: Run, tmp_path: Path) -> None:
    assert train_here("train.epochs=2", name="plain").returncode == 0
    assert train_here("train.epochs=2", "train.stop_after_steps=6").returncode == 0
    done = train_here("train.epochs=2", "profile.steps=3", "profile.after=4", "tensorboard.sheet_classes=2")
    assert done.returncode == 0, done.stderr
    path = tmp_path / "run" / "profile" / "steps_11-13_rank0.json.gz"
    with gzip.open(path, "rt") as file:
        names = [event.get("name", "") for event in json.load(file)["traceEvents"]]
    assert len({name for name in names if name.startswith("ProfilerStep#")}) == 3
    assert {"backbone", "head", "communication", "clusters", "data"} <= set(names)
    assert f"profile of steps 11 to 13: {path}" in done.stderr
    plain, profiled = ((tmp_path / name / "backbone.pt").read_bytes() for name in ("plain", "run"))
    assert plain == profiled


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """Of a TensorBoard on the runs below `tmp_path`."""
    command = [
        sys.executable,
        "-m",
        "tensorboard.main",
        "--host",
        "127.0.0.1",
        "--port",
        "0",
        "--logdir",
        str(tmp_path),
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment())
    assert process.stderr is not None
    try:
        found = next(match for line in process.stderr if (match := re.search(r"http://127\.0\.0\.1:\d+/", line)))
        yield found[0]
    finally:
        process.terminate()
        process.wait(30)
        process.stderr.close()


def _wait_until_read(address: str, events: EventAccumulator) -> None:
    """Until TensorBoard has read all of a run: a page that is opened before does not look again."""
    wanted = {"scalars": set(events.Tags()["scalars"]), "images": set(events.Tags()["images"])}
    deadline = time.monotonic() + 60
    while True:
        listed = _asked(address, "plugins_listing")["custom_scalars"]["enabled"]
        found = {kind: _asked(address, f"plugin/{kind}/tags") for kind in wanted}
        if listed and all(tags <= set().union(*found[kind].values()) for kind, tags in wanted.items()):
            return
        assert time.monotonic() < deadline, found
        time.sleep(0.2)


def _asked(address: str, what: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{address}data/{what}", timeout=60) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium found: apt-get install chromium, and pip install playwright")
def test_a_browser_shows_the_page(train_here: Run, tmp_path: Path, address: str) -> None:
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright (the extra `dev` has it)")
    assert train_here("train.epochs=2", SETS).returncode == 0
    events = _events(tmp_path / "run")
    tags = events.Tags()["scalars"]
    charts = [
        (chart.title, sum(any(re.match(pattern, tag) for pattern in chart.multiline.tag) for tag in tags))
        for category in _layout(events).category
        for chart in category.chart
    ]
    errors: list[str] = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        page = browser.new_page(viewport={"width": 1800, "height": 3400})
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        _wait_until_read(address, events)
        page.goto(f"{address}#custom_scalars")
        cards = page.locator("tf-custom-scalar-multi-line-chart-card")
        for number, (title, matches) in enumerate(charts):
            cards.nth(number).get_by_text(title, exact=True).wait_for(timeout=60_000)
            cards.nth(number).get_by_text(f"Matches ({matches})").wait_for(timeout=60_000)
        assert cards.count() == len(charts)
        page.screenshot(path=tmp_path / "page.png")
        page.goto(f"{address}#images")
        for tag in events.Tags()["images"]:
            page.get_by_text(tag, exact=True).first.wait_for(timeout=60_000)
        browser.close()
    assert errors == []
    with Image.open(tmp_path / "page.png") as picture:
        assert picture.size == (1800, 3400)
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 50, "something is drawn"
