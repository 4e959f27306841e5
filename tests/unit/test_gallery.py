"""Contact sheets of classes: which, of which images, and that nothing that happens to them ends a training."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from clustering.service.class_report import ClassReport
from data.rec.recordio import RecordError
from tests.image_cases import MemorySet, damaged_images, jpeg, picture
from training.showing.gallery import Gallery, class_sheet
from training.showing.metrics import RunLog

MAIN, OTHER = SimpleNamespace(is_main=True), SimpleNamespace(is_main=False)


def _report(label: int) -> ClassReport:
    return ClassReport(label=label, hard_level=label / 10, margin=0.3, samples=3)


class _Service:
    """Version and classes of a cluster service; counts how often it was asked."""

    def __init__(self, version: int = 0) -> None:
        self.version, self.asked = version, 0

    def easiest_and_hardest(self, count: int) -> list[ClassReport]:
        self.asked += 1
        return [_report(label) for label in (*range(count), *range(10 - count, 10))]


def _log(output: Path) -> RunLog:
    return RunLog(output, active=True, total_steps=40, first_step=0)


def _gallery(service: _Service | None, records: Any = None, *, main: bool = True, classes: int = 2) -> Gallery:
    records = records or MemorySet([jpeg(seed) for seed in range(40)])
    return Gallery(records, service, MAIN if main else OTHER, classes=classes)  # type: ignore[arg-type]


def _pictures(output: Path, tag: str) -> list[tuple[int, Any]]:
    events = EventAccumulator(str(output / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    return [
        (event.step, cv2.imdecode(np.frombuffer(event.encoded_image_string, np.uint8), cv2.IMREAD_COLOR)[..., ::-1])
        for event in events.Images(tag)
    ]


def test_a_sheet_shows_the_images_of_its_classes() -> None:
    records = MemorySet([jpeg(seed) for seed in range(40)])  # the label of image i is i % 10
    sheet = class_sheet(records, [_report(7), _report(2)], 3)  # type: ignore[arg-type]
    for row, label in enumerate((7, 2)):
        for column in range(3):
            top, left = 4 + 16 + row * (16 + 112 + 4), 4 + column * (112 + 4)
            shown = sheet[top : top + 112, left : left + 112].astype(int)
            assert np.abs(shown - picture(10 * column + label)).mean() < 12, "jpeg's loss, not another image"


@pytest.mark.parametrize("name", damaged_images())
def test_an_image_that_does_not_decode_is_grey(name: str) -> None:
    records = MemorySet([damaged_images()[name][0], *(jpeg(seed) for seed in range(1, 20))])
    sheet = class_sheet(records, [_report(0)], 2)  # type: ignore[arg-type]
    assert (sheet[20:132, 4:116] == 128).all()
    assert sheet[20:132, 120:232].std() > 20


def test_so_is_a_record_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    records = MemorySet([jpeg(seed) for seed in range(20)])

    def fail(sample: int) -> Any:
        raise RecordError(Path("train.rec"), 0, "an image", "none", "pack the set again")

    monkeypatch.setattr(records, "image", fail)
    assert (class_sheet(records, [_report(3)], 1)[20:132, 4:116] == 128).all()  # type: ignore[arg-type]


def test_each_version_is_shown_once_and_the_hardest_first(tmp_path: Path) -> None:
    service, log = _Service(), _log(tmp_path)
    gallery = _gallery(service)
    for step in range(1, 7):
        if step in (2, 5):
            service.version += 1
        gallery.after_step(step, log)
        gallery._drawing.show(within=30)
    gallery.close()
    log.close()
    assert service.asked == 2
    records = MemorySet([jpeg(seed) for seed in range(40)])
    for tag, labels in (("clusters/hardest", (9, 8)), ("clusters/easiest", (0, 1))):
        pictures = _pictures(tmp_path, tag)
        assert [step for step, _ in pictures] == [2, 5]
        expected = class_sheet(records, [_report(label) for label in labels], 8)  # type: ignore[arg-type]
        assert all(np.array_equal(found, expected) for _, found in pictures)


def test_a_resumed_run_does_not_show_the_version_that_it_has(tmp_path: Path) -> None:
    service, log = _Service(version=3), _log(tmp_path)
    gallery = _gallery(service)
    gallery.after_step(1, log)
    assert service.asked == 0
    service.version = 4
    gallery.after_step(2, log)
    gallery.close()
    log.close()
    assert service.asked == 1


def test_other_ranks_ask_as_often_and_draw_nothing(tmp_path: Path) -> None:
    service, log = _Service(), _log(tmp_path)
    gallery = _gallery(service, main=False)
    service.version = 1
    gallery.after_step(1, log)
    assert service.asked == 1
    assert gallery._drawing._thread is None
    log.close()


@pytest.mark.parametrize(("service", "classes"), [(None, 2), (_Service(), 0)])
def test_without_clusters_or_with_sheets_switched_off(tmp_path: Path, service: _Service | None, classes: int) -> None:
    gallery, log = _gallery(service, classes=classes), _log(tmp_path)
    if service is not None:
        service.version += 1
    gallery.after_step(1, log)
    gallery.close()
    log.close()
    assert service is None or service.asked == 0


def test_what_fails_in_the_thread_is_told_of_and_that_is_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken(MemorySet):
        @property
        def labels(self) -> Any:
            raise MemoryError("no room [bold]for labels")

        @labels.setter
        def labels(self, value: Any) -> None:
            pass

    service, log = _Service(), _log(tmp_path)
    gallery = _gallery(service, Broken([jpeg(0)]))
    service.version = 1
    gallery.after_step(1, log)
    gallery._drawing.show(within=30)
    service.version = 2
    gallery.after_step(2, log)
    gallery.close()
    log.close()
    told = capsys.readouterr().err.splitlines()
    assert [line.split(" of the clusters")[0] for line in told] == [f"contact sheets of version {v}" for v in (1, 2)]
    assert all("MemoryError: no room" in line for line in told)


def test_a_store_that_does_not_answer_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.showing.gallery._PATIENCE_S", 0.05)
    answers = threading.Event()

    class Slow(MemorySet):
        def image(self, sample: int) -> Any:
            answers.wait(30)
            return super().image(sample)

    service, log = _Service(), _log(tmp_path)
    gallery = _gallery(service, Slow([jpeg(seed) for seed in range(20)]))
    for step in (1, 2):
        service.version = step
        gallery.after_step(step, log)  # the second version comes while the first is still being read
    assert service.asked == 2
    gallery.close()
    log.close()
    answers.set()
    assert gallery._drawing._thread is not None
    gallery._drawing._thread.join(30)
    assert not gallery._drawing._thread.is_alive()


def test_a_place_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tensorboard").write_text("a file")
    service, log = _Service(), _log(tmp_path)
    gallery = _gallery(service)
    service.version = 1
    gallery.after_step(1, log)
    gallery.close()
    log.close()
    assert "tensorboard: cannot write it" in capsys.readouterr().err
