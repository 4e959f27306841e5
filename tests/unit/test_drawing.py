"""Pictures drawn beside training: in order, in the thread that asks, and a picture that fails or lasts harms nobody."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from evaluation.plots import Drawn, drawn
from training.showing.drawing import Drawing


def _picture(number: int) -> Drawn:
    return Drawn(np.full((1, 1, 3), number, np.uint8), bytes([number]))


def test_each_is_shown_once_in_order_by_the_thread_that_asks() -> None:
    drawing, go = Drawing[Drawn]("test"), threading.Event()
    threads, shown = set[int](), list[tuple[int, int]]()

    def begin(number: int) -> None:
        def draw() -> Drawn:
            go.wait(10)
            threads.add(threading.get_ident())
            return _picture(number)

        drawing.begin(draw, lambda picture: shown.append((picture().png[0], threading.get_ident())))

    for number in range(5):
        begin(number)
    drawing.show()
    assert shown == [], "nothing is drawn yet, and nobody waits"
    go.set()
    drawing.show(within=10)
    drawing.show()
    assert shown == [(number, threading.get_ident()) for number in range(5)]
    assert len(threads) == 1
    assert threading.get_ident() not in threads
    drawing.close(within=1)


def test_one_that_fails_says_so_to_its_own() -> None:
    drawing, said = Drawing[Drawn]("test"), list[str]()

    def fail() -> Drawn:
        raise ValueError("no curves")

    def show(picture: Callable[[], Drawn]) -> None:
        with pytest.raises(ValueError, match="no curves"):
            picture()
        said.append("failed")

    drawing.begin(fail, show)
    drawing.begin(lambda: _picture(7), lambda picture: said.append(str(picture().png[0])))
    drawing.close(within=10)
    assert said == ["failed", "7"]


def test_the_end_does_not_wait_for_ever() -> None:
    drawing, go, shown = Drawing[Drawn]("test"), threading.Event(), list[int]()

    def slow() -> Drawn:
        go.wait(30)
        return _picture(1)

    for _ in range(3):
        drawing.begin(slow, lambda picture: shown.append(picture().png[0]))
    began = time.monotonic()
    drawing.close(within=0.2)
    assert time.monotonic() - began < 10
    assert shown == []
    go.set()


def test_pixels_are_those_of_the_file() -> None:
    figure = Figure(figsize=(2, 1))
    figure.add_subplot().plot([0, 1], [1, 0], color="red")
    picture = drawn(figure)
    assert picture.pixels.shape == (150, 300, 3)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(picture.png)).convert("RGB")), picture.pixels)
    assert ((picture.pixels == [255, 0, 0]).all(-1)).any()
