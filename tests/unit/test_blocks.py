"""Blocks of a far file: the same bytes, each got once by all threads and processes, and never too many kept."""

from __future__ import annotations

import logging
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from data.errors import DataError
from data.stores import block_disk, blocks
from data.stores.block_disk import BlockDisk
from data.stores.blocks import Blocks, Fetch

DATA = np.random.default_rng(0).bytes(1003)
BLOCK = 64


class Far:
    """The far file; `asked` counts how often each block was asked for."""

    def __init__(self) -> None:
        self.asked: Counter[int] = Counter()
        self.fail = 0
        self.wait: threading.Event | None = None

    def __call__(self, begin: int, end: int) -> bytes:
        self.asked[begin // BLOCK] += 1
        if self.wait is not None:
            assert self.wait.wait(10)
        if self.fail:
            self.fail -= 1
            raise ConnectionError("gone\naway")
        return DATA[begin:end]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", BLOCK)
    monkeypatch.setattr(blocks, "_PAUSE_S", 0.0)


@pytest.fixture
def far() -> Far:
    return Far()


def _blocks(far: Fetch, root: Path, limit: int = 10**9) -> Blocks:
    return Blocks("s3://far/train.rec", len(DATA), far, folder=root / "file", disk=BlockDisk(root, limit))


@pytest.fixture
def opened(far: Far, tmp_path: Path) -> Iterator[Blocks]:
    made = _blocks(far, tmp_path)
    yield made
    made.close()


def test_any_bytes_and_each_block_once(opened: Blocks, far: Far, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    spans = [sorted(rng.integers(0, len(DATA) + 1, 2).tolist()) for _ in range(300)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda span: bytes(opened.read(*span)), spans))
    assert found == [DATA[begin:end] for begin, end in spans]
    assert set(far.asked) == set(range(16))
    assert max(far.asked.values()) == 1
    again = _blocks(far, tmp_path)
    assert bytes(again.read(0, len(DATA))) == DATA
    again.close()
    assert max(far.asked.values()) == 1


def _count(root: Path, log: Path) -> None:
    blocks.BLOCK = BLOCK

    def fetch(begin: int, end: int) -> bytes:
        with log.open("a") as file:
            file.write(f"{begin // BLOCK}\n")
        time.sleep(0.002)
        return DATA[begin:end]

    opened = _blocks(fetch, root)
    assert bytes(opened.read(0, len(DATA))) == DATA
    opened.close()


def test_processes_share_a_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    log = tmp_path / "log"
    ranks = [context.Process(target=_count, args=(tmp_path / "root", log)) for _ in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(30)
        assert rank.exitcode == 0
    assert sorted(map(int, log.read_text().split())) == list(range(16))


def _quiet(opened: Blocks) -> None:
    """Wait until nothing is on its way."""
    deadline = time.monotonic() + 10
    while opened._coming:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_what_is_announced_is_got_meanwhile(opened: Blocks, far: Far) -> None:
    far.wait = threading.Event()
    opened.ahead(range(16))
    opened.ahead(range(16))
    assert len(opened._coming) == 16
    reader = threading.Thread(target=lambda: opened.read(0, len(DATA)))
    reader.start()
    far.wait.set()
    reader.join(10)
    assert not reader.is_alive()
    assert max(far.asked.values()) == 1
    _quiet(opened)


def test_who_needs_a_block_does_not_wait_for_those_before_it(
    far: Far, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_disk, "_THREADS", 1)
    opened = _blocks(far, tmp_path)
    far.wait = threading.Event()
    opened.ahead([0, 1, 2])
    deadline = time.monotonic() + 10
    while not far.asked[0]:  # until it is on its way, where it hangs
        assert time.monotonic() < deadline
        time.sleep(0.005)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(opened.read, 2 * BLOCK, 2 * BLOCK + 4)
        for _ in range(1000):
            if far.asked[2]:
                break
            time.sleep(0.005)
        assert far.asked == {0: 1, 2: 1}
        far.wait.set()
        assert bytes(asked.result(10)) == DATA[2 * BLOCK : 2 * BLOCK + 4]
    opened.close()


def test_failures_are_tried_again_and_then_said(opened: Blocks, far: Far) -> None:
    far.fail = 3
    assert bytes(opened.read(5, 9)) == DATA[5:9]
    far.fail = 4
    opened.ahead([3])
    expected = (
        r"s3://far/train\.rec: bytes 192 … 256 did not come in 4 tries, .* ConnectionError: gone away: see whether"
    )
    _quiet(opened)
    far.fail = 4
    with pytest.raises(DataError, match=expected):
        opened.read(200, 210)
    assert bytes(opened.read(200, 210)) == DATA[200:210]  # it is there again


def test_short_answers_are_failures(tmp_path: Path) -> None:
    short = _blocks(lambda begin, end: DATA[begin : end - 1], tmp_path)
    with pytest.raises(DataError, match="it sent 63 bytes"):
        short.read(0, 4)


def test_damaged_blocks_are_got_anew(far: Far, tmp_path: Path) -> None:
    first = _blocks(far, tmp_path)
    first.read(0, len(DATA))
    first.close()
    (tmp_path / "file" / "00000003").write_bytes(b"cut")
    (tmp_path / "file" / "00000004").write_bytes(b"")
    again = _blocks(far, tmp_path)
    assert bytes(again.read(0, len(DATA))) == DATA
    again.close()
    assert [number for number, times in far.asked.items() if times == 2] == [3, 4]


def test_blocks_that_nobody_used_for_long_go(far: Far, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_disk, "_TRIM_AFTER", 0.4)
    other, killed = tmp_path / "other" / "00000000", tmp_path / "other" / ".00000001.7.part"
    other.parent.mkdir()
    for path in (other, killed):
        path.write_bytes(bytes(BLOCK))
        os.utime(path, (1, 1))
    opened = _blocks(far, tmp_path, limit=6 * BLOCK)
    for _ in range(3):
        for number in range(15):
            begin, end = number * BLOCK, (number + 1) * BLOCK
            assert bytes(opened.read(begin, end)) == DATA[begin:end]
    assert not other.exists()
    assert not killed.exists()
    assert 3 <= len(list((tmp_path / "file").glob("[0-9]*"))) <= 6 + 3


def test_few_files_are_open_at_a_time(far: Far, tmp_path: Path) -> None:
    disk = BlockDisk(tmp_path, 10**9)
    disk._most = 3
    several = [Blocks(f"far {n}", len(DATA), far, folder=tmp_path / f"{n}", disk=disk) for n in range(4)]
    before = len(os.listdir("/proc/self/fd"))
    for each in several:
        assert bytes(each.read(0, len(DATA))) == DATA
        assert len(os.listdir("/proc/self/fd")) <= before + 3
    disk.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_threads_end_with_the_disk(tmp_path: Path) -> None:
    disk, before = BlockDisk(tmp_path, 10**9), set(threading.enumerate())
    futures = [disk.submit(lambda: None) for _ in range(40)]
    mine = set(threading.enumerate()) - before
    disk.close()
    for thread in mine:
        thread.join(10)
        assert not thread.is_alive()
    assert mine
    assert all(future.done() for future in futures)


def test_a_process_ends_though_blocks_are_announced(tmp_path: Path) -> None:
    code = f"""
import time
from pathlib import Path
from data.stores.block_disk import BlockDisk
from data.stores.blocks import BLOCK, Blocks
root = Path({str(tmp_path)!r})
def slow(begin, end):
    time.sleep(30)
Blocks("far", 999 * BLOCK, slow, folder=root / "file", disk=BlockDisk(root, 1)).ahead(range(999))
time.sleep(0.1)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=20)


def test_a_disk_that_is_full_costs_speed_only(
    far: Far, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    opened = _blocks(far, tmp_path)
    monkeypatch.setattr(Path, "write_bytes", full)
    with caplog.at_level(logging.WARNING):
        assert bytes(opened.read(0, len(DATA))) == DATA
    assert [record.getMessage().split(": ")[1] for record in caplog.records] == [
        "cannot keep blocks there ([Errno 28] No space left on device)"
    ]
    opened.close()
