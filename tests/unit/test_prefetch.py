"""Prefetching: ordered, complete, bounded, and without threads left behind."""

from __future__ import annotations

import threading
import time

import pytest

from data.loading.prefetch import LEAST_ROWS, prefetch


def _threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("decode")]


@pytest.mark.parametrize("rows", [1, LEAST_ROWS, 3 * LEAST_ROWS + 5])
def test_all_rows_once_in_order(rows: int) -> None:
    done: list[list[int]] = [[0] * rows for _ in range(7)]

    def work(item: int, part: range) -> None:
        time.sleep(0.002 * (item % 2))  # later items overtake earlier ones
        for row in part:
            done[item][row] += 1

    for expected, item in enumerate(prefetch(iter(range(7)), work, rows=rows, threads=3, ahead=3)):
        assert item == expected
        assert done[item] == [1] * rows
    assert item == 6
    assert not _threads()


def test_nothing_runs_further_ahead_than_asked() -> None:
    started: set[int] = set()
    stream = prefetch(iter(range(50)), lambda item, part: started.add(item), rows=1, threads=2, ahead=4)
    assert not started
    for item in range(3):
        assert next(stream) == item
        time.sleep(0.02)
        assert max(started) == item + 4
    stream.close()
    assert not _threads()


def test_an_error_comes_in_its_items_turn() -> None:
    def work(item: int, part: range) -> None:
        if item == 2 and 20 in part:
            raise ValueError("broken record")

    stream = prefetch(iter(range(9)), work, rows=40, threads=2, ahead=5)
    assert [next(stream), next(stream)] == [0, 1]
    with pytest.raises(ValueError, match="broken record"):
        next(stream)
    assert not _threads()


def test_an_error_of_the_consumer_leaves_no_thread() -> None:
    def consume() -> None:
        for _ in prefetch(iter(range(100)), lambda item, part: time.sleep(0.001), rows=64, threads=4, ahead=8):
            raise KeyError("consumer")

    with pytest.raises(KeyError):
        consume()
    assert not _threads()


def test_no_items() -> None:
    assert list(prefetch(iter(()), lambda item, part: None, rows=3, threads=1, ahead=2)) == []


@pytest.mark.parametrize(("threads", "ahead", "sizes"), [(2, 4, {128}), (4, 4, {64}), (12, 4, {21, 2}), (64, 1, {16})])
def test_parts_leave_two_for_every_thread(threads: int, ahead: int, sizes: set[int]) -> None:
    found: set[int] = set()
    list(prefetch(iter(range(6)), lambda item, part: found.add(len(part)), rows=128, threads=threads, ahead=ahead))
    assert found == sizes
