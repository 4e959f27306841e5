"""Nothing that happens at a place that is reported to reaches the training, and what is lost is counted."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from configs.schema import RunConfig
from data.contact_sheet import Pixels
from tests.sinks import picture
from training.sinks import Sinks, queued
from training.sinks.queued import Queued

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queued, "_PAUSES_S", (0.01, 0.01, 0.02))
    monkeypatch.setattr(queued, "FLUSH_S", 5.0)


class _Place:
    """A sink in which calls are counted, and may fail or hang."""

    name = "Place"

    def __init__(self) -> None:
        self.told: list[Any] = []
        self.fails = 0
        """Calls that fail yet."""
        self.may_go_on = threading.Event()
        self.may_go_on.set()

    def _tell(self, what: Any) -> None:
        assert self.may_go_on.wait(30)
        if self.fails:
            self.fails -= 1
            raise ConnectionError("nobody\nthere")
        self.told.append(what)

    def start(self, config: RunConfig, output: Path, *, resumed: bool) -> str:
        self._tell("start")
        return "here"

    def scalars(self, step: int, values: Mapping[str, float], when: float) -> None:
        self._tell((step, dict(values)))

    def picture(self, step: int, tag: str, picture: Pixels) -> None:
        self._tell((step, tag, picture.shape))

    def close(self, *, failed: bool) -> None:
        self._tell("failed" if failed else "closed")


@pytest.fixture
def place() -> Iterator[_Place]:
    place = _Place()
    yield place
    place.may_go_on.set()


def _sinks(place: _Place, lines: list[str]) -> Sinks:
    sinks = Sinks([Queued(place, lines.append)], lines.append)
    sinks.start(RunConfig(), Path("run"), resumed=False)
    return sinks


@pytest.mark.parametrize("failed", [False, True])
def test_all_is_told_in_order_and_once(place: _Place, lines: list[str], failed: bool) -> None:
    sinks = _sinks(place, lines)
    values = {"loss": 1.0}
    sinks.scalars(1, values)
    values["loss"] = 2.0  # the training goes on with the same dictionary
    sinks.picture(1, "roc", picture())
    sinks.scalars(2, values)
    sinks.close(failed=failed)
    sinks.close()
    end = "failed" if failed else "closed"
    assert place.told == ["start", (1, {"loss": 1.0}), (1, "roc", (100, 200, 3)), (2, {"loss": 2.0}), end]
    assert lines == ["Place: here"]


def test_what_fails_is_said_once_tried_again_and_told_late(place: _Place, lines: list[str]) -> None:
    place.fails = 7  # more than the tries of a report: the beginning is tried until it works
    sinks = _sinks(place, lines)
    sinks.scalars(1, {"loss": 1.0})
    deadline = time.monotonic() + 10
    while len(place.told) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    place.fails = 1
    sinks.scalars(2, {"loss": 2.0})
    while len(place.told) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    sinks.close()
    assert place.told == ["start", (1, {"loss": 1.0}), (2, {"loss": 2.0}), "closed"]
    failing = "Place: cannot report (nobody there): training goes on, and tries it again"
    again = "Place: reports again; 0 reports are lost"
    assert lines == [failing, "Place: here", again, failing, again]


def test_a_report_that_is_always_refused_is_given_up(place: _Place, lines: list[str]) -> None:
    sinks = _sinks(place, lines)
    while place.told != ["start"]:
        time.sleep(0.01)
    place.fails = 3
    sinks.scalars(1, {"loss": 1.0})
    while place.fails:
        time.sleep(0.01)
    sinks.scalars(2, {"loss": 2.0})
    while len(place.told) < 2:
        time.sleep(0.01)
    sinks.close()
    assert place.told == ["start", (2, {"loss": 2.0}), "closed"]
    assert lines[1:] == [
        "Place: cannot report (nobody there): training goes on, and tries it again",
        "Place: reports again; 1 reports are lost",
        "Place: 1 reports are lost",
    ]


def test_what_does_not_fit_is_dropped_and_counted_and_nobody_waits(
    place: _Place, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queued, "ROOM", 10)
    monkeypatch.setattr(queued, "ROOM_FOR_PICTURES", 4)
    place.may_go_on.clear()
    sinks = _sinks(place, lines)
    began = time.monotonic()
    for step in range(6):
        sinks.picture(step, "roc", picture())
    for step in range(9):
        sinks.scalars(step, {"loss": 1.0})
    assert time.monotonic() - began < 5
    place.may_go_on.set()
    sinks.close()
    pictures, scalars = ([told for told in place.told if len(told) == size and told != "start"] for size in (3, 2))
    assert [step for step, *_ in pictures] == [0, 1, 2, 3]
    assert [step for step, _ in scalars] == [0, 1, 2, 3, 4, 5]
    assert lines == ["Place: here", "Place: 5 reports are lost"]


def test_the_end_waits_for_some_seconds_only(place: _Place, lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queued, "FLUSH_S", 0.2)
    place.may_go_on.clear()
    sinks = _sinks(place, lines)
    for step in range(3):
        sinks.scalars(step, {"loss": 1.0})
    began = time.monotonic()
    closers = [threading.Thread(target=sinks.close) for _ in range(2)]  # as the watching thread may do it as well
    for closer in closers:
        closer.start()
    for closer in closers:
        closer.join(10)
    assert 0.2 <= time.monotonic() - began < 5
    assert lines == ["Place: did not take the last reports within 0.2 s; 3 are known to be lost"]


def test_at_the_end_nothing_is_tried_twice(place: _Place, lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queued, "_PAUSES_S", (60.0,))
    place.fails = 100
    sinks = _sinks(place, lines)
    sinks.scalars(1, {"loss": 1.0})
    while place.fails == 100:
        time.sleep(0.01)
    began = time.monotonic()
    sinks.close()
    assert time.monotonic() - began < 3
    assert lines[1:] == ["Place: 1 reports are lost"]


def test_a_thread_that_hangs_does_not_keep_the_process(tmp_path: Path) -> None:
    code = (
        "import time, pathlib, training.sinks.queued as q; from configs.schema import RunConfig\n"
        "class Place:\n"
        "    name = 'Place'\n"
        "    def start(self, *a, **k): time.sleep(600)\n"
        "q.FLUSH_S = 0.1; sink = q.Queued(Place(), print)\n"
        "sink.start(RunConfig(), pathlib.Path('x'), resumed=False); sink.close(failed=False)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=False, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "Place: did not take the last reports within 0.1 s; 0 are known to be lost\n"
